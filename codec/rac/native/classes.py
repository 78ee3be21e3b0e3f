"""Exact lengths and the joining of classes, for the encoder (encode/code/classes.py): C kernels, or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library

Array = NDArray[Any]


def code_length(counts: NDArray[np.int64], fraction: NDArray[np.int64], weight: int) -> NDArray[np.int64] | None:
    """Twin of encode.classes.code_length for contiguous (n, S) counts; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    out = np.empty(len(counts), np.int64)
    lib.rac_code_length(counts, counts.shape[0], counts.shape[1], fraction, weight, out)
    return out


def sum_classes(hist: NDArray[np.uint32], classes: NDArray[np.uint8], out: NDArray[np.int64]) -> bool:
    """Add contiguous vectors (n, G, S) to the counts of their classes (K, G, S); False without the C kernel."""
    lib = library()
    if lib is None:
        return False
    lib.rac_sum(hist, classes, len(hist), hist[0].size, out)
    return True


def log2(n: NDArray[np.int64], fraction: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Twin of encode.classes.log2; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    n = np.ascontiguousarray(n)
    out = np.empty(n.shape, np.int64)
    lib.rac_log2(n, n.size, fraction, out)
    return out


def join(
    agg: NDArray[np.int64],
    size: NDArray[np.int64],
    alive: NDArray[np.bool_],
    groups: NDArray[np.int64],
    fraction: NDArray[np.int64],
    weight: int,
) -> bool:
    """Twin of the loop of encode.classes.join, which works on its arguments; False where the C kernel is not there."""
    lib = library()
    if lib is None:
        return False
    k, g, s = agg.shape
    own, gain, tmp = np.zeros(k, np.int64), np.empty((k, k), np.int64), np.empty((g, s), np.int64)
    lib.rac_join(
        agg,
        size,
        alive,
        groups,
        own,
        gain,
        tmp,
        k,
        g,
        s,
        fraction,
        weight,
    )
    return True
