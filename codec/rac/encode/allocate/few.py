"""Rows of every tensor that stand for all of them while the common scale is looked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rac.encode import ties
from rac.encode.align.recipe import Aligned, Recipe
from rac.encode.code.plan import axis_of
from rac.encode.encoded import Encoded
from rac.encode.quantise import trellis as lossy
from rac.encode.sources import SourceTensor
from rac.grid import matrix
from rac.stages.trellis import Trellis
from rac.stages.words import DTYPES

LEAST = (
    1 << 27
)  # quantised weights from which on a sample is taken: that of fewer tells too little, and all take minutes


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a tensor, read from it when they are asked for."""

    tensor: SourceTensor
    row: int  # bytes of one
    numbers: NDArray[np.int64]

    @property
    def size(self) -> int:
        """Their bytes."""
        return self.row * len(self.numbers)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the rows one after the other."""
        first, last = start // self.row, -(-stop // self.row)
        out = np.empty((last - first, self.row), np.uint8)
        for i, at in enumerate(self.numbers[first:last].tolist()):
            out[i] = self.tensor.read(at * self.row, (at + 1) * self.row)
        return out.reshape(-1)[start - first * self.row : stop - first * self.row]


@dataclass(frozen=True, slots=True)
class Few:
    """A model of which each tensor has a few of its rows, and how these stand for it."""

    groups: tuple[ties.Group, ...]
    recipe: Recipe
    times: Mapping[str, float]  # rows of the tensor for each one in the sample

    def bytes_of(self, e: Encoded, size: int) -> float:
        """Bytes of the whole tensor, about, of which the rows `e` take `size` with their objects.

        What there is once for each tensor (head, tables, scales of columns) counts once.
        """
        times = self.times[e.name]
        if times == 1:
            return size
        once = e.size - sum(map(len, e.units))
        if e.fidelity is not None:
            rows, cols = _sides(e)
            tr, tc = e.head["tile"]
            front = len(e.units) - -(-rows // tr) * -(-cols // tc)
            sections = next(s["sizes"] for s in e.head["stages"] if s["id"] == Trellis.id)
            once += sum(len(u) for u in e.units[: front - 1]) + sections[0] + sections[2]
        return once + (size - once) * times


def _sides(e: Encoded) -> tuple[int, int]:
    return matrix(e.head["dtype"], tuple(e.head["shape"]), e.head["axis"])


def few(groups: Sequence[ties.Group], recipe: Recipe) -> Few | None:
    """The rows of the tensors of a recipe; None where there are too few weights for a sample to tell anything."""
    if sum(math.prod(g.tensor.shape) for g in groups) < LEAST:
        return None
    some, aligned, times = list[ties.Group](), dict[str, Aligned](), dict[str, float]()
    for g in groups:
        a, name = recipe.aligned[g.tensor.name], g.tensor.name
        g, a, times[name] = _cut(g, a)
        some.append(g)
        aligned[name] = a
    return Few(tuple(some), replace(recipe, aligned=aligned), times)


def _cut(g: ties.Group, a: Aligned) -> tuple[ties.Group, Aligned, float]:
    """Some rows of a tensor, their alignment, and how many rows each stands for; all where rows need one another."""
    t, at = g.tensor, a.few
    rows, cols = matrix(t.dtype, t.shape, axis_of(t.shape))
    among = a.layer is not None and (a.layer.transposed or bool(a.layer.experts))
    if among or a.rank or a.basis is not None or t.online or at is None:
        return g, a, 1.0
    piece = SourceTensor(t.name, t.dtype, (len(at), cols), Rows(t, cols * DTYPES[t.dtype].itemsize, at))
    part = replace(a, scales=lossy.Scales(a.scales.rows[at], a.scales.cols), lossless=None, few=None)
    if a.by_outputs and a.layer is not None and (outer := a.layer.outer) is not None:
        part = replace(part, layer=replace(a.layer, outputs=np.ascontiguousarray(outer[np.ix_(at, at)])))
    return ties.Group(piece, (), {}), part, rows / len(at)
