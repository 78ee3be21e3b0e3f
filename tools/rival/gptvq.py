"""GPTVQ (arXiv 2402.15319): pairs of weights by codebooks of their own for each group, errors fed back.

A codebook of 4^bits pairs belongs to a square of weights (`SIDES`; where none fits the matrix, to a rectangle of nearly
as many), and is found by weighted k-means, 8 bits for each
of its numbers and 16 for their scale, which is 0.11 to 0.12 bit a weight. Weights of the means are the diagonal of the
Cholesky factor; columns go in the order of their energy. The paper's tuning of codebooks afterwards is left out.
"""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from rival.compiled import feeds, library, pointer

SIDES = {2: 48, 3: 96, 4: 192}
"""Rows, and columns, of a group, by bits, where they divide the matrix."""
TIMES = 30
"""Iterations of k-means."""
Floats = NDArray[np.float32]


def codebook(pairs: Floats, weights: Floats, k: int) -> Floats:
    """(2, k) centres of pairs (n, 2), begun at k of them evenly spread by their distance from the middle, in 8 bits."""
    far = (weights * (pairs - pairs.mean(0)) ** 2).sum(1)
    chosen = np.argsort(far)[np.linspace(0, len(far) - 1, k).astype(int)]
    centres = np.ascontiguousarray(pairs[chosen].T)
    sizes = ctypes.c_long(len(pairs)), ctypes.c_int(k), ctypes.c_int(TIMES)
    if library("vector").means(pointer(pairs), pointer(weights), *sizes, pointer(centres)):
        raise MemoryError
    scale = np.float32(np.float16(max(float(np.abs(centres).max()), 1e-6) / 127))
    return np.asarray(np.clip(np.rint(centres / scale), -127, 127) * scale)


def nearest(pairs: Floats, weights: Floats, centres: Floats) -> Floats:
    """(n, 2) the centre that is nearest to each pair."""
    which, k = np.empty(len(pairs), np.int32), centres.shape[1]
    sizes = ctypes.c_long(len(pairs)), ctypes.c_int(k)
    library("vector").nearest(pointer(pairs), pointer(weights), *sizes, pointer(centres), pointer(which))
    return centres[:, which].T


def group(rows: int, cols: int, bits: int) -> tuple[int, int]:
    """(rows, columns) of groups that a matrix is cut into: of nearly SIDES squared weights, nearly squares."""
    heights = [n for n in range(1, rows + 1) if rows % n == 0]
    widths = [n for n in range(2, cols + 1, 2) if cols % n == 0]

    def far(side: tuple[int, int]) -> tuple[float, float]:
        return abs(math.log(side[0] * side[1] / SIDES[bits] ** 2)), abs(math.log(side[0] / side[1]))

    return min(itertools.product(heights, widths), key=far)


def quantised(w: Floats, second: NDArray[np.float64], bits: int) -> tuple[float, Floats]:
    """(bits, numbers) of a matrix of an even number of columns."""
    rows, cols = w.shape
    (height, width), k = group(rows, cols, bits), 4**bits
    order = np.argsort(np.diag(second), kind="stable")
    feed, lower = feeds(second[np.ix_(order, order)], 2)
    cost = np.diag(lower).astype(np.float32) ** 2
    ordered = np.ascontiguousarray(w[:, order])
    found, error = np.empty_like(ordered), np.zeros_like(ordered)
    for a in range(cols - width, -1, -width):
        b = a + width
        whole = ordered[:, a:b] + error[:, b:] @ feed[b:, a:b]
        weights = np.tile(cost[a:b].reshape(-1, 2), (height, 1))
        squares = whole.reshape(-1, height * width // 2, 2)
        books = [codebook(square, weights, k) for square in np.ascontiguousarray(squares)]
        for j in range(b - 2, a - 1, -2):
            target = np.ascontiguousarray(ordered[:, j : j + 2] + error[:, j + 2 :] @ feed[j + 2 :, j : j + 2])
            each = np.ascontiguousarray(np.broadcast_to(cost[j : j + 2], (height, 2)))
            for i, book in enumerate(books):
                at = slice(i * height, (i + 1) * height)
                found[at, j : j + 2] = nearest(target[at], each, book)
            error[:, j : j + 2] = ordered[:, j : j + 2] - found[:, j : j + 2]
    out = np.empty_like(w)
    out[:, order] = found
    groups = rows * cols // (height * width)
    return bits * w.size + groups * (16 * k + 16), out
