"""Matrices as a sum: a part of low rank, and what is left."""

from rac.linalg.lowrank import low_rank

__all__ = ["low_rank"]
