"""Codes with a scale and a zero for each group of columns (format_spec/stages/groups.md): the grids of RTN and GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rac.container import zstd
from rac.errors import FormatError, UnsupportedError
from rac.native import groups as native
from rac.stages.lanes.layout import is_int
from rac.stages.trellis import DTYPES, to_words

Array = NDArray[Any]
LEAST, MOST = 2.0**-14, 65504.0
"""The normal numbers of binary16."""
KEYS = {"id", "bits", "group", "zero", "exponent", "sizes"}
FAR = 60
"""Exponents of the factor of all scales are -FAR to FAR."""
_FIRST, _LAST = 0x0400, 0x7BFF
"""The same as bits."""


@dataclass(frozen=True)
class Grouped:
    """A matrix on a grid: element (i, j) is (codes[i, j] - zeros[i, j // group]) * scales[i, j // group]."""

    codes: NDArray[np.uint8]
    """(R, C), 0 .. 2**bits - 1"""
    scales: NDArray[np.float32]
    """(R, G), G = ceil(C / group); each one a number that `storable` gives back as it is."""
    zeros: NDArray[np.uint8]
    """(R, G), 0 .. 255"""
    group: int
    """Columns of a group, 1 .. C; C is one scale for each row."""
    bits: int
    """1 .. 8"""


def values(g: Grouped) -> NDArray[np.float32]:
    """(R, C) the numbers that the codes stand for. Binary32 holds each exactly: 11 bits of the scale times 8."""
    k = g.codes.astype(np.float32) - spread(g.zeros, g.group, g.codes.shape[1])
    return k * spread(g.scales, g.group, g.codes.shape[1])


def spread(x: NDArray[np.generic], group: int, cols: int) -> NDArray[np.float32]:
    """(R, G) numbers of groups to (R, cols) of columns, as float32."""
    return np.repeat(x.astype(np.float32), group, axis=1)[:, :cols]


def storable(scales: ArrayLike) -> NDArray[np.float32]:
    """Scales, shape kept, rounded to normal numbers of binary16: at least 2**-14, at most 65504.

    Raises:
        ValueError: One is not finite or negative.
    """
    x = np.asarray(scales, np.float32)
    if not np.isfinite(x).all() or (x < 0).any():
        raise ValueError("scales must be finite and at least 0")
    return np.clip(x, np.float32(LEAST), np.float32(MOST)).astype(np.float16).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Groups:
    """Parameters of groups/1 as they stand in the stage map of a record head."""

    bits: int
    group: int
    zero: int
    """That of all groups, where the unit has none."""
    exponent: int
    """log2 of a factor of all scales."""
    sizes: tuple[int, int, int]
    """Bytes of the upper bytes of the scales, of the lower ones, of the zeros."""
    id: ClassVar = "groups/1"

    def to_head(self) -> dict[str, Any]:
        """The stage map."""
        return {
            "id": self.id,
            "bits": self.bits,
            "group": self.group,
            "zero": self.zero,
            "exponent": self.exponent,
            "sizes": list(self.sizes),
        }

    @classmethod
    def from_head(cls, head: dict[str, Any], dtype: str, cols: int) -> Groups:
        """Check every field (stages/groups.md, section 1); `cols` is the width of the matrix."""
        if KEYS - head.keys():
            raise FormatError("groups parameters are incomplete")
        if head.keys() - KEYS:
            raise UnsupportedError(f"unknown groups parameters: {', '.join(sorted(head.keys() - KEYS))}")
        ranges = {"bits": (1, 8), "group": (1, max(1, cols)), "zero": (0, 255), "exponent": (-FAR, FAR)}
        for key, (low, high) in ranges.items():
            if not is_int(head[key], low, high):
                raise FormatError(f"groups parameter {key} is out of range")
        sizes = head["sizes"]
        if not isinstance(sizes, list) or len(sizes) != 3 or any(not is_int(v, 0, 1 << 40) for v in sizes):
            raise FormatError("groups parameter sizes is malformed")
        if head["zero"] and sizes[2]:
            raise FormatError("groups have one zero and a list of zeros")
        if dtype not in DTYPES:
            raise FormatError(f"groups cannot be of {dtype}")
        return cls(head["bits"], head["group"], head["zero"], head["exponent"], tuple(sizes))


@dataclass(frozen=True, slots=True)
class Tables:
    """What the unit of groups/1 holds, ready for use."""

    scales: NDArray[np.float32]
    """(R, G)"""
    zeros: NDArray[np.uint8]
    """(R, G), or (1, 1) where all are the same."""


def parse_unit(unit: bytes, p: Groups, rows: int, cols: int) -> Tables:
    """The unit of a tensor of rows x cols elements (stages/groups.md, section 2); FormatError where it breaks it."""
    if len(unit) != sum(p.sizes):
        raise FormatError("groups unit does not have the size of its sections")
    shape = rows, -(-cols // p.group)
    a, b = p.sizes[0], p.sizes[0] + p.sizes[1]
    high, low = _list(unit[:a], shape), _list(unit[a:b], shape)
    bits = high.astype(np.uint16) << np.uint16(8) | low
    if bits.min() < _FIRST or bits.max() > _LAST:
        raise FormatError("a scale is no normal number above 0")
    scales = np.ldexp(bits.view(np.float16).astype(np.float32), p.exponent)
    return Tables(scales, _list(unit[b:], shape) if p.sizes[2] else np.array([[p.zero]], np.uint8))


def _list(data: bytes, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Bytes of all groups: nothing where all are 0, plain bytes, or else a zstd frame."""
    if not data:
        return np.zeros(shape, np.uint8)
    return np.frombuffer(zstd.expand(data, shape[0] * shape[1]), np.uint8).reshape(shape)


def build_unit(g: Grouped) -> tuple[Groups, bytes]:
    """Inverse of `parse_unit`: parameters and unit of a matrix.

    Raises:
        ValueError: A shape, code or scale is not as `Grouped` says. Scales may also be such numbers times one power of
            two from 2**-60 to 2**60.
    """
    rows, cols = g.codes.shape
    shape = rows, -(-cols // g.group) if g.group >= 1 else 0
    if not (1 <= g.bits <= 8 and 1 <= g.group <= cols and g.scales.shape == g.zeros.shape == shape):
        raise ValueError(f"codes {g.codes.shape}, scales {g.scales.shape}, zeros {g.zeros.shape}: groups of {g.group}?")
    if g.codes.dtype != np.uint8 or g.zeros.dtype != np.uint8 or (g.codes >> np.uint8(g.bits)).any():
        raise ValueError(f"codes and zeros must be uint8, codes below 2**{g.bits}")
    bits, exponent = _stored(np.asarray(g.scales, np.float32))
    same = bool((g.zeros == g.zeros.flat[0]).all())
    high, low = (bits >> np.uint16(8)).astype(np.uint8), bits.astype(np.uint8)
    lists = [zstd.shorter(v.tobytes(), 19) if v.any() else b"" for v in (high, low)]
    lists.append(b"" if same else zstd.shorter(g.zeros.tobytes(), 19))
    a, b, c = map(len, lists)
    return Groups(g.bits, g.group, int(g.zeros.flat[0]) if same else 0, exponent, (a, b, c)), b"".join(lists)


def _stored(scales: NDArray[np.float32]) -> tuple[NDArray[np.uint16], int]:
    """Scales as bits of binary16 and the exponent of a factor of all; ValueError where there is none."""
    if scales.size and np.isfinite(scales).all() and scales.min() > 0:
        largest = int(np.frexp(scales.max())[1]) - 16  # which brings the largest to 2**15 and more
        for exponent in (0, min(FAR, max(-FAR, largest))):
            x = np.ldexp(scales, -exponent)
            if x.min() >= LEAST and x.max() <= MOST and (x.astype(np.float16) == x).all():
                return x.astype(np.float16).view(np.uint16), exponent
    raise ValueError("a scale is no normal number of binary16 above 0: see storable")


def decode(
    words: NDArray[np.uint8],
    p: Groups,
    t: Tables,
    box: tuple[int, int, int, int],
    dst: Array,
    dtype: str,
    reference: bool = False,
) -> None:
    """Words (h, w) of one tile, contiguous, to elements in `dst` (h, w), words of the data type.

    rac/native/groups.c does the same, bit for bit.

    Raises:
        FormatError: A word has more than `bits` bits.
    """
    r0, r1, c0, c1 = box
    first = c0 // p.group
    of = np.s_[r0:r1, first : -(-c1 // p.group)]
    if not reference:
        zeros = t.zeros if t.zeros.size == 1 else t.zeros[of]
        seen = native.numbers(words, t.scales[of], zeros, p.group, c0 - first * p.group, dst, dtype)
        if seen is not None:
            if seen >> p.bits:
                raise FormatError("a word is larger than groups/1 allows")
            return
    if (words >> np.uint8(p.bits)).any():
        raise FormatError("a word is larger than groups/1 allows")
    cut = np.s_[:, c0 - first * p.group : c1 - first * p.group]
    scale = np.repeat(t.scales[of], p.group, axis=1)[cut]
    zero = t.zeros if t.zeros.size == 1 else np.repeat(t.zeros[of], p.group, axis=1)[cut]
    dst[...] = to_words((words.astype(np.float32) - zero.astype(np.float32)) * scale, dtype)
