"""Words of a few bits in bit planes (format_spec/stages/bits.md): a coder of fixed rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.errors import FormatError
from rac.grid import Box, up16
from rac.native import words as native_words
from rac.native.prototypes import Array
from rac.stages.base import Context, Head
from rac.stages.base import check as check_head
from rac.stages.lanes.layout import unpack_planes
from rac.stages.lanes.parameters import cut_planes
from rac.stages.plain import Plain


@dataclass(frozen=True, slots=True)
class Bits(Plain):
    """bits/1: words of one byte, all below 2**bits, in planes of 8, 4, 2 and 1 bits."""

    id: ClassVar[str] = "bits/1"
    bits: int

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """The coder of a stage map (stages/bits.md, section 1); FormatError or UnsupportedError."""
        check_head(head, {"bits": (1, 8)}, cls.id)
        if context.word != 1:
            raise FormatError("bits/1 is for words of one byte")
        return cls(head["bits"])

    def decode(self, unit: Array, box: Box, dst: Array, plain: bool = False) -> None:
        """The unit (bytes,) uint8 of a tile into `dst` (h, w) uint8; FormatError unless it is that of so many words."""
        dst[...] = unpack(unit, dst.size, self.bits).reshape(dst.shape)


def planes(n: int, bits: int) -> tuple[list[tuple[int, int, int]], int]:
    """(bits, lowest bit, start) of the planes of `n` words, and the bytes of all."""
    out, at = [], 0
    for b, low in cut_planes(bits):
        out.append((b, low, at))
        at += up16(-(-n * b // 8))
    return out, at


def pack(words: NDArray[np.uint8], bits: int) -> bytes:
    """The unit of a tile of words, all below 2**bits."""
    flat = np.ascontiguousarray(words).reshape(-1)
    return native.planes(flat, 0, False, bits, *planes(len(flat), bits)).tobytes()


def check(unit: NDArray[np.uint8], n: int, bits: int) -> None:
    """FormatError unless the unit (bytes,) of a tile is that of `n` words."""
    cuts, size = planes(n, bits)
    if len(unit) != size:
        raise FormatError("bits unit does not have the size of its planes")
    for b, _, at in cuts:
        whole = -(-n * b // 8)
        if unit[at + whole : at + up16(whole)].any():
            raise FormatError("padding is not zero")
        if n * b % 8 and unit[at + whole - 1] >> np.uint8(n * b % 8):
            raise FormatError("plane ends in non-zero bits")


def unpack(unit: NDArray[np.uint8], n: int, bits: int) -> NDArray[np.uint8]:
    """Words (n,) out of the unit (bytes,) of a tile; FormatError unless all of it fits."""
    check(unit, n, bits)
    found = native_words.unpack(np.ascontiguousarray(unit), n, bits)
    if found is not None:
        return found
    cuts = planes(n, bits)[0]
    return unpack_planes([unit[at : at - (-n * b // 8)] for b, _, at in cuts], n, cut_planes(bits), np.uint8)
