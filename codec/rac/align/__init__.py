"""Coordinates adapted to what a layer is sensitive to: one file for each alignment."""

from rac.align.pca import pca
from rac.align.triangular import triangular

__all__ = ["pca", "triangular"]
