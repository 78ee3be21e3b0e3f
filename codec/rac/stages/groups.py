"""Codes with a scale and a zero for each group of columns (format_spec/stages/groups.md): the grids of RTN and GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rac.container import zstd
from rac.errors import FormatError
from rac.grid import Box
from rac.native import words as native
from rac.native.prototypes import F32, Array
from rac.stages.base import Context, Head, Numbers, OpenNumbers, check, pack_lists, sizes_of, unpack_list
from rac.stages.words import DTYPES, to_words

LEAST, MOST = 2.0**-14, 65504.0  # the normal numbers of binary16
FAR = 60  # exponents of the factor of all scales are -FAR to FAR
_FIRST, _LAST = 0x0400, 0x7BFF  # bits of LEAST and MOST as binary16


@dataclass(frozen=True)
class Grouped:
    """A matrix on a grid: element (i, j) is (codes[i, j] - zeros[i, j // group]) * scales[i, j // group]."""

    codes: NDArray[np.uint8]
    """(R, C), 0 .. 2**bits - 1"""
    scales: F32
    """(R, G), G = ceil(C / group); each one a number that `storable` gives back as it is."""
    zeros: NDArray[np.uint8]
    """(R, G), 0 .. 255"""
    group: int
    """Columns of a group, 1 .. C; C is one scale for each row."""
    bits: int
    """1 .. 8"""
    lost: tuple[float, float] | None = None
    """Energy of the matrix that was rounded to the grid, and of what rounding changed; None: not known."""


def values(g: Grouped) -> F32:
    """(R, C) the numbers that the codes stand for. Binary32 holds each exactly: 11 bits of the scale times 8."""
    k = g.codes.astype(np.float32) - spread(g.zeros, g.group, g.codes.shape[1])
    return k * spread(g.scales, g.group, g.codes.shape[1])


def spread(x: NDArray[np.generic], group: int, cols: int) -> F32:
    """(R, G) numbers of groups to (R, cols) of columns, as float32."""
    return np.repeat(x.astype(np.float32), group, axis=1)[:, :cols]


def storable(scales: ArrayLike) -> F32:
    """Scales, shape kept, rounded to normal numbers of binary16, 2**-14 to 65504; ValueError for infinite, negative."""
    x = np.asarray(scales, np.float32)
    if not np.isfinite(x).all() or (x < 0).any():
        raise ValueError("scales must be finite and at least 0")
    return np.clip(x, np.float32(LEAST), np.float32(MOST)).astype(np.float16).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Groups(Numbers):
    """groups/1: words to numbers by a scale and a zero for each group of columns of a row."""

    id: ClassVar[str] = "groups/1"
    sections: ClassVar[tuple[str, ...]] = ("scales", "zeros")
    bits: int
    group: int
    zero: int  # the zero point of all groups, where the unit has none
    exponent: int  # log2 of a factor of all scales
    sizes: tuple[int, int, int]  # bytes of the upper bytes of the scales, of the lower ones, of the zeros

    @property
    def section_sizes(self) -> tuple[int, ...]:
        """Bytes of the scales and of the zeros."""
        return self.sizes[0] + self.sizes[1], self.sizes[2]

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """The stage of a stage map (stages/groups.md, section 1); FormatError or UnsupportedError."""
        ranges = {"bits": (1, 8), "group": (1, max(1, context.cols)), "zero": (0, 255), "exponent": (-FAR, FAR)}
        check(head, ranges, "groups", {"sizes"})
        sizes = sizes_of(head, 3, "groups")
        if head["zero"] and sizes[2]:
            raise FormatError("groups have one zero and a list of zeros")
        if context.dtype not in DTYPES:
            raise FormatError(f"groups cannot be of {context.dtype}")
        return cls(**{key: head[key] for key in ranges}, sizes=sizes)

    def open(self, unit: bytes, context: Context) -> OpenGroups:
        """Parse the unit (stages/groups.md, section 2); FormatError where it breaks the format."""
        return OpenGroups(unit, self, context)

    def details(self, dtype: str) -> Mapping[str, Any]:
        """Bits of a code, columns of a group, the zero of all groups (None: each has its own)."""
        return {"bits": self.bits, "group": self.group, "zero": None if self.sizes[2] else self.zero, "outliers": 0}


class OpenGroups(OpenNumbers):
    """The unit of a tensor: `scales` (R, G) float32, and `zeros` (R, G) uint8, or (1, 1) where all are the same."""

    def __init__(self, unit: bytes, p: Groups, context: Context) -> None:
        self.p, self.dtype = p, context.dtype
        if len(unit) != p.front:
            raise FormatError("groups unit does not have the size of its sections")
        shape = context.rows, -(-context.cols // p.group)
        a, b = p.sizes[0], p.sizes[0] + p.sizes[1]
        parts = unit[:a], unit[a:b], unit[b:]
        high, low, zeros = (unpack_list(data, shape[0] * shape[1]).reshape(shape) for data in parts)
        bits = high.astype(np.uint16) << np.uint16(8) | low
        if bits.min() < _FIRST or bits.max() > _LAST:
            raise FormatError("a scale is no normal number above 0")
        self.scales = np.ldexp(bits.view(np.float16).astype(np.float32), p.exponent)
        self.zeros = zeros if p.sizes[2] else np.array([[p.zero]], np.uint8)

    def decode(self, words: NDArray[np.uint8], box: Box, dst: Array) -> None:
        """Words (h, w) of one tile to elements in `dst` (h, w); FormatError where one has more than `bits` bits."""
        p, (r0, r1, c0, c1) = self.p, box
        first, left = divmod(c0, p.group)
        of = np.s_[r0:r1, first : -(-c1 // p.group)]
        scales, zeros = self.scales[of], self.zeros if self.zeros.size == 1 else self.zeros[of]
        seen = native.ungroup(words, scales, zeros, (p.group, left), dst, self.dtype)
        if (words >> np.uint8(p.bits)).any() if seen is None else seen >> p.bits:
            raise FormatError("a word is larger than groups/1 allows")
        if seen is None:
            scale, zero = (spread(x, p.group, left + c1 - c0)[:, left:] for x in (scales, zeros))
            dst[...] = to_words((words.astype(np.float32) - (zeros if zeros.size == 1 else zero)) * scale, self.dtype)


def build_unit(g: Grouped) -> tuple[Groups, bytes]:
    """Parameters and unit; ValueError unless `g` is as `Grouped` says, but for a power of two of all scales."""
    rows, cols = g.codes.shape
    shape = rows, -(-cols // g.group) if g.group >= 1 else 0
    if not (1 <= g.bits <= 8 and 1 <= g.group <= cols and g.scales.shape == g.zeros.shape == shape):
        raise ValueError(f"codes {g.codes.shape}, scales {g.scales.shape}, zeros {g.zeros.shape}: groups of {g.group}?")
    if g.codes.dtype != np.uint8 or g.zeros.dtype != np.uint8 or (g.codes >> np.uint8(g.bits)).any():
        raise ValueError(f"codes and zeros must be uint8, codes below 2**{g.bits}")
    bits, exponent = _stored(np.asarray(g.scales, np.float32))
    same = bool((g.zeros == g.zeros.flat[0]).all())
    high, low = (bits >> np.uint16(8)).astype(np.uint8), bits.astype(np.uint8)
    lists = [*pack_lists((high, low)), b"" if same else zstd.shorter(g.zeros.tobytes(), 19)]
    a, b, c = map(len, lists)
    return Groups(g.bits, g.group, int(g.zeros.flat[0]) if same else 0, exponent, (a, b, c)), b"".join(lists)


def _stored(scales: F32) -> tuple[NDArray[np.uint16], int]:
    """Scales as bits of binary16 and the exponent of a factor of all; ValueError where there is none."""
    if scales.size and np.isfinite(scales).all() and scales.min() > 0:
        largest = int(np.frexp(scales.max())[1]) - 16  # which brings the largest to 2**15 and more
        for exponent in (0, min(FAR, max(-FAR, largest))):
            x = np.ldexp(scales, -exponent)
            if x.min() >= LEAST and x.max() <= MOST and (x.astype(np.float16) == x).all():
                return x.astype(np.float16).view(np.uint16), exponent
    raise ValueError("a scale is no normal number of binary16 above 0: see storable")
