"""Coordinates adapted to what a layer is sensitive to: a recursion of the columns, or their principal directions.

With S = U^T diag(lam) U, the rows of U orthonormal, W = V U and errors of V that are independent of each other, the
output error is the sum over j of lam_j |error of column j|^2: steps proportional to 1 / sqrt(lam_j) make all columns
count alike, and the weakest get no bits at all (reverse water-filling). Nothing is fed back, but a decoder needs U.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rac.linalg.triangular import triangular

__all__ = ["pca", "triangular"]


@dataclass(frozen=True, slots=True)
class Pca:
    """The principal directions of one second moment."""

    basis: NDArray[np.float64]
    """(n, n) U: directions as rows, orthonormal, from the weakest to the strongest."""
    weight: NDArray[np.float64]
    """(n,) square root of what a unit error of each coordinate costs."""


def pca(second: NDArray[np.floating], damp: float = 0.01) -> Pca:
    """The directions for inputs of second moment E[x x^T] (n, n), symmetric, of any rank.

    `damp` is the share of the mean diagonal that is added to the diagonal.
    """
    s = np.asarray(second, np.float64)
    mean = max(float(np.trace(s)) / len(s), 1e-30)
    energy, u = np.linalg.eigh(s)
    return Pca(np.ascontiguousarray(u.T), np.sqrt(np.maximum(energy, 0) + damp * mean))
