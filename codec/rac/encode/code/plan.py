"""How a tensor is cut into tiles and stored: levels of effort, the plan of a tensor, and what the coders look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.encode.encoded import Bytes
from rac.grid import Grid, matrix
from rac.registry import DTYPES
from rac.stages.base import Coder

Array = NDArray[Any]
Source = Callable[[Grid, int, int], Array]  # words (h, C) of the rows [start, stop) of the matrix

CUTS = {
    "fine": ((1, 74_000), (2, 178_000), (4, 578_000), (8, 1 << 62)),
    "coarse": ((1, 1_150_000), (2, 2_700_000), (4, 8_800_000), (8, 1 << 62)),
}
"""Kinds of slices: tiles along each side up to which stored size. An eighth of the rows or columns then costs no more
than 1.1 times its share of the stored bytes and 64 KB, or 1 MB. Rows may be exchanged, as tests of small tensors do."""
SLICES = tuple(CUTS)
PART = 1 << 16
"""Words of an expert from which on its tiles are its own: smaller ones are read with their neighbours, in 64 KB."""
CHUNK = 1 << 22
HELD = 1 << 25  # bytes of a tensor that is read once and held until it is coded; a larger one is read again, in chunks
LARGE = 1 << 28  # bytes of a tensor from which on nothing of it is held, neither its symbols nor its coded tiles
SAMPLE = {1: 1 << 17, 2: 1 << 15}  # per elements per symbol: bytes that general compressors are tried on


@dataclass(frozen=True, slots=True)
class Level:
    """What an effort level tries. It changes sizes and time, never the result of decoding."""

    name: str
    lanes: int
    per: int
    row_classes: int
    col_classes: int
    rounds: int
    zstd: int
    planes: int
    again: bool = False
    fewer_bits: int = 0
    fixed: bool = False  # take `lanes` as it is, however small the tile
    tile: int = 1 << 20  # words of a tile at most
    whole: int = 0  # words of a matrix up to which it is not cut for `tile`
    tall: int = 0  # rows of a tile at most, so that it is cut between columns for `tile`; 0: between rows
    coarse: bool = False  # cut into coarse tiles
    plain: int = 0  # bytes of a tensor up to which its words are stored as they are
    strip: int = 0  # words of a tile, about, that spans whole rows; 0: tiles are cut along both sides
    density: float = 0.0  # stored bytes of a word, about, by which tiles are cut; 0: as its type has them
    part: int = 0  # rows of a matrix that are read by themselves: no tile has rows of two of them; 0: any rows


LEVELS = {
    "fast": replace(
        Level("fast", 32, per=2, row_classes=1, col_classes=1, rounds=0, zstd=3, planes=1),
        plain=1 << 13,
        strip=1 << 18,
    ),
    "default": Level("default", 32, per=2, row_classes=8, col_classes=6, rounds=2, zstd=9, planes=1),
    "max": replace(
        Level("max", 16, per=1, row_classes=16, col_classes=8, rounds=5, zstd=19, planes=9),
        again=True,
        fewer_bits=2,
        coarse=True,
    ),
}
"""Effort levels by name. `max` is for size alone: fine tiles cost 0.1 %, so that they must be asked for. `fast` is for
speed: words of a strip are written one after the other, and there are few tiles; a slice of columns reads all."""

CODER = replace(LEVELS["default"], per=1, tile=1 << 19, whole=1 << 20, tall=2048, coarse=True, density=0.5)
"""How the integers of quantised tensors are coded. In smaller tiles than what is lossless, since a GPU steps once for
each of them, not for two, and needs as many lanes at once as it can get (docs/gpu.md). But coarse, tall, and one for a
small matrix: in each tile the trellis begins anew in every column, and each has lanes and lists of its own, which costs
up to 0.02 bit of small matrices (docs/lossy.md)."""


def tuned(level: Level, lanes: int | None, slices: str | None) -> Level:
    """A level with the lanes per tile and the tiles that were asked for; where only lanes are, tiles are coarse.

    Strips, and small tensors as they are, are for files that are read whole: not where slices were asked for.
    """
    if lanes is not None:
        level = replace(level, lanes=lanes, fixed=True, coarse=True)
    if slices is not None:
        level = replace(level, coarse=slices == "coarse", strip=0, plain=0)
    return level


@dataclass(frozen=True, slots=True)
class Plan:
    """How one tensor is stored."""

    coder: Coder
    grid: Grid
    axis: int
    digest: bytes  # XXH3-128 of the words
    front: bytes = b""  # the unit in front of the tiles; empty where the coder has none

    @property
    def fronts(self) -> list[Bytes]:
        """The units in front of the tiles."""
        return [] if self.coder.front is None else [self.front]


class Encoder(Protocol):
    """Codes the tiles of one tensor under its plan."""

    plan: Plan
    words: Array | None  # (R, C) words of a small tensor, which need not be read again

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """An encoder for a tensor and the bytes that it would take, about; None where that is no gain over `best`."""

    def encode(self, words: Array, rows: range) -> list[Bytes]:
        """The units of rows of tiles whose words (h, C) are given."""


def axis_of(shape: tuple[int, ...]) -> int:
    """Dimensions that count as rows: all but the last, or the first alone where the last ones are short."""
    return 1 if len(shape) > 1 and shape[-1] < 64 else max(0, len(shape) - 1)


def parted(level: Level, shape: tuple[int, ...]) -> Level:
    """A level for a tensor that holds the matrices of all experts: the tiles of each are its own, side by side."""
    stacked = len(shape) == 3 and shape[0] > 1 and axis_of(shape) == 2
    return replace(level, part=shape[1]) if stacked and shape[1] * shape[2] >= PART else level


def _within(tr: int, part: int) -> int:
    """Rows of tiles, about `tr` of them, so that each `part` rows are whole tiles where that can be."""
    if not part:
        return tr
    n = -(-part // tr)
    return part // next((k for k in range(n, 2 * n) if part % k == 0), n)


def _even(n: int, most: int) -> int:
    """The size of equal pieces of `n`, of `most` at most: a slice ends where tiles do."""
    return max(1, -(-n // max(1, -(-n // max(1, most)))))


def grid_of(dtype: str, shape: tuple[int, ...], axis: int, level: Level) -> Grid:
    """Tiles as large as slices and the level allow: long lanes are small and fast."""
    rows, cols = matrix(dtype, shape, axis)
    d = DTYPES[dtype]
    if level.strip:
        tc = _even(cols, level.strip)
        return Grid(rows, cols, d.word, _within(_even(rows, level.strip // tc), level.part), tc)
    share = (0.7 if d.word == 2 else 0.85) if d.signed_float else 1
    stored = rows * cols * (level.density or d.word * share)
    parts = next(n for n, most in CUTS["coarse" if level.coarse else "fine"] if stored <= most)
    most = max(level.tile, level.whole if rows * cols <= level.whole else 0)
    tc = max(1, -(-cols // parts) if cols >= 128 else cols)
    tr = max(1, -(-rows // parts))
    if level.tall and tr * tc > most:
        tr = _within(_even(tr, level.tall), level.part)
        return Grid(rows, cols, d.word, tr, _even(tc, most // tr))
    tc = _even(tc, most)
    return Grid(rows, cols, d.word, _within(_even(tr, most // tc), level.part), tc)


def chunks(grid: Grid) -> Iterator[tuple[int, int]]:
    """Row ranges of about 4 MiB, or all rows of a tensor that is held."""
    row = max(1, grid.cols * grid.word)
    step = grid.rows if grid.rows * row <= HELD else max(1, CHUNK // row)
    for a in range(0, grid.rows, step):
        yield a, min(grid.rows, a + step)


class View:
    """A tensor as coders look at it: read once or a few times, some MiB at a time."""

    words: Array | None = None  # all of a small tensor, (R, C); None of a larger one
    union = 0  # the OR of all words

    def __init__(self, source: Source, dtype: str, shape: tuple[int, ...], level: Level) -> None:
        self.dtype, self.axis = dtype, axis_of(shape)
        self.level = level = parted(level, shape)
        self.grid = grid = grid_of(dtype, shape, self.axis, level)
        self._source = source
        self.total = grid.rows * grid.cols  # words
        self.size = self.total * grid.word  # their bytes
        self.mask = (1 << (8 * grid.word - DTYPES[dtype].signed_float)) - 1  # bits of a word without its sign
        self.least_base = max(self.mask.bit_length() - 16, 0)  # lowest bit that `hist` could count
        # lowest bit that it counts: pairs of exponents need no more; their histogram is small and counted fast
        self.base = max(MANTISSA.get(dtype, 0) if level.per == 2 else 0, self.least_base)
        self.hist = self._counters()
        digest = zstd.Digest()
        if self.total:
            for a, b in chunks(grid):
                words = self.read(a, b)
                digest.update(words.data.cast("B"))
                self._scan(words)
                if b - a == grid.rows:
                    self.words = words
        self.digest = digest.value()  # XXH3-128 of all words
        self.sample = self._sample(SAMPLE[level.per]) if self.total else np.empty((1, 0), f"<u{grid.word}")
        """(1, n) words: all of a small tensor, or rows of eight places of a large one."""

    def read(self, a: int, b: int) -> Array:
        """Words (b - a, C) of rows a..b - 1."""
        return self._source(self.grid, a, b) if self.words is None else self.words[a:b]

    def count_all(self) -> None:
        """Count as many bits of the words as `hist` can hold."""
        if self.base > self.least_base:
            self.base = self.least_base
            self.hist = self._counters()
            for a, b in chunks(self.grid):
                self._scan(self.read(a, b))

    def _scan(self, words: Array) -> None:
        """Count, and take into the union; a kernel counts in 32 bits."""
        if self.total < 1 << 32:
            self.union |= native.scan(words, self.mask, self.base, self.hist)
        else:
            some = np.zeros(len(self.hist), np.uint32)
            self.union |= native.scan(words, self.mask, self.base, some)
            self.hist = self.hist + some.astype(np.int64)

    def _counters(self) -> Array:
        """Of the bits of a word from `base` on, without its sign."""
        return np.zeros((self.mask >> self.base) + 1, np.uint32)

    def plan(self, coder: Coder, front: bytes = b"") -> Plan:
        """The plan to store the tensor by a coder."""
        return Plan(coder, self.grid, self.axis, self.digest, front)

    def scaled(self, size: int) -> int:
        """Bytes of the whole tensor where the sample takes `size`."""
        return size * self.total // self.sample.size

    def _sample(self, size: int) -> Array:
        """About `size` bytes."""
        grid = self.grid
        if self.size <= 1 << 17:
            return self.read(0, grid.rows).reshape(1, -1)
        rows = max(1, size // 8 // max(1, grid.cols * grid.word))
        last = max(0, grid.rows - rows)
        at = sorted({*(int(k * (last / 7)) for k in range(7)), last})
        parts = [self.read(a, min(grid.rows, a + rows))[:, : size // 8 // grid.word].reshape(-1) for a in at]
        return np.concatenate(parts).reshape(1, -1)


MANTISSA = {"F64": 52, "F32": 23, "C64": 23, "BF16": 7, "F16": 10}  # bits of the mantissa
