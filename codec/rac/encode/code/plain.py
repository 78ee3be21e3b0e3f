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


class RawEncoder:
    """Words as they are: what every tensor can fall back on."""

    def __init__(self, plan: Plan, words: Array | None) -> None:
        self.plan, self.words = plan, words

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """An encoder, for less than the words themselves take: another coder has to gain something."""
        return cls(view.plan(Raw()), view.words), view.size - 64

    def encode(self, words: Array, i: int) -> Bytes:
        """The unit of tile `i`, whose words (h, w) are given."""
        return np.ascontiguousarray(words).tobytes()


class ZstdEncoder:
    """A Zstandard frame for each tile."""

    def __init__(self, plan: Plan, words: Array | None, level: int) -> None:
        self.plan, self.words, self._level = plan, words, level

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """An encoder where the sample says that it gains 2 %."""
        level = view.level.zstd
        whole = view.sample.size == view.total
        size = view.scaled(len(zstd.compress(shuffle(view.sample), level if whole else 3)))
        return (cls(view.plan(Zstd(view.grid.word)), view.words, level), size) if size < best * 0.98 else None

    def encode(self, words: Array, i: int) -> Bytes:
        """The unit of tile `i`, whose words (h, w) are given."""
        return zstd.compress(shuffle(words), self._level)


class BitsEncoder:
    """Planes of bits: proposed by nobody, since only what made the codes knows how many bits they have."""

    def __init__(self, plan: Plan, words: Array | None, n: int) -> None:
        self.plan, self.words, self._bits = plan, words, n

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """None."""
        return None

    @classmethod
    def of(cls, plan: Plan, words: NDArray[np.uint8], n: int) -> Self:
        """An encoder for words (R, C) below 2**n in the tiles of another plan of them."""
        return cls(Plan(Bits(n), plan.grid, plan.axis, plan.digest), words, n)

    def encode(self, words: Array, i: int) -> Bytes:
        """The unit of tile `i`, whose words (h, w) are given."""
        return bits.pack(words, self._bits)


def shuffle(words: Array) -> bytes:
    """Bytes of all words, lowest bytes first (stages/zstd.md)."""
    w = words.dtype.itemsize
    return np.ascontiguousarray(np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, w).T).tobytes()
