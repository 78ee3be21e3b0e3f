"""Entropy-code: a matrix of words to tiles, classes, tables and units."""
