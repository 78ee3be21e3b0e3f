"""A toy coder and toy numbers: what a new stage consists of, in as few lines as it takes (docs/add-a-stage.md)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from rac.container import zstd
from rac.encode import record, ties
from rac.encode.code.plain import TileByTile
from rac.encode.code.plan import CODER, View
from rac.encode.code.table import ENCODERS
from rac.encode.encoded import Encoded, Fidelity
from rac.encode.sources import SourceTensor
from rac.errors import FormatError, UnsupportedError
from rac.grid import Box, Grid
from rac.stages.base import Context, Head
from rac.stages.plain import Plain
from rac.stages.table import CODERS, NUMBERS
from rac.stages.words import to_words

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Masked(Plain):
    """masked/1: the bytes of a tile, each exclusive-or the one byte of the front unit."""

    id: ClassVar[str] = "masked/1"
    resident: ClassVar[bool] = True
    front: ClassVar[int | None] = 1

    def open(self, unit: bytes, grid: Grid) -> Any:
        """The coder with its mask; FormatError unless the unit is one byte."""
        if len(unit) != 1:
            raise FormatError("masked unit is not one byte")
        return OpenMasked(unit[0])


class OpenMasked(Plain):
    """The mask of a tensor."""

    def __init__(self, mask: int) -> None:
        self.mask = np.uint8(mask)

    def decode(self, unit: Array, box: Box, dst: Array, plain: bool = False) -> None:
        """The unit of a tile into `dst` (h, w) words; FormatError unless it has their size."""
        if len(unit) != dst.size * dst.itemsize:
            raise FormatError("masked unit does not have the size of its tile")
        dst[...] = (unit ^ self.mask).view(dst.dtype).reshape(dst.shape)


class MaskedEncoder(TileByTile):
    """Proposes masked/1 for every tensor, as if it took no bytes at all."""

    MASK = 0x5A

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """An encoder; always."""
        return cls(view.plan(Masked(), bytes([cls.MASK])), view.words), -(1 << 62)

    def tile(self, words: Array) -> bytes:
        """The unit of a tile."""
        return (np.ascontiguousarray(words).reshape(-1).view(np.uint8) ^ np.uint8(self.MASK)).tobytes()


@dataclass(frozen=True, slots=True)
class Steps:
    """steps/1: a word stands for (word - 128) times the step of its row, a power of two whose exponent the unit has."""

    id: ClassVar[str] = "steps/1"
    sections: ClassVar[tuple[str, ...]] = ("steps",)
    rows: int

    @property
    def front(self) -> int:
        """Bytes of the unit: one for each row."""
        return self.rows

    @property
    def section_sizes(self) -> tuple[int, ...]:
        """Bytes of the steps."""
        return (self.rows,)

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """The stage of a stage map; FormatError or UnsupportedError."""
        if head.keys() != {"id", "rows"}:
            raise UnsupportedError("unknown parameters of steps/1")
        if head["rows"] != context.rows:
            raise FormatError("steps/1 has other rows than the tensor")
        return cls(head["rows"])

    def to_head(self) -> Head:
        """The stage map."""
        return {"id": self.id, "rows": self.rows}

    def open(self, unit: bytes, context: Context) -> Any:
        """The steps of a tensor."""
        if len(unit) != self.rows:
            raise FormatError("steps unit does not have a byte for each row")
        return OpenSteps(np.frombuffer(unit, np.int8), context.dtype)

    def details(self, dtype: str) -> Mapping[str, Any]:
        """Nothing but that there are no outliers."""
        return {"outliers": 0}


class OpenSteps:
    """The steps of a tensor."""

    fused: None = None
    patches = False

    def __init__(self, exponents: NDArray[np.int8], dtype: str) -> None:
        self.step, self.dtype = np.ldexp(np.float32(1), exponents).astype(np.float32), dtype

    def patch(self, box: Box, dst: Array) -> None:
        """Nothing."""

    def decode(self, words: NDArray[np.uint8], box: Box, dst: Array) -> None:
        """Words (h, w) to elements in `dst` (h, w)."""
        numbers = (words.astype(np.float32) - np.float32(128)) * self.step[box.r0 : box.r1, None]
        dst[...] = to_words(numbers, self.dtype)


@dataclass(frozen=True)
class BySteps:
    """Quantises the matrices of a source by steps/1."""

    names: frozenset[str]

    @property
    def about(self) -> Mapping[str, Any]:
        """What the provenance states."""
        return {"steps": 1}

    def need(self, t: SourceTensor) -> int:
        """Bytes of memory that the work on a tensor takes, about."""
        return 8 * t.nbytes

    def job(self, group: ties.Group) -> tuple[Any, tuple[Any, ...]]:
        """The work on a tensor."""
        return encode, (group,)


def encode(group: ties.Group) -> Encoded:
    """A tensor of F32 by masked/1 and steps/1."""
    t = group.tensor
    w = t.read(0, t.nbytes).view(np.float32).reshape(t.shape)
    exponents = np.ceil(np.log2(np.maximum(np.abs(w).max(1), 1e-30) / 127)).astype(np.int8)
    step = np.ldexp(np.float32(1), exponents)[:, None]
    words = np.clip(np.rint(w / step) + 128, 0, 255).astype(np.uint8)
    plan, tiles = record.coded(words, CODER)
    numbers = (words.astype(np.float32) - 128) * step
    units = [*plan.fronts, exponents.tobytes(), *tiles]
    behind = record.Behind(Steps(len(w)), zstd.digest(numbers.astype("<f4").tobytes()), ties.digest(t))
    fidelity = Fidelity(t.name, t.shape, "identity", 0, 1, math.inf, 0, 0, 0.0)
    return record.encoded(group, plan, units, behind, fidelity=fidelity)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The toys in the tables of the format and of the encoders: three rows, and nothing else is touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODERS, Masked.id, Masked)
        patch.setitem(NUMBERS, Steps.id, Steps)
        patch.setitem(ENCODERS, Masked.id, MaskedEncoder)
        yield
