"""What a stage of the format is: three kinds, each a frozen object of the parameters that a record head states.

A *coder* restores the words of a tile from its unit. *Numbers* turn words of one byte into the numbers that they
stand for. A *product* computes the tensor from these numbers and from objects, matrices of the same file. A coder and
numbers may have a unit of their own in front of the tiles; `open` parses it, and what it returns decodes tiles, in any
order and from any thread. A new stage is a class of one of these kinds and a row in `rac.stages.table`; what a
protocol below says in code and not in words, a stage need not say again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.errors import FormatError, UnsupportedError
from rac.grid import Box, Grid, is_int
from rac.native.prototypes import F32, Array

Head = dict[str, Any]
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Context:
    """What the rest of a tensor head states, for a stage to check its parameters against."""

    dtype: str
    rows: int
    cols: int
    word: int  # bytes of a word that the coder restores


class Stage(Protocol):
    """A frozen dataclass of parameters, by the names that the stage map has."""

    id: ClassVar[str]

    def to_head(self) -> Head:
        """The stage map: the id, and each parameter as an integer or a list of them."""
        parameters = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"id": self.id, **{k: list(v) if isinstance(v, tuple) else int(v) for k, v in parameters.items()}}


Job = Callable[[Pair, Box, Pair, Any], Any]
"""Makes the job of the CPU kernel (`rac.native.TileSpan`) that decodes a tile: from address and bytes of its unit,
without Zstandard frames; its part of the matrix; the address of the first word, and words from row to row; and what the
words stand for, `OpenNumbers.fused`, or None where the words themselves are wanted."""


class OpenCoder(Protocol):
    """A coder whose front unit, if it has one, was parsed."""

    def plain(self, unit: Array, box: Box) -> Array:
        """The unit (bytes,) of a tile, its Zstandard frames expanded, for `decode` with `plain=True`; FormatError."""
        return unit

    def decode(self, unit: Array, box: Box, dst: Array, plain: bool = False) -> None:
        """Decode the unit (bytes,) uint8 of a tile, checked before, into `dst`, a (h, w) view of words, in Python.

        FormatError or ChecksumError where the unit breaks the format; `dst` may then be partly written.
        """

    def kernel(self) -> Job | None:
        """What makes jobs, its tables made now; None where `decode` does the work."""
        return None

    def bare(self) -> Self:
        """A copy without the tables of the CPU kernel, which it makes again when it is asked for them."""
        return self


class Coder(Stage, Protocol):
    """The first stage of every record: restores words."""

    resident: ClassVar[bool] = False  # whether a layer whose weight it stores is worth keeping compressed in memory

    @property
    def front(self) -> int | None:
        """Bytes of the unit that all tiles share; None: there is no such unit."""
        return None

    @property
    def directory(self) -> int:
        """Bytes at the beginning of a tile's unit that `parts` needs."""
        return 0

    @property
    def framed(self) -> bool:
        """Whether units of tiles may hold Zstandard frames."""
        return False

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """Check every parameter of the stage map; FormatError or UnsupportedError."""
        check(head, {}, cls.id)
        return cls()

    def open(self, unit: bytes, grid: Grid) -> OpenCoder:
        """Parse the front unit (empty where there is none); FormatError where it breaks the format."""

    def details(self) -> Mapping[str, int]:
        """What `rac info` says of a quantised tensor: "row_classes", "column_classes", "tables" (0: none)."""
        return {"row_classes": 0, "column_classes": 0, "tables": 0}

    def parts(self, first: list[bytes], sizes: list[int], n: Array) -> tuple[int, int, int, int]:
        """Bytes of (directories, words, escapes, raw) of tiles of `n` words each, whose units have `sizes` bytes.

        `first` are as many bytes of each unit as a directory has.
        """
        return 0, 0, 0, sum(sizes)


class Integers(NamedTuple):
    """Numbers that are integers times a scale of their row and one of their column."""

    halves: OpenNumbers
    """What decodes the words of a tile to half of these integers, binary32."""
    rows: F32
    """(R,)"""
    cols: F32
    """(C,)"""
    places: NDArray[np.int64]
    """(N, 2) row and column of the numbers that are others, ascending."""
    values: Array
    """(N,) words of the data type: these numbers."""


class OpenNumbers(Protocol):
    """Numbers whose unit was parsed."""

    def integers(self) -> Integers | None:
        """The integers that the numbers are but for scales; None: they are no such integers."""
        return None

    @property
    def fused(self) -> Any:
        """What the CPU kernel needs to make numbers of words as it decodes them; None: `decode` does that."""
        return None

    def patch(self, box: Box, dst: Array) -> None:
        """Write into `dst` (h, w) what the fused kernel leaves out of a tile."""
        return

    @property
    def patches(self) -> bool:
        """Whether `patch` ever has anything to do."""
        return False

    def decode(self, words: NDArray[np.uint8], box: Box, dst: Array) -> None:
        """Words (h, w) of one tile, contiguous, to numbers in `dst` (h, w), words of the data type; FormatError."""


class Numbers(Stage, Protocol):
    """A stage behind the coder: words of one byte to numbers that are near those which were packed."""

    sections: ClassVar[tuple[str, ...]]  # what its unit consists of, for people, in the order of `section_sizes`

    @property
    def front(self) -> int:
        """Bytes of its unit."""
        return sum(self.section_sizes)

    @property
    def section_sizes(self) -> tuple[int, ...]:
        """Bytes of each section of its unit."""

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """Check every parameter of the stage map; FormatError or UnsupportedError."""

    def open(self, unit: bytes, context: Context) -> OpenNumbers:
        """Parse the unit; `context.dtype` is what the numbers become. FormatError where it breaks the format."""

    def details(self, dtype: str) -> Mapping[str, Any]:
        """What `rac info` says of a tensor of numbers of `dtype`: parameters, and "outliers"."""


class Product(Stage, Protocol):
    """A stage behind numbers of binary32: computes with objects, in an order that the format fixes."""

    behind: ClassVar[tuple[str, ...]]  # the numbers that it may follow
    objects: ClassVar[int]  # how many objects it uses
    column: ClassVar[tuple[str, Any]]  # a name for `detail`, and its value for tensors without this stage
    whole_rows: ClassVar[bool]  # whether any column of the result needs all columns of the numbers

    @classmethod
    def from_head(cls, head: Head) -> Self:
        """Check the stage map; UnsupportedError."""
        check(head, {}, cls.id)
        return cls()

    def check(self, shapes: Sequence[tuple[int, ...]], rows: int, cols: int) -> None:
        """FormatError unless objects of these shapes serve a tensor of rows x cols."""

    def join(self, v: F32, objects: Sequence[F32], box: Box) -> F32:
        """The part `box` of the tensor, (h, w), from the numbers `v` of its rows, which may be changed.

        `v` is (h, w), or (h, C) where `whole_rows`.
        """

    def factors(self, objects: Sequence[F32]) -> tuple[F32, F32] | None:
        """(R, r) and (r, C) whose product is added to the numbers; None: the result is something else."""
        return None

    def detail(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
        """What `rac info` says under `column` of a tensor that uses the objects of these names and shapes."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The stages of a record, in the order in which a decoder runs them."""

    coder: Coder
    numbers: Numbers | None = None
    product: Product | None = None
    fronts: tuple[int, ...] = field(init=False)  # bytes of each unit in front of the tiles

    def __post_init__(self) -> None:
        each = (self.coder.front, None if self.numbers is None else self.numbers.front)
        object.__setattr__(self, "fronts", tuple(n for n in each if n is not None))  # asked for at every tile

    def to_head(self) -> list[Head]:
        """The list of stage maps."""
        return [stage.to_head() for stage in (self.coder, self.numbers, self.product) if stage is not None]

    @property
    def plain(self) -> bool:
        """Whether there is nothing but a coder, which has nothing to prepare."""
        return not self.fronts and self.numbers is None and self.product is None

    @property
    def method(self) -> str:
        """Name of the last stage, as an index row states it."""
        last = self.product or self.numbers or self.coder
        return last.id


def check(head: Head, ranges: Mapping[str, tuple[int, int]], name: str, others: Set[str] = frozenset()) -> None:
    """Check the parameters of a stage map, whose integers have `ranges`; of `others` only that they are there.

    FormatError where it lacks one or one is out of range, UnsupportedError where it has one that is not known.
    """
    keys = {"id", *ranges, *others}
    if keys - head.keys():
        raise FormatError(f"{name} parameters are incomplete")
    if len(head) > len(keys):
        raise UnsupportedError(f"unknown {name} stage parameters: {', '.join(sorted(head.keys() - keys))}")
    for key, (low, high) in ranges.items():
        if not is_int(head[key], low, high):
            raise FormatError(f"{name} parameter {key} is out of range")


def sizes_of(head: Head, n: int, name: str) -> tuple[Any, ...]:
    """The parameter "sizes", bytes of `n` sections; FormatError."""
    sizes = head["sizes"]
    if not isinstance(sizes, list) or len(sizes) != n or any(not is_int(v, 0, 1 << 40) for v in sizes):
        raise FormatError(f"{name} parameter sizes is malformed")
    return tuple(sizes)


def pack_lists(lists: Iterable[Array]) -> list[bytes]:
    """Lists of bytes as units hold them: nothing where all are 0, plain bytes, or a zstd frame where that is less."""
    return [zstd.shorter(v.tobytes(), 19) if v.any() else b"" for v in lists]


def unpack_list(data: bytes, n: int) -> NDArray[np.uint8]:
    """Inverse of `pack_lists` for one list of `n` bytes; FormatError."""
    return np.frombuffer(zstd.expand(data, n), np.uint8) if data else np.zeros(n, np.uint8)
