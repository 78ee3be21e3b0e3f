"""Lossless bit planes: a word is a coded top (exponent and first mantissa bits) and raw low bits with the sign.

format_spec/stages/lanes.md is the normative text; the names here are its names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import FormatError, UnsupportedError
from rac.registry import DTYPES

Array = NDArray[Any]
MAX_LANES = 1024
KEYS = {
    "cols",
    "escapes",
    "id",
    "lanes",
    "order",
    "packed",
    "per",
    "rows",
    "runs",
    "shift",
    "sign",
    "sizes",
    "tables",
    "zero",
}
MAX_BASE = 16
"""Base symbols that pairs may be made of."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor seen as a matrix of words, R x C, cut into tiles of tr x tc (the last ones may be smaller)."""

    rows: int
    cols: int
    word: int
    tr: int
    tc: int

    @property
    def down(self) -> int:
        """Tiles from top to bottom."""
        return -(-self.rows // self.tr) if self.rows * self.cols else 0

    @property
    def across(self) -> int:
        """Tiles from left to right."""
        return -(-self.cols // self.tc) if self.rows * self.cols else 0

    def box(self, i: int) -> tuple[int, int, int, int]:
        """(first row, last row + 1, first column, last column + 1) of tile `i`, tiles row by row."""
        r, c = divmod(i, self.across)
        return (r * self.tr, min(self.rows, (r + 1) * self.tr), c * self.tc, min(self.cols, (c + 1) * self.tc))


@functools.lru_cache(64)
def boxes(grid: Grid) -> list[tuple[int, int, int, int]]:
    """`Grid.box` of every tile."""
    return [grid.box(i) for i in range(grid.down * grid.across)]


def dense_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of the dense tensor; FormatError for an F4 whose last dimension is odd."""
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits % 8 or (dtype == "F4" and (not shape or shape[-1] % 2)):
        raise FormatError("F4 needs an even last dimension")
    return bits // 8


def matrix(dtype: str, shape: Sequence[int], axis: int) -> tuple[int, int]:
    """(R, C) in words: dimensions before `axis` are rows; C64 counts two words and F4 half a word per element."""
    rows, cols = math.prod(shape[:axis]), math.prod(shape[axis:])
    d = DTYPES[dtype]
    if cols * d.bits % (8 * d.word):
        raise FormatError("the axis cuts an F4 tensor inside a byte")
    return rows, cols * d.bits // (8 * d.word)


def is_int(v: Any, low: int, high: int) -> bool:
    """True for an int (not a bool) in low..high."""
    return type(v) is int and low <= v <= high


@functools.cache
def _pairs(base: int, first_escape: int) -> NDArray[np.uint8]:
    both = [(a, b) for b in range(base) for a in range(base)]
    both.sort(key=lambda ab: max(ab) >= first_escape)  # stable
    return np.array(both, np.uint8)


@functools.cache
def _singles(base: int) -> NDArray[np.uint8]:
    return np.arange(base, dtype=np.uint8)[:, None]


@functools.lru_cache(64)
def _values(runs: tuple[int, ...]) -> NDArray[np.uint16]:
    out = np.zeros(256, np.uint16)
    at = 0
    for start, n in zip(runs[::2], runs[1::2], strict=True):
        out[at : at + n] = np.arange(start, start + n)
        at += n
    return out


@functools.lru_cache(64)
def _bases(escapes: tuple[int, ...]) -> NDArray[np.uint32]:
    out = np.zeros(256, np.uint32)
    out[: len(escapes)] = escapes
    return out


@functools.lru_cache(64)
def _codes(base: int, first_escape: int, per: int) -> NDArray[np.uint8]:
    if per == 1:
        return np.arange(base, dtype=np.uint8)
    both = _pairs(base, first_escape)
    return np.ascontiguousarray(both[:, 0] | both[:, 1] << np.uint8(4))


@dataclass(frozen=True, slots=True)
class Lanes:
    """Parameters of lanes/1 as they stand in the stage map of a record head."""

    lanes: int
    per: int
    zero: int
    sign: bool
    shift: int
    runs: tuple[int, ...]
    escapes: tuple[int, ...]
    tables: int
    order: int
    rows: int
    cols: int
    sizes: tuple[int, ...]
    packed: bool = False

    @property
    def directory(self) -> int:
        """Bytes of a tile's directory, without padding."""
        return 4 + self.skip + 2 * self.lanes

    @property
    def skip(self) -> int:
        """Bytes of the stored sizes of the planes in it."""
        return 4 * self.raw.bit_count() if self.packed else 0

    @property
    def raw(self) -> int:
        """Raw bits per word."""
        return self.shift + self.sign

    @property
    def first_escape(self) -> int:
        """Symbols from this one on are escapes."""
        return sum(self.runs[1::2], 0)

    @property
    def base(self) -> int:
        """Size of the base alphabet: what one element can be."""
        return self.first_escape + len(self.escapes)

    @property
    def symbols(self) -> int:
        """Size of the coded alphabet: base symbols, or pairs of them."""
        return self.base * (self.base if self.per == 2 else 1)

    @property
    def first_escaping(self) -> int:
        """Coded symbols from this one on hold an escape."""
        return self.first_escape * (self.first_escape if self.per == 2 else 1)

    def pairs(self) -> NDArray[np.uint8]:
        """(symbols, per) base symbols of each coded symbol: those without an escape come first."""
        return _pairs(self.base, self.first_escape) if self.per == 2 else _singles(self.base)

    def bases(self) -> NDArray[np.uint32]:
        """(256,) base of each escape. Not to be written to."""
        return _bases(self.escapes)

    def codes(self) -> NDArray[np.uint8]:
        """(symbols,) a coded symbol as its base symbol, or as a | b << 4 for a pair. Not to be written to."""
        return _codes(self.base, self.first_escape, self.per)

    def steps(self, elements: Array | int) -> Array:
        """Coded symbols of a segment of so many elements."""
        out: Array = -(-np.asarray(elements) // self.per)
        return out

    def values(self) -> NDArray[np.uint16]:
        """(256,) top of each base symbol; 0 for escapes and unused entries. Not to be written to."""
        return _values(self.runs)

    def planes(self) -> list[tuple[int, int]]:
        """(bits, position of its lowest bit) of each raw plane, largest first."""
        out, low = [], 0
        for b in (32, 16, 8, 4, 2, 1):
            if self.raw & b:
                out.append((b, low))
                low += b
        return out

    def to_head(self) -> dict[str, Any]:
        """The stage map."""
        return {
            "id": "lanes/1",
            "lanes": self.lanes,
            "packed": int(self.packed),
            "per": self.per,
            "zero": self.zero,
            "sign": int(self.sign),
            "shift": self.shift,
            "runs": list(self.runs),
            "escapes": list(self.escapes),
            "tables": self.tables,
            "order": self.order,
            "rows": self.rows,
            "cols": self.cols,
            "sizes": list(self.sizes),
        }

    @classmethod
    def from_head(cls, head: dict[str, Any], word: int) -> Lanes:
        """Check every field (stages/lanes.md, "Parameters"); `word` is the bytes of a word."""
        if KEYS - head.keys():
            raise FormatError("lanes parameters are incomplete")
        if head.keys() - KEYS:
            raise UnsupportedError(f"unknown lanes parameters: {', '.join(sorted(head.keys() - KEYS))}")
        bits = 8 * word
        small = {
            "lanes": (1, MAX_LANES),
            "packed": (0, 1),
            "per": (1, 2),
            "zero": (0, bits - 1),
            "sign": (0, 1),
            "shift": (0, bits - 1),
            "tables": (1, 256),
            "order": (-8, 8),
            "rows": (1, 256),
            "cols": (1, 256),
        }
        for key, (low, high) in small.items():
            if not is_int(head[key], low, high):
                raise FormatError(f"lanes parameter {key} is out of range")
        top = bits - head["zero"] - head["sign"] - head["shift"]
        if not 1 <= top <= 64:
            raise FormatError("lanes parameters leave no top bits")
        limit = 1 << min(top, 16)
        runs, escapes, sizes = head["runs"], head["escapes"], head["sizes"]
        if not all(isinstance(v, list) for v in (runs, escapes, sizes)) or len(sizes) != 3 or len(runs) % 2:
            raise FormatError("lanes parameter lists are malformed")
        end = 0
        for start, n in zip(runs[::2], runs[1::2], strict=True):
            if not is_int(start, end, limit - 1) or not is_int(n, 1, 256) or start + n > limit:
                raise FormatError("symbol runs overlap or leave the range of tops")
            end = start + n
        if any(not is_int(v, 0, limit - 1) for v in escapes):
            raise FormatError("escape base is out of range")
        most = 256 if head["per"] == 1 else MAX_BASE
        if not 2 <= sum(runs[1::2]) + len(escapes) <= most:
            raise FormatError(f"base alphabet must have 2 to {most} symbols")
        if any(not is_int(v, 0, 1 << 40) for v in sizes) or head["rows"] * head["cols"] > 4096:
            raise FormatError("lanes parameters sizes, rows or cols are out of range")
        return cls(
            head["lanes"],
            head["per"],
            head["zero"],
            bool(head["sign"]),
            head["shift"],
            tuple(runs),
            tuple(escapes),
            head["tables"],
            head["order"],
            head["rows"],
            head["cols"],
            tuple(sizes),
            bool(head["packed"]),
        )


def unpack_planes(planes: list[memoryview], n: int, p: Lanes) -> NDArray[np.uint64]:
    """Raw bits (n,) uint64 out of the planes. Padding bits of the last byte must be 0."""
    raw = np.zeros(n, np.uint64)
    for (b, low), data in zip(p.planes(), planes, strict=True):
        if b >= 8:
            v = np.frombuffer(data, f"<u{b // 8}")
        else:
            byte = np.frombuffer(data, np.uint8)
            bits = np.arange(0, 8, b, dtype=np.uint8)
            v = ((byte[:, None] >> bits) & np.uint8((1 << b) - 1)).ravel()
            if v[n:].any():
                raise FormatError("plane ends in non-zero bits")
        raw |= v[:n].astype(np.uint64) << np.uint64(low)
    return raw


def join(tops: Array, raw: NDArray[np.uint64], p: Lanes, word: int) -> Array:
    """Words (n,) of `word` bytes from tops and raw bits."""
    t = np.uint64
    v = tops.astype(t) << t(p.shift) | raw & t((1 << p.shift) - 1)
    if p.sign:
        v |= (raw >> t(p.shift)) << t(8 * word - p.zero - 1)
    return (v << t(p.zero)).astype(f"<u{word}")


def plane_sizes(n: int, p: Lanes) -> list[int]:
    """Bytes of each plane of a tile of `n` elements, without padding."""
    return [-(-n * b // 8) for b, _ in p.planes()]


def up16(n: int) -> int:
    """`n` rounded up to the alignment of sub-streams."""
    return -(-n // 16) * 16


@dataclass(frozen=True, slots=True)
class Tile:
    """Sub-streams of one tile unit, views into it (stages/lanes.md, "Tile"); `words` in the order of reading."""

    counts: NDArray[np.uint16]
    words: NDArray[np.uint32]
    escapes: NDArray[np.uint8]
    planes: list[int]
    """Offsets of the raw planes."""


def parse_tile(unit: Array, n: int, p: Lanes) -> Tile:
    """Cut `unit` (bytes,) uint8 of a tile of `n` elements whose planes are plain; FormatError unless all fits."""
    w = up16(p.directory)
    if len(unit) < w:
        raise FormatError("tile is shorter than its directory")
    escapes = int.from_bytes(unit[:4].tobytes(), "little")
    counts = unit[4 + p.skip : p.directory].view("<u2")
    words = int(counts.sum(dtype=np.int64))
    e = w + up16(4 * words)
    at = e + up16(escapes)
    planes = []
    for size in plane_sizes(n, p):
        planes.append(at)
        at += up16(size)
    if at != len(unit):
        raise FormatError("tile streams do not fill the unit exactly")
    ends = [(p.directory, w), (w + 4 * words, e), (e + escapes, planes[0] if planes else at)]
    ends += [(s + size, s + up16(size)) for s, size in zip(planes, plane_sizes(n, p), strict=True)]
    if any(unit[a:b].any() for a, b in ends if a < b):
        raise FormatError("padding is not zero")
    if len(counts) and words:
        first = unit[w : w + 4 * words].view("<u4")
        start = np.minimum(counts, 2).astype(np.int64)
        if (first[(np.cumsum(start) - start)[counts > 0]] == 0).any():
            raise FormatError("ANS lane begins with a zero word")
    return Tile(counts, unit[w : w + 4 * words].view("<u4"), unit[e : e + escapes], planes)


def plain_tile(unit: Array, n: int, p: Lanes, decompress: Callable[[memoryview, int], bytes]) -> Array:
    """`unit` with its compressed planes (frames shorter than the plane) replaced by plain ones."""
    if len(unit) < p.directory:
        raise FormatError("tile is shorter than its directory")
    stored = unit[4 : 4 + p.skip].view("<u4").tolist()
    sizes = plane_sizes(n, p)
    if stored == sizes:
        return unit
    if any(a > b for a, b in zip(stored, sizes, strict=True)):
        raise FormatError("a stored plane is larger than the plane")
    at = len(unit) - sum(map(up16, stored))
    if at < 0:
        raise FormatError("tile streams do not fill the unit exactly")
    out = np.zeros(at + sum(map(up16, sizes)), np.uint8)
    out[:at] = unit[:at]
    to = at
    for a, b in zip(stored, sizes, strict=True):
        data = unit[at : at + a]
        if unit[at + a : at + up16(a)].any():
            raise FormatError("padding is not zero")
        out[to : to + b] = data if a == b else np.frombuffer(decompress(data.data, b), np.uint8)
        at, to = at + up16(a), to + up16(b)
    return out


def build_tile(
    words: Array, counts: Array, escapes: bytes, planes: Sequence[bytes | memoryview], p: Lanes
) -> memoryview:
    """Inverse of `parse_tile`: words in the order of reading, words of each lane, escape bytes, raw planes as stored.

    The copies are numpy's, which makes them outside the interpreter's lock.
    """
    directory = len(escapes).to_bytes(4, "little")
    if p.packed:
        directory += np.array([len(plane) for plane in planes], "<u4").tobytes()
    directory += counts.astype("<u2").tobytes()
    pieces = [np.frombuffer(d, np.uint8) for d in (directory, words.astype("<u4", copy=False), escapes, *planes)]
    out = np.empty(sum(up16(len(piece)) for piece in pieces), np.uint8)
    at = 0
    for piece in pieces:
        end = at + len(piece)
        out[at:end] = piece
        at += up16(len(piece))
        out[end:at] = 0
    return out.data


def tile_parts(directory: bytes, n: int, p: Lanes) -> tuple[int, int, int, int]:
    """Bytes of (directory, words, escapes, raw planes as stored) of a tile of `n` elements, from its first bytes."""
    d = np.frombuffer(directory, np.uint8, p.directory)
    words = 4 * int(d[4 + p.skip :].view("<u2").sum(dtype=np.int64))
    raw = int(d[4 : 4 + p.skip].view("<u4").sum(dtype=np.int64)) if p.packed else sum(plane_sizes(n, p))
    return p.directory, words, int(d[:4].view("<u4")[0]), raw


@dataclass(frozen=True, slots=True)
class Order:
    """Sequence order of one tile: rows and columns sorted by class (stable), then blocks sorted by table."""

    rows: NDArray[np.int32] | None
    cols: NDArray[np.int32] | None
    blocks: NDArray[np.int64]
    """(B, 5): table, first and last + 1 place in `rows`, the same in `cols`."""
    sizes: NDArray[np.int64]
    """(S,) elements of each segment: all blocks of one table."""
    segments: NDArray[np.int64]
    """(S, 2): coded symbols, table."""


def order(
    p: Lanes,
    row_class: NDArray[np.uint8] | None,
    col_class: NDArray[np.uint8] | None,
    h: int,
    w: int,
    table: Array,
) -> Order:
    """Order of a tile of h x w; classes of its rows and columns (None: all 0), `table` (Kr, Kc) uint8."""
    rows, re = _sorted(row_class, h, table.shape[0])
    cols, ce = _sorted(col_class, w, table.shape[1])
    i, j = np.flatnonzero(np.diff(re)), np.flatnonzero(np.diff(ce))  # no tile is charged for classes that it lacks
    tables = table[np.ix_(i, j)]
    at = np.unravel_index(np.argsort(tables, axis=None, kind="stable"), tables.shape)
    i, j = i[at[0]], j[at[1]]
    blocks = np.stack([tables[at].astype(np.int64), re[i], re[i + 1], ce[j], ce[j + 1]], axis=1)
    n = (blocks[:, 2] - blocks[:, 1]) * (blocks[:, 4] - blocks[:, 3])
    sizes = np.bincount(blocks[:, 0], n, p.tables).astype(np.int64)  # exact: counts below 2**53
    used = np.flatnonzero(sizes)
    return Order(rows, cols, blocks, sizes[used], np.stack([p.steps(sizes[used]), used], axis=1))


def lane_steps(segments: NDArray[np.int64], lane: int, lanes: int) -> NDArray[np.int64]:
    """Symbols of this lane per segment of (symbols, table): symbol i of a segment belongs to lane i mod L."""
    out: NDArray[np.int64] = np.maximum(0, -(-(segments[:, 0] - lane) // lanes))
    return out


def lane_steps_all(segments: NDArray[np.int64], lanes: int) -> NDArray[np.int64]:
    """(L, S) of `lane_steps`."""
    out: NDArray[np.int64] = np.maximum(0, -(-(segments[:, 0] - np.arange(lanes)[:, None]) // lanes))
    return out


def _sorted(classes: NDArray[np.uint8] | None, n: int, k: int) -> tuple[NDArray[np.int32] | None, NDArray[np.int64]]:
    if classes is None or k == 1:
        return None, np.array([0, n], np.int64)
    ends = np.concatenate([[0], np.cumsum(np.bincount(classes, minlength=k))])
    return np.argsort(classes, kind="stable").astype(np.int32), ends
