"""Calibration: second moments of the inputs of layers and sensitivities of their outputs, from text."""
