"""Coordinates adapted to what a layer is sensitive to: one file for each alignment."""
