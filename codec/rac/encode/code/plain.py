"""Encoders of raw/1, zstd/1 and bits/1."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.encode.code.plan import Plan, View
from rac.encode.encoded import Bytes
from rac.stages import bits
from rac.stages.bits import Bits
from rac.stages.plain import Raw, Zstd

Array = NDArray[Any]


class _Encoder:
    def __init__(self, plan: Plan, words: Array | None, how: int = 0) -> None:
        self.plan, self.words, self._how = plan, words, how


class RawEncoder(_Encoder):
    """Words as they are: what every tensor can fall back on."""

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """An encoder, for less than the words themselves take: another coder has to gain something."""
        return cls(view.plan(Raw()), view.words), view.size - 64

    def encode(self, words: Array, i: int) -> Bytes:
        """The words (h, w) of the tile."""
        return np.ascontiguousarray(words).tobytes()


class ZstdEncoder(_Encoder):
    """A Zstandard frame for each tile."""

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """An encoder where the sample says that it gains 2 %."""
        level = view.level.zstd
        whole = view.sample.size == view.total
        size = view.scaled(len(zstd.compress(shuffle(view.sample), level if whole else 3)))
        return (cls(view.plan(Zstd(view.grid.word)), view.words, level), size) if size < best * 0.98 else None

    def encode(self, words: Array, i: int) -> Bytes:
        """A frame of the words (h, w) of the tile."""
        return zstd.compress(shuffle(words), self._how)


class BitsEncoder(_Encoder):
    """Planes of bits: proposed by nobody, since only what made the codes knows how many bits they have."""

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """None."""

    @classmethod
    def of(cls, plan: Plan, words: NDArray[np.uint8], n: int) -> Self:
        """An encoder for words (R, C) below 2**n in the tiles of another plan of them."""
        return cls(Plan(Bits(n), plan.grid, plan.axis, plan.digest), words, n)

    def encode(self, words: Array, i: int) -> Bytes:
        """The planes of the words (h, w) of the tile."""
        return bits.pack(words, self._how)


def shuffle(words: Array) -> bytes:
    """Bytes of all words, lowest bytes first (stages/zstd.md)."""
    w = words.dtype.itemsize
    return np.ascontiguousarray(np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, w).T).tobytes()
