"""Matrices on a grid, for tests: round to nearest, one scale and zero for each group of columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.stages.groups import Grouped, spread, storable


def nearest(w: NDArray[np.float32], bits: int, group: int, symmetric: bool = False) -> Grouped:
    """`w` (R, C) in `bits`, the range of each group being that of its numbers and 0."""
    rows, cols = w.shape
    n = -(-cols // group)
    each = np.pad(w, ((0, 0), (0, n * group - cols))).reshape(rows, n, group)
    low, high, most = np.minimum(each.min(2), 0), np.maximum(each.max(2), 0), (1 << bits) - 1
    if symmetric:
        scales = storable(2 * np.maximum(-low, high) / max(1, most))
        zeros = np.full((rows, n), (most + 1) // 2, np.uint8)
    else:
        scales = storable((high - low) / most)
        zeros = np.clip(np.rint(-low / scales), 0, most).astype(np.uint8)
    steps = np.rint(w / spread(scales, group, cols)) + spread(zeros, group, cols)
    return Grouped(np.clip(steps, 0, most).astype(np.uint8), scales, zeros, group, bits)


def random(rng: np.random.Generator, rows: int, cols: int, bits: int, group: int, one_zero: bool = False) -> Grouped:
    """Codes, scales and zeros that fit no matrix: each anything that may be."""
    n = -(-cols // group)
    codes = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
    scales = rng.integers(0x0400, 0x7C00, (rows, n)).astype(np.uint16).view(np.float16).astype(np.float32)
    zeros = rng.integers(0, 256, (rows, n)).astype(np.uint8)
    return Grouped(codes, scales, np.full_like(zeros, 7) if one_zero else zeros, group, bits)


def normal(seed: int, rows: int, cols: int, deviation: float = 0.02) -> NDArray[np.float32]:
    """Numbers about 0."""
    out: NDArray[np.float32] = (deviation * np.random.default_rng(seed).standard_normal((rows, cols))).astype("f4")
    return out
