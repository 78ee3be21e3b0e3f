"""Align: which tensors are quantised, in which coordinates, and how fine their rows and columns are."""
