"""A tensor as a matrix of words, cut into tiles: the arithmetic of shapes that decoding and encoding share."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rac.errors import FormatError
from rac.registry import DTYPES


class Box(NamedTuple):
    """Rows r0..r1 - 1 and columns c0..c1 - 1 of a matrix."""

    r0: int
    r1: int
    c0: int
    c1: int


@dataclass(frozen=True, slots=True)
class Band:
    """Tiles that are finished together, and the part of the matrix that they cover."""

    box: Box
    tiles: range  # numbers of the tiles, in the order of the grid


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix of R x C words, cut into tiles of tr x tc (the last ones may be smaller)."""

    rows: int
    cols: int
    word: int  # bytes of a word that the coder restores
    tr: int
    tc: int

    @property
    def down(self) -> int:
        """Tiles from top to bottom."""
        return -(-self.rows // self.tr) if self.rows * self.cols else 0

    @property
    def across(self) -> int:
        """Tiles from left to right."""
        return -(-self.cols // self.tc) if self.rows * self.cols else 0

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.down * self.across

    def box(self, i: int) -> Box:
        """The part of the matrix that tile `i` covers; tiles are numbered row by row."""
        r, c = divmod(i, self.across)
        return Box(r * self.tr, min(self.rows, (r + 1) * self.tr), c * self.tc, min(self.cols, (c + 1) * self.tc))

    def area(self, n: int) -> int:
        """Words of the first `n` tiles."""
        down, rest = divmod(n, self.across)
        top = min(self.rows, down * self.tr)
        return top * self.cols + (min(self.rows, top + self.tr) - top) * min(self.cols, rest * self.tc)


@functools.lru_cache(64)
def boxes(grid: Grid) -> list[Box]:
    """`Grid.box` of every tile."""
    return [grid.box(i) for i in range(grid.tiles)]


@functools.lru_cache(64)
def bounds(grid: Grid) -> NDArray[np.int64]:
    """(tiles, 4) `Grid.box` of every tile. Not to be written to."""
    return np.array(boxes(grid), np.int64).reshape(-1, 4)


def dense_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of the dense tensor; FormatError for an F4 whose last dimension is odd."""
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits % 8 or (dtype == "F4" and (not shape or shape[-1] % 2)):
        raise FormatError("F4 needs an even last dimension")
    return bits // 8


def matrix(dtype: str, shape: Sequence[int], axis: int) -> tuple[int, int]:
    """(R, C) in words: dimensions before `axis` are rows; C64 counts two words and F4 half a word per element."""
    rows, cols = math.prod(shape[:axis]), math.prod(shape[axis:])
    d = DTYPES[dtype]
    if cols * d.bits % (8 * d.word):
        raise FormatError("the axis cuts an F4 tensor inside a byte")
    return rows, cols * d.bits // (8 * d.word)


def is_int(v: Any, low: int, high: int) -> bool:
    """True for an int (not a bool) in low..high."""
    return type(v) is int and low <= v <= high


def up16(n: int) -> int:
    """`n` rounded up to the alignment of sub-streams."""
    return -(-n // 16) * 16
