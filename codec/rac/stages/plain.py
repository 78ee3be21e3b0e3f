"""Words as they are, or in Zstandard frames (format_spec/stages/raw.md, format_spec/stages/zstd.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from rac.container import zstd
from rac.errors import FormatError
from rac.grid import Box, Grid
from rac.native.prototypes import Array
from rac.stages.base import Coder, Context, Head, OpenCoder, check


class Plain(Coder, OpenCoder):
    """A coder without front unit and kernel, which is open as it is."""

    def open(self, unit: bytes, grid: Grid) -> Self:
        """The coder itself: there is no unit to parse."""
        return self


@dataclass(frozen=True, slots=True)
class Raw(Plain):
    """raw/1: the words of a tile, row by row."""

    id: ClassVar[str] = "raw/1"

    def decode(self, unit: Array, box: Box, dst: Array, plain: bool = False) -> None:
        """The unit (bytes,) uint8 of a tile into `dst` (h, w) words; FormatError unless it has their size."""
        if len(unit) != dst.size * dst.itemsize:
            raise FormatError("raw unit does not have the size of its tile")
        dst[...] = unit.view(dst.dtype).reshape(dst.shape)


@dataclass(frozen=True, slots=True)
class Zstd(Plain):
    """zstd/1: a Zstandard frame of the bytes of all words of a tile, lowest bytes first."""

    id: ClassVar[str] = "zstd/1"
    framed: ClassVar[bool] = True  # type: ignore[misc]
    word: int

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """The coder of a stage map, for words of `context.word` bytes; UnsupportedError where it has parameters."""
        check(head, {}, cls.id)
        return cls(context.word)

    def to_head(self) -> Head:
        """The stage map, which has no parameters."""
        return {"id": self.id}

    def decode(self, unit: Array, box: Box, dst: Array, plain: bool = False) -> None:
        """The unit (bytes,) uint8 of a tile into `dst` (h, w) words; `plain`: it is these words already."""
        if not plain:
            data = np.frombuffer(zstd.decompress(unit.data, dst.size * self.word), np.uint8)
            unit = np.ascontiguousarray(data.reshape(self.word, dst.size).T)
        dst[...] = unit.view(dst.dtype).reshape(dst.shape)

    def plain(self, unit: Array, box: Box) -> Array:
        """The words of the tile as bytes; FormatError where the frame is damaged."""
        words = np.empty((box.r1 - box.r0, box.c1 - box.c0), f"<u{self.word}")
        self.decode(unit, box, words)
        return words.reshape(-1).view(np.uint8)
