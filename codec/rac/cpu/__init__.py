"""Decoding on the CPU: tiles to words, by the C kernels or in Python."""
