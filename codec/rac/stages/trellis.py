"""Sign-symmetric trellis: small integers and scales to numbers (format_spec/stages/trellis.md)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from rac.errors import FormatError
from rac.grid import Box
from rac.native import address
from rac.native import trellis as native
from rac.native.prototypes import F32, Array
from rac.stages.base import Context, Head, Integers, Numbers, OpenNumbers, check, pack_lists, sizes_of, unpack_list
from rac.stages.words import DTYPES, from_words, to_words

CODES = {1: (0, 0), 4: (2, 1), 8: (5, 2), 16: (9, 2), 32: (18, 4), 64: (33, 10), 128: (78, 43), 256: (166, 121)}
CODES |= {512: (447, 231), 1024: (663, 441)}
"""States to (H0, H1)."""
DEAD, MOST = -128, 60
_QUARTERS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)


def power(e: Array) -> F32:
    """2**(e / 4) of int8 exponents, the binary32 numbers of section 3."""
    e = e.astype(np.int32)
    out: F32 = np.ldexp(_QUARTERS[e & 3], e >> 2)
    return out


@dataclass(frozen=True, slots=True)
class Trellis(Numbers):
    """trellis/1: words to numbers by a trellis of `states` states, scales of rows and columns, and outliers."""

    id: ClassVar[str] = "trellis/1"
    sections: ClassVar[tuple[str, ...]] = ("corrections", "rows", "columns", "outliers", "gains")
    states: int
    zero: int  # the word that stands for 0
    low: int  # first of the words that have corrections
    scale: int  # bits of the binary32 unit of all columns
    sizes: tuple[int, int, int, int]  # bytes of the first four sections of the unit
    gains: int = 0  # bytes of the fifth; 0: there is none

    @property
    def section_sizes(self) -> tuple[int, ...]:
        """Bytes of each section."""
        return *self.sizes, self.gains

    def to_head(self) -> Head:
        """The stage map, without the key of gains where there are none."""
        head = super(Trellis, self).to_head()
        return head if self.gains else {k: v for k, v in head.items() if k != "gains"}

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """The stage of a stage map (stages/trellis.md, section 1); FormatError or UnsupportedError."""
        ranges = {"states": (1, 1024), "zero": (0, 255), "low": (0, 255), "scale": (0x21800000, 0x5D800000)}
        ranges |= {"gains": (1, 1 << 40)} if "gains" in head else {}
        check(head, ranges, "trellis", {"sizes"})
        if head["states"] not in CODES:
            raise FormatError("trellis parameter states is out of range")
        sizes = sizes_of(head, 4, "trellis")
        if context.dtype not in DTYPES:
            raise FormatError(f"trellis numbers cannot be {context.dtype}")
        if head["low"] + sizes[0] > 256:
            raise FormatError("trellis corrections leave the range of words")
        return cls(**{key: head[key] for key in ranges}, sizes=sizes)

    def open(self, unit: bytes, context: Context) -> OpenTrellis:
        """Parse the unit (stages/trellis.md, section 2); FormatError where it breaks the format."""
        return OpenTrellis(self, context.dtype, _lists(unit, self, context))

    def details(self, dtype: str) -> Mapping[str, Any]:
        """Number of states, of outliers and of corrections."""
        outliers = self.sizes[3] // (8 + DTYPES[dtype].itemsize)
        return {"states": self.states, "outliers": outliers, "corrections": self.sizes[0]}


@functools.lru_cache(16)
def magnitudes(states: int, zero: int) -> F32:
    """(256,) magnitude of each word without corrections. Not to be written to."""
    k = np.arange(256, dtype=np.float32) - np.float32(zero)
    return 2 * k + np.float32(0.5) if states > 1 else k


class Lists(NamedTuple):
    """What the unit of trellis/1 holds."""

    rec: F32  # (256,) magnitude of each word
    rows: F32  # (R,) scale of each row, its gain among it: B(y)
    cols: F32  # (C,) scale of each column, A(x)
    places: NDArray[np.int64]  # (N, 2) row and column of each outlier, ascending
    values: Array  # (N,) words of the data type: the outliers


class OpenTrellis(OpenNumbers):
    """The unit of a tensor under trellis/1, ready for use: the parameters `p`, the data type, and `Lists`."""

    def __init__(self, p: Trellis, dtype: str, lists: Lists) -> None:
        self.p, self.dtype = p, dtype
        self.rec, self.rows, self.cols, self.places, self.values = lists
        self._alive: list[Any] = []  # each that two threads made at once, since jobs have its address

    def integers(self) -> Integers | None:
        """Twice a magnitude is an integer, unless the file corrects it."""
        if self.p.sizes[0]:
            return None
        rows, cols = (np.ones(len(scales), np.float32) for scales in (self.rows, self.cols))
        halves = OpenTrellis(self.p, "F32", Lists(self.rec, rows, cols, self.places[:0], np.empty(0, np.uint32)))
        return Integers(halves, self.rows, self.cols * np.float32(0.5), self.places, self.values)

    @functools.cached_property
    def _words(self) -> Any:
        """What the words stand for, for the CPU kernel alone: made when it first asks."""
        words = native.dequant(self.rec, CODES[self.p.states], self.p.zero, self.dtype)
        self._alive.append(words)
        return words

    @functools.cached_property
    def fused(self) -> Any:
        """Addresses of the scales of rows and columns, and of what the words stand for, for the CPU kernel."""
        words = self._words
        return words and (address(self.rows), address(self.cols), ctypes.addressof(words))

    @property
    def patches(self) -> bool:
        """Whether there are outliers."""
        return len(self.places) > 0

    def decode(self, words: NDArray[np.uint8], box: Box, dst: Array) -> None:
        """Words (h, w) of one tile, contiguous, to elements in `dst` (h, w), words of the data type."""
        r0, r1, c0, c1 = box
        rows, cols = self.rows[r0:r1], self.cols[c0:c1]
        if self._words:
            native.decode(words, self._words, cols, rows, dst)
        else:
            self._decode(words, cols, rows, dst)
        self.patch(box, dst)

    def _decode(self, words: NDArray[np.uint8], cols: F32, rows: F32, dst: Array) -> None:
        """The reference (stages/trellis.md, section 4), all columns of a row at once."""
        h0, h1 = (np.uint16(h) for h in CODES[self.p.states])
        state: Array = np.zeros(len(cols), np.uint16)
        for y, scale in enumerate(rows):
            v = self.rec[words[y]]
            dst[y] = to_words(np.where(state & 1, -v, v) * cols * scale, self.dtype)
            odd = (words[y] ^ np.uint8(self.p.zero & 1)) & 1
            state = (state >> 1) ^ np.where(state & 1, h0, np.uint16(0)) ^ np.where(odd, h1, np.uint16(0))

    def patch(self, box: Box, dst: Array) -> None:
        """The outliers of one tile to their places in `dst` (h, w), words of the data type."""
        r0, r1, c0, c1 = box
        a, b = np.searchsorted(self.places[:, 0], (r0, r1))
        for (y, x), value in zip(self.places[a:b].tolist(), self.values[a:b], strict=True):
            if c0 <= x < c1:
                dst[y - r0, x - c0] = value


def _lists(unit: bytes, p: Trellis, context: Context) -> Lists:
    """What the unit of a tensor holds; FormatError where it breaks the format."""
    rows, cols = context.rows, context.cols
    if len(unit) != p.front:
        raise FormatError("trellis unit does not have the size of its sections")
    a, b, c, d = np.cumsum(p.sizes).tolist()
    rec = magnitudes(p.states, p.zero).copy()
    rec[p.low : p.low + p.sizes[0]] += np.frombuffer(unit[:a], np.int8).astype(np.float32) / np.float32(64)
    by_row, by_col = (unpack_list(*of).view(np.int8) for of in ((unit[a:b], rows), (unit[b:c], cols)))
    if max(np.abs(v.astype(np.int16)).max(initial=0) for v in (by_row, by_col[by_col != DEAD])) > MOST:
        raise FormatError("trellis scale is out of range")
    col = np.array(p.scale, np.uint32).view(np.float32) * power(by_col)
    col[by_col == DEAD] = 0
    kind = _outliers(DTYPES[context.dtype].itemsize)
    if p.sizes[3] % kind.itemsize:
        raise FormatError("trellis outliers are malformed")
    found = np.frombuffer(unit[c:d], kind)
    places = np.stack([found["row"], found["col"]], axis=1).astype(np.int64)
    flat = places[:, 0] * cols + places[:, 1]
    if (places >= (rows, cols)).any() or (np.diff(flat) <= 0).any():
        raise FormatError("trellis outliers are not in order or outside the tensor")
    row = power(by_row)
    if p.gains:
        row *= gain(unpack_list(unit[d:], rows).view(np.int8))
    return Lists(rec, row, col, places, found["value"].copy())


def gain(g: Array) -> F32:
    """1 + g / 256 of int8 entries, exact: G of section 3."""
    return np.float32(1) + g.astype(np.float32) / np.float32(256)


def with_gains(p: Trellis, unit: bytes, gains: NDArray[np.int8], dtype: str) -> tuple[Trellis, bytes]:
    """(stage, unit) with gains (R,) of rows, by which outliers are multiplied too, of those without gains."""
    at = sum(p.sizes[:3])
    found = np.frombuffer(unit[at : sum(p.sizes)], _outliers(DTYPES[dtype].itemsize)).copy()
    found["value"] = to_words(from_words(found["value"], dtype) * gain(gains[found["row"]]), dtype)
    more = pack_lists((gains,))[0]
    return replace(p, gains=len(more)), unit[:at] + found.tobytes() + more


def build_unit(
    corrections: NDArray[np.int8],
    rows: NDArray[np.int8],
    cols: NDArray[np.int8],
    places: NDArray[np.int64],
    values: Array,
) -> tuple[tuple[int, int, int, int], bytes]:
    """(sizes, unit) of exponents (R,) and (C,). Outliers at `places` (N, 2), ascending, are `values` (N,), words."""
    outliers = np.zeros(len(places), _outliers(values.itemsize))
    outliers["row"], outliers["col"], outliers["value"] = *places.T, values
    a, b, c, d = corrections.tobytes(), *pack_lists((rows, cols)), outliers.tobytes()
    return (len(a), len(b), len(c), len(d)), a + b + c + d


def _outliers(word: int) -> np.dtype[Any]:
    return np.dtype([("row", "<u4"), ("col", "<u4"), ("value", f"<u{word}")])
