"""Objects, and an encoder of lowrank/1 and basis/1, written from stages/lowrank.md and stages/basis.md alone.

Its arithmetic is Python's: the product of two binary32 numbers is exact in binary64, and rounding their sum to binary64
first does not change what binary32 it becomes.
"""

import math
import struct
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from golden.good import dense, tensor
from golden.lanes import Lanes
from golden.model import OBJECT, Record
from golden.trellis import Trellis, element, lossy, number
from rac.container import zstd

NAN = {"F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}


@dataclass
class Matrix:
    """An object: its record and what is in it."""

    record: Record
    rows: int
    cols: int
    words: list[int]
    """F32, row by row."""

    @property
    def name(self) -> str:
        """As `uses` has it."""
        name: str = self.record.head["name"]
        return name

    def numbers(self) -> list[list[float]]:
        """By rows."""
        return [[number(w) for w in self.words[i * self.cols : (i + 1) * self.cols]] for i in range(self.rows)]


def plain(
    name: str,
    rows: int,
    cols: int,
    words: list[int],
    stage: str | Lanes = "raw/1",
    *,
    tile: tuple[int, int] | None = None,
    more: dict[str, Any] | None = None,
) -> Matrix:
    """An object as it is."""
    r = tensor(name, "F32", [rows, cols], words, stage, axis=1, tile=tile, more=more)
    return Matrix(replace(r, type=OBJECT), rows, cols, words)


def quantised(
    name: str,
    rows: int,
    cols: int,
    words: list[int],
    t: Trellis,
    front: str | Lanes = "raw/1",
    *,
    tile: tuple[int, int] | None = None,
) -> Matrix:
    """An object under trellis/1; `words` are the bytes that `front` stores."""
    r = lossy(name, [rows, cols], words, t, front, axis=1, tile=tile)
    tr, tc = r.head["tile"]
    return Matrix(replace(r, type=OBJECT), rows, cols, t.elements(words, rows, cols, tr, tc))


def binary32(v: float) -> float:
    """Rounded to binary32; what is too large is infinite."""
    try:
        out: float = struct.unpack("<f", struct.pack("<f", v))[0]
    except OverflowError:
        return math.copysign(math.inf, v)
    return out


def word(v: float, dtype: str) -> int:
    """A binary32 number as a word of the data type."""
    return NAN[dtype] if math.isnan(v) else element(v, dtype)


def lowrank(v: list[list[float]], a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    """V + A B."""
    out = [row[:] for row in v]
    for i, row in enumerate(out):
        for j in range(len(row)):
            for k in range(len(b)):
                row[j] = binary32(row[j] + binary32(a[i][k] * b[k][j]))
    return out


def basis(v: list[list[float]], u: list[list[float]]) -> list[list[float]]:
    """V U."""
    return lowrank([[0.0] * len(u) for _ in v], v, u)


def product(
    name: str,
    shape: list[int],
    dtype: str,
    words: list[int],
    t: Trellis,
    uses: list[Matrix],
    front: str | Lanes = "raw/1",
    *,
    axis: int | None = None,
    tile: tuple[int, int] | None = None,
    more: dict[str, Any] | None = None,
) -> Record:
    """A tensor of three stages: lowrank/1 with two objects, basis/1 with one. The data type of `t` is F32."""
    axis = max(0, len(shape) - 1) if axis is None else axis
    rows, cols = prod(shape[:axis]), prod(shape[axis:])
    r = lossy(name, shape, words, t, front, axis=axis, tile=tile)
    flat = [number(w) for w in t.elements(words, rows, cols, *r.head["tile"])]
    v = [flat[i * cols : (i + 1) * cols] for i in range(rows)]
    found = lowrank(v, *(m.numbers() for m in uses)) if len(uses) == 2 else basis(v, uses[0].numbers())
    stage = {"id": "lowrank/1" if len(uses) == 2 else "basis/1"}
    r.head |= {
        "dtype": dtype,
        "stages": [*r.head["stages"], stage],
        "uses": [m.name for m in uses],
        "digest": zstd.digest(dense(dtype, [word(x, dtype) for row in found for x in row])),
    }
    r.head |= more or {}
    return r
