"""WaterSIC (arXiv 2603.04956): columns one after the other, steps inverse to what an error costs, an ideal coder.

What a decoder would read is not made: the rate is the entropy of each column's integers, as the paper counts it, and 16
bits for the step of each column, shrunk to the least squared error. Every matrix has the rate that is asked for. The
paper's tuning afterwards is left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.linalg.triangular import triangular

BLOCK = 48
"""Columns between updates of all those that come after."""
PASSES = 4
"""Searches for the common factor of the steps: half the rate that is left each time would be slow, all of it is not."""
Floats = NDArray[np.float32]


def entropy(column: NDArray[np.int32]) -> float:
    """Bits for each integer, by how often it occurs."""
    counts = np.bincount(column - column.min())
    p = counts[counts > 0] / column.size
    return float(-(p * np.log2(p)).sum())


def at(w: Floats, feed: Floats, step: NDArray[np.float64]) -> tuple[float, Floats]:
    """(entropy of all integers, numbers) of w (R, C), columns from the last to the first, with these steps."""
    out, error, bits = np.empty_like(w), np.zeros_like(w), 0.0
    for a in range((w.shape[1] - 1) // BLOCK * BLOCK, -1, -BLOCK):
        b = min(w.shape[1], a + BLOCK)
        target = w[:, a:b] + error[:, b:] @ feed[a:b, b:].T
        for j in range(b - 1, a - 1, -1):
            wanted = target[:, j - a]
            whole = np.rint(wanted / step[j])
            energy = float(whole @ whole)
            shrunk = float(whole @ wanted) / energy if energy else 0.0
            out[:, j] = whole * np.float32(shrunk)
            error[:, j] = wanted = w[:, j] - out[:, j]
            target[:, : j - a] += wanted[:, None] * feed[a:j, j]
            bits += entropy(whole.astype(np.int32)) * len(w)
    return bits, out


def quantised(w: Floats, second: NDArray[np.float64], bits: float) -> tuple[float, Floats]:
    """(bits, numbers) of a matrix at about so many bits a weight."""
    form = triangular(second, 0.0)
    ordered = np.asfortranarray(w[:, form.order])
    side = 16 * w.shape[1]
    spread = np.sqrt((ordered.astype(np.float64) ** 2).mean(0))
    level = float(np.log2(np.maximum(spread * form.weight, 1e-30)).mean()) + 2.05 - bits
    for _ in range(PASSES):
        taken, found = at(ordered, form.feed, 2**level / form.weight)
        missed = (taken + side) / w.size - bits
        if abs(missed) < 0.003:
            break
        level += missed
    out = np.empty_like(w)
    out[:, form.order] = found
    return taken + side, out
