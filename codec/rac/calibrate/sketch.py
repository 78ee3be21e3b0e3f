"""What a matrix is known by: one number of each row, nearly the same where the values are rounded to another type."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CLOSE = 0.02  # share of the usual number by which two may differ: three digits of a rounded weight, and no more
_STEP = np.uint32(2654435761)


def sketch(w: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows,) projections of a tensor's rows onto one fixed vector of signs.

    The tensor counts as the matrix that a pack makes of it: rows are all dimensions but the last, or the first alone
    where the last is shorter than 64.
    """
    rows = w.reshape(len(w), -1) if w.shape[-1] < 64 else w.reshape(-1, w.shape[-1])
    return (rows @ _signs(rows.shape[1])).astype(np.float32)


def _signs(n: int) -> NDArray[np.float32]:
    high = (np.arange(n, dtype=np.uint32) * _STEP) >> np.uint32(31)
    return high.astype(np.float32) * 2 - 1


def places(
    known: NDArray[np.float32], at: NDArray[np.int64], found: NDArray[np.float32], rows: int
) -> NDArray[np.int64]:
    """First rows in a matrix of sketch `known` from which `rows` of it look like a matrix with `found` at rows `at`."""
    last = len(known) - rows
    if last < 0:
        return np.zeros(0, np.int64)
    usual = float(np.sqrt(np.mean(np.square(known), dtype=np.float64)))
    starts = np.arange(last + 1)
    for i, value in zip(at, found, strict=True):
        near = np.abs(known[starts + i] - value) <= CLOSE * max(usual, abs(float(value)))
        starts = starts[near]
    return starts
