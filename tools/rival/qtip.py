"""QTIP (arXiv 2406.11235), as EXL3 uses it: a trellis whose code is computed, of 2, 3 or 4 bits a weight exactly.

Both sides of a matrix are turned by random Hadamard matrices; blocks of 16 columns are rounded with the errors of the
finished ones fed back (LDLQ); each tile of 16 x 16 is one ring of a bitshift trellis of 16 bits, whose state's value is
the sum of the bytes of a product. The scale of a matrix is the best of `SCALES` on a sample of its rows. Stored are the
bits of the trellis, one scale in 16 bits, and a sign for each row and column. There is no tuning afterwards.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from rac.linalg import hadamard
from rival.compiled import feeds, library, pointer

TILE = 16
MULTIPLIER = 0x83DCD12D
"""The code of state s is the sum of the bytes of s * MULTIPLIER mod 2^32: near a Gaussian of 4 uniform numbers."""
FINE = 8191
"""Fixed-point steps to a unit of the code."""
SCALES = {2: (0.95, 1.0, 1.05), 3: (1.0, 1.06, 1.12), 4: (1.04, 1.1, 1.18)}
"""Scales that are tried for each number of bits, in deviations of the matrix."""
SAMPLE = 16
"""Rows in that sample."""
Floats = NDArray[np.float32]


def code() -> Floats:
    """(65536,) the value of each state."""
    product = np.arange(1 << 16, dtype=np.uint32) * np.uint32(MULTIPLIER)
    total = product.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.int64)
    return np.asarray((total - total.mean()) / total.std(), np.float32)


def fixed(x: Floats) -> NDArray[np.int16]:
    """In fixed point, what is beyond it at its end."""
    return np.clip(np.rint(x * FINE), -32767, 32767).astype(np.int16)


def rings(x: Floats, k: int) -> NDArray[np.uint16]:
    """States (count, n) of the best rings for sequences x (count, n) in units of the code."""
    numbers, values, states = fixed(x), fixed(code()), np.empty(x.shape, np.uint16)
    sizes = ctypes.c_long(len(x)), ctypes.c_int(x.shape[1]), ctypes.c_int(k)
    if library("trellis").rings(pointer(numbers), *sizes, pointer(values), pointer(states)):
        raise MemoryError
    return states


def rounded(w: Floats, feed: Floats, k: int, scale: float) -> Floats:
    """The numbers of the trellis for w (R, C), R and C multiples of 16, errors fed back."""
    rows, cols = w.shape
    out, error, values = np.empty_like(w), np.zeros_like(w), code()
    for a in range(cols - TILE, -1, -TILE):
        b = a + TILE
        target = w[:, a:b] + error[:, b:] @ feed[b:, a:b]
        tiles = np.asarray(target / np.float32(scale), np.float32).reshape(rows // TILE, TILE * TILE)
        out[:, a:b] = values[rings(tiles, k)].reshape(rows, TILE) * np.float32(scale)
        error[:, a:b] = w[:, a:b] - out[:, a:b]
    return out


def turned(x: NDArray[np.float64], left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The product left x right^T."""
    return np.asarray(left @ x @ right.T)


def basis(n: int, seed: int) -> NDArray[np.float64]:
    """(n, n) a Hadamard matrix whose columns have random signs."""
    return hadamard.matrix(n) * hadamard.signs(seed, n)


def quantised(w: Floats, second: NDArray[np.float64], k: int, seed: int = 0) -> tuple[float, Floats]:
    """(bits, numbers) of a matrix whose sides are multiples of 16."""
    rows, cols = w.shape
    left, right = basis(rows, 2 * seed + 1), basis(cols, 2 * seed + 2)
    moved = turned(w.astype(np.float64), left, right).astype(np.float32)
    inner = turned(second, right, right)
    feed, _ = feeds(inner, TILE)
    own = float(np.sqrt((moved.astype(np.float64) ** 2).mean()))
    sample = moved[:SAMPLE]  # all rows are alike once they are turned

    def loss(scale: float) -> float:
        e = (sample - rounded(sample, feed, k, scale * own)).astype(np.float64)
        return float(((e @ inner) * e).sum())

    best = min(SCALES[k], key=loss)
    found = rounded(moved, feed, k, best * own)
    side = 16 + rows + cols
    return k * w.size + side, turned(found.astype(np.float64), left.T, right.T).astype(np.float32)
