"""Quantise: a matrix to small integers and scales."""
