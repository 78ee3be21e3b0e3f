"""Launches of GPU kernels, the memory that they work on, laid out in numpy, and what a stage is for a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rac.decoder import Decoder
from rac.errors import LimitError
from rac.gpu.specs import KERNELS, Jobs
from rac.grid import Box, up16
from rac.native.prototypes import Array

T = TypeVar("T")
GRID = 65535  # programs along the second axis of a grid
PLACE_ROWS, PLACE_COLS = 64, 256  # words of a program of the kernel `place`
WIDE = 1 << 21
WIDE_COLS = 1024  # columns of a program in tiles of more than WIDE columns
DEEP = 4  # rows that kernels read at once


class Call(NamedTuple):
    """One launch: its kernel, the options that this is compiled for, the memories it reads codes from and writes to."""

    kernel: str
    options: tuple[tuple[str, Any], ...]
    source: str = ""
    out: str = "out"


def call(kernel: str, source: str = "", out: str = "out", /, **options: Any) -> Call:
    """A launch of a kernel that is compiled for these options."""
    return Call(kernel, tuple(options.items()), source, out)


class Launch(NamedTuple):
    """A call, where in `aux` its jobs are, their bytes, and its grid."""

    call: Call
    jobs: int
    size: int
    grid: tuple[int, int]


class Place(NamedTuple):
    """Where words go: a memory, the offset of the first in it, and words from row to row."""

    memory: str
    at: int
    stride: int


def power_of_two(n: int) -> int:
    """`n` rounded up to a power of two."""
    return 1 << max(0, n - 1).bit_length()


def padded(a: Array, many: int) -> Array:
    """Elements (n,) with zeros behind them up to a multiple of `many`."""
    return np.append(a, np.zeros(-len(a) % many, a.dtype))


def across(cols: int, w: int) -> int:
    """Columns of a program, `cols` but for very wide tiles, since a grid has at most GRID programs that way."""
    return cols if w <= WIDE else WIDE_COLS


def columns(ranks: Array) -> NDArray[np.uint32]:
    """Ranks of the columns of a tile, and their classes in the highest byte, as the kernel `place` reads them."""
    return padded(ranks.astype(np.uint32), across(PLACE_COLS, len(ranks)))


def steps(h: int, w: int, rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the jobs of h x w elements, as many as a grid takes in programs of rows x cols."""
    step = max(1, GRID // -(-w // cols)) * rows
    for y in range(0, h, step):
        yield y, min(step, h - y)


class Batch:
    """Tiles of one or more tensors whose kernels are launched together: their memory, and their jobs."""

    def __init__(self, buffer: Array | None = None) -> None:
        """`buffer` (bytes,) uint8 takes `aux` as long as it is large enough."""
        self.buffer = np.empty(1 << 16, np.uint8) if buffer is None else buffer
        self.aux = 0
        self.work = 0
        self.status: list[tuple[Decoder, int]] = []  # tensor and tile of each place in the status array
        self._jobs: dict[Call, list[Jobs]] = defaultdict(list)
        self._made: dict[tuple[Any, ...], Any] = {}

    def put(self, a: Array) -> int:
        """Offset in `aux` of an array."""
        start, end = self.aux, self.aux + a.nbytes
        if end > len(self.buffer):
            more = np.empty(max(end, 2 * len(self.buffer)), np.uint8)
            more[:start] = self.buffer[:start]
            self.buffer = more
        self.buffer[start:end] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        self.aux = up16(end)
        return start

    def room(self, size: int) -> int:
        """Offset in `work` of so many bytes."""
        start = self.work
        self.work = up16(start + size)
        return start

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` returns, called once per batch and key."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def plain_map(self, h: int, w: int) -> tuple[int, int]:
        """Offsets of the rows and columns of places of a tile in row-major order."""

        def make() -> tuple[int, int]:
            return self.put(padded(np.arange(h, dtype=np.uint32) * np.uint32(w), DEEP)), self.put(columns(np.arange(w)))

        return self.once(("places", h, w), make)

    def add(self, call: Call, **fields: Any) -> None:
        """A job of a kernel, all of whose fields are given; or as many jobs as the arrays of all fields have."""
        dtype = KERNELS[call.kernel].job
        names = dtype.names or ()
        if fields.keys() != set(names):
            raise TypeError(f"the fields of a job of {call.kernel} are {', '.join(names)}")
        jobs = np.empty(np.shape(fields[names[0]]) or 1, dtype)
        for name, value in fields.items():
            jobs[name] = value
        self._jobs[call].append(jobs)

    def seal(self) -> list[Launch]:
        """What is to be launched, in this order; ends the batch."""
        out, order = [], list(KERNELS)
        for call in sorted(self._jobs, key=lambda c: (order.index(c.kernel), repr(c))):
            spec, options = KERNELS[call.kernel], dict(call.options)
            jobs = np.concatenate(self._jobs[call])
            if spec.longest:
                jobs = jobs[np.argsort(-jobs[spec.longest], kind="stable")]
            jobs = np.append(jobs, jobs[-1:].repeat(-len(jobs) % spec.whole(options)))
            grid = spec.grid(jobs, options)
            if grid[1] > GRID:
                raise LimitError(f"{grid[1]} parts of a tile are more than a GPU takes")
            out.append(Launch(call, self.put(jobs), jobs.nbytes, grid))
        return out


class Tile(NamedTuple):
    """A tile of a batch, its unit checked against its checksum and without Zstandard frames."""

    batch: Batch
    dec: Decoder
    box: Box
    unit: Array
    at: int  # offset of the unit in `units`, a multiple of 16
    status: int  # place of the tile in the status array

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        r0, r1, c0, c1 = self.box
        return r1 - r0, c1 - c0


class Codes(NamedTuple):
    """Words of one byte, or codes of them, that a coder leaves for numbers."""

    source: str  # the memory that holds them
    at: int
    places: tuple[int, int] | None = None
    """Offsets of rows and columns of places, see `kernels/place.py`; None: row by row."""
    words: Array | None = None  # (256,) the word of each code; None: the codes are the words


class CoderLayout(Protocol):
    """Lays out the jobs that restore the words of a tile; `opened` is the coder of its tensor, `Decoder.coder`."""

    def words(self, opened: Any, tile: Tile, to: Place) -> None:
        """Words of the bytes that the record states, in their places; FormatError where the unit breaks the format."""

    def codes(self, opened: Any, tile: Tile, anywhere: bool) -> Codes:
        """Words of one byte for numbers; `anywhere`: as codes, in whichever order the coder has them."""


class NumbersLayout(Protocol):
    """Lays out the jobs that make numbers of words; `opened` is `Decoder.numbers`."""

    anywhere: bool  # whether it takes codes that are not words, and not in the order of rows

    def lay(self, opened: Any, tile: Tile, codes: Codes, to: Place) -> None:
        """Numbers of the data type that the stage was opened with, in their places."""


class Rows(NamedTuple):
    """Whole rows of a tensor whose numbers are there, C from row to row."""

    batch: Batch
    dec: Decoder
    box: Box
    numbers: int  # their offset in `work`, float32


def by_row(coder: CoderLayout, opened: Any, tile: Tile) -> Codes:
    """The words of a tile in `work`, row by row."""
    h, w = tile.shape
    at = tile.batch.room(h * w)
    coder.words(opened, tile, Place("work", at, w))
    return Codes("work", at)


def place(
    tile: Tile, to: Place, form: Mapping[str, Any], shape: tuple[int, int], planes: list[int], **fields: Any
) -> None:
    """A job of the kernel `place`: `form` has WORD to CODED of it, `fields` is without words, stride, h and w."""
    h, w = shape
    launch = call("place", "", to.memory, **form, ROWS=PLACE_ROWS, COLS=across(PLACE_COLS, w))
    planes = planes + [0] * (6 - len(planes))
    tile.batch.add(launch, words=to.at, stride=to.stride, h=h, w=w, planes=planes, **fields)
