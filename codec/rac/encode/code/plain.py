"""Encoders of raw/1, zstd/1 and bits/1."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.encode.code.plan import Plan, View
from rac.encode.encoded import Bytes
from rac.grid import boxes
from rac.stages import bits
from rac.stages.bits import Bits
from rac.stages.plain import Raw, Zstd

Array = NDArray[Any]


class TileByTile:
    """An encoder whose `tile` codes one tile."""

    def __init__(self, plan: Plan, words: Array | None, how: int = 0, made: bytes = b"") -> None:
        """`made` is the unit of the only tile, where it was made to know its size."""
        self.plan, self.words, self._how, self._made = plan, words, how, made

    def encode(self, words: Array, rows: range) -> list[Bytes]:
        """The units of rows of tiles whose words (h, C) are given."""
        grid = self.plan.grid
        some = boxes(grid)[rows.start * grid.across : rows.stop * grid.across]
        return [self.tile(words[b.r0 - some[0].r0 : b.r1 - some[0].r0, b.c0 : b.c1]) for b in some]

    def tile(self, words: Array) -> Bytes:
        """The unit of a tile (h, w)."""
        raise NotImplementedError


class RawEncoder(TileByTile):
    """Words as they are: what every tensor can fall back on."""

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """An encoder, for less than the words themselves take: another coder has to gain something."""
        return cls(view.plan(Raw()), view.words), view.size - 64

    def tile(self, words: Array) -> Bytes:
        """The words (h, w) of a tile."""
        return np.ascontiguousarray(words).tobytes()


class ZstdEncoder(TileByTile):
    """A Zstandard frame for each tile."""

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """An encoder where the sample says that it gains 2 %."""
        level, whole = view.level.zstd, view.sample.size == view.total
        frame = zstd.compress(shuffle(view.sample), level if whole else 3)
        size = view.scaled(len(frame))
        if size >= best * 0.98:
            return None
        made = frame if whole and view.grid.tiles == 1 else b""
        return cls(view.plan(Zstd(view.grid.word)), view.words, level, made), size

    def tile(self, words: Array) -> Bytes:
        """A frame of the words (h, w) of a tile."""
        return self._made or zstd.compress(shuffle(words), self._how)


class BitsEncoder(TileByTile):
    """Planes of bits: proposed by nobody, since only what made the codes knows how many bits they have."""

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """None."""

    @classmethod
    def of(cls, plan: Plan, words: NDArray[np.uint8], n: int) -> Self:
        """An encoder for words (R, C) below 2**n in the tiles of another plan of them."""
        return cls(Plan(Bits(n), plan.grid, plan.axis, plan.digest), words, n)

    def tile(self, words: Array) -> Bytes:
        """The planes of the words (h, w) of a tile."""
        return bits.pack(words, self._how)


def shuffle(words: Array) -> bytes:
    """Bytes of all words, lowest bytes first (stages/zstd.md)."""
    w = words.dtype.itemsize
    return np.ascontiguousarray(np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, w).T).tobytes()
