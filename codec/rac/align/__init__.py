"""Coordinates adapted to what a layer is sensitive to: one file for each alignment."""

from rac.linalg.pca import pca
from rac.linalg.triangular import triangular

__all__ = ["pca", "triangular"]
