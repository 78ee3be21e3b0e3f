"""Matrices as a sum: a part of low rank, and what is left."""
