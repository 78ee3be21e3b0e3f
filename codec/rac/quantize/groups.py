"""Codes with a scale and a zero for each group of columns (format_spec/stages/groups.md): the grids of RTN and GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST, MOST = 2.0**-14, 65504.0
"""The normal numbers of binary16."""


@dataclass(frozen=True)
class Grouped:
    """A matrix on a grid: element (i, j) is (codes[i, j] - zeros[i, j // group]) * scales[i, j // group]."""

    codes: NDArray[np.uint8]
    """(R, C), 0 .. 2**bits - 1"""
    scales: NDArray[np.float32]
    """(R, G), G = ceil(C / group); each one a number that `storable` gives back as it is."""
    zeros: NDArray[np.uint8]
    """(R, G), 0 .. 255"""
    group: int
    """Columns of a group, 1 .. C; C is one scale for each row."""
    bits: int
    """1 .. 8"""


def values(g: Grouped) -> NDArray[np.float32]:
    """(R, C) the numbers that the codes stand for. Binary32 holds each exactly: 11 bits of the scale times 8."""
    k = g.codes.astype(np.float32) - spread(g.zeros, g.group, g.codes.shape[1])
    return k * spread(g.scales, g.group, g.codes.shape[1])


def spread(x: NDArray[np.generic], group: int, cols: int) -> NDArray[np.float32]:
    """(R, G) numbers of groups to (R, cols) of columns, as float32."""
    return np.repeat(x.astype(np.float32), group, axis=1)[:, :cols]


def storable(scales: ArrayLike) -> NDArray[np.float32]:
    """Scales, shape kept, rounded to normal numbers of binary16: at least 2**-14, at most 65504.

    Raises:
        ValueError: One is not finite or negative.
    """
    x = np.asarray(scales, np.float32)
    if not np.isfinite(x).all() or (x < 0).any():
        raise ValueError("scales must be finite and at least 0")
    return np.clip(x, np.float32(LEAST), np.float32(MOST)).astype(np.float16).astype(np.float32)
