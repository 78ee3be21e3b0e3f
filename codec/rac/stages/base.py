"""What a stage of the format is: three kinds, each a frozen object of the parameters that a record head states.

A *coder* restores the words of a tile from its unit. *Numbers* turn words of one byte into the numbers that they
stand for. A *product* computes the tensor from these numbers and from objects, matrices of the same file. A coder and
numbers may have a unit of their own in front of the tiles; `open` parses it, and what it returns decodes tiles, in any
order and from any thread. A new stage is a class of one of these kinds and a row in `rac.stages.table`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from rac.errors import FormatError, UnsupportedError
from rac.grid import Box, Grid

Array = NDArray[Any]
Head = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Context:
    """What the rest of a tensor head states, for a stage to check its parameters against."""

    dtype: str
    rows: int
    cols: int
    word: int
    """Bytes of a word that the coder restores."""


class Kernel(Protocol):
    """Makes the jobs of the CPU kernel that decodes the tiles of one tensor (`rac.native.decode_tiles`)."""

    def job(self, unit: tuple[int, int], box: Box, place: tuple[int, int], numbers: Any) -> Any:
        """The job of one tile.

        Args:
            unit: Address and bytes of the tile's unit, without Zstandard frames.
            box: The tile's part of the matrix.
            place: Address of its first word, and words from row to row.
            numbers: What the words stand for, `OpenNumbers.fused`; None: the words themselves are wanted.
        """


class OpenCoder(Protocol):
    """A coder whose front unit, if it has one, was parsed."""

    def plain(self, unit: Array, box: Box) -> Array:
        """The unit (bytes,) uint8 of a tile with its Zstandard frames expanded, to be decoded with `plain=True`.

        Raises FormatError.
        """

    def decode(self, unit: Array, box: Box, dst: Array, plain: bool = False) -> None:
        """Decode the unit (bytes,) uint8 of a tile, checked before, into `dst`, a (h, w) view of words, in Python.

        FormatError or ChecksumError where the unit breaks the format; `dst` may then be partly written.
        """

    def kernel(self) -> Kernel | None:
        """What makes jobs of the CPU kernel, its tables made now; None where `decode` does the work."""

    def bare(self) -> Self:
        """A copy without the tables of the CPU kernel, which it makes again when it is asked for them."""


class Coder(Protocol):
    """The first stage of every record: restores words."""

    id: ClassVar[str]
    resident: ClassVar[bool]
    """Whether a layer whose weight it stores is worth keeping compressed in memory."""

    @property
    def front(self) -> int | None:
        """Bytes of the unit that all tiles share; None: there is no such unit."""

    @property
    def directory(self) -> int:
        """Bytes at the beginning of a tile's unit that `parts` needs."""

    @property
    def framed(self) -> bool:
        """Whether units of tiles may hold Zstandard frames."""

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """Check every parameter of the stage map; FormatError or UnsupportedError."""

    def to_head(self) -> Head:
        """The stage map."""

    def open(self, unit: bytes, grid: Grid, reference: bool) -> OpenCoder:
        """Parse the front unit (empty where there is none); `reference`: decode without kernels.

        FormatError where the unit breaks the format.
        """

    def details(self) -> Mapping[str, int]:
        """What `rac info` says of a quantised tensor: "row_classes", "column_classes", "tables" (0: none)."""

    def parts(self, first: bytes, size: int, n: int) -> tuple[int, int, int, int]:
        """Bytes of (directories, words, escapes, raw) of a tile of `n` words whose unit has `size` bytes."""


class OpenNumbers(Protocol):
    """Numbers whose unit was parsed."""

    @property
    def fused(self) -> Any:
        """What the CPU kernel needs to make numbers of words as it decodes them; None: `decode` does that."""

    def patch(self, box: Box, dst: Array) -> None:
        """Write into `dst` (h, w) what the fused kernel leaves out of a tile."""

    @property
    def patches(self) -> bool:
        """Whether `patch` ever has anything to do."""

    def decode(self, words: NDArray[np.uint8], box: Box, dst: Array) -> None:
        """Words (h, w) of one tile, contiguous, to numbers in `dst` (h, w), words of the data type; FormatError."""


class Numbers(Protocol):
    """A stage behind the coder: words of one byte to numbers that are near those which were packed."""

    id: ClassVar[str]
    sections: ClassVar[tuple[str, ...]]
    """What its unit consists of, for people, in the order of `section_sizes`."""

    @property
    def front(self) -> int:
        """Bytes of its unit."""

    @property
    def section_sizes(self) -> tuple[int, ...]:
        """Bytes of each section of its unit."""

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """Check every parameter of the stage map; FormatError or UnsupportedError."""

    def to_head(self) -> Head:
        """The stage map."""

    def open(self, unit: bytes, context: Context, reference: bool) -> OpenNumbers:
        """Parse the unit; `context.dtype` is what the numbers become. FormatError where it breaks the format."""

    def details(self, dtype: str) -> Mapping[str, Any]:
        """What `rac info` says of a tensor of numbers of `dtype`: parameters, and "outliers"."""


class Product(Protocol):
    """A stage behind numbers of binary32: computes with objects, in an order that the format fixes."""

    id: ClassVar[str]
    behind: ClassVar[tuple[str, ...]]
    """The numbers that it may follow."""
    objects: ClassVar[int]
    """How many objects it uses."""
    column: ClassVar[tuple[str, Any]]
    """A name for `detail`, and its value for tensors without this stage."""
    whole_rows: ClassVar[bool]
    """Whether any column of the result needs all columns of the numbers."""

    @classmethod
    def from_head(cls, head: Head) -> Self:
        """Check the stage map; UnsupportedError."""

    def to_head(self) -> Head:
        """The stage map."""

    def check(self, shapes: Sequence[tuple[int, ...]], rows: int, cols: int) -> None:
        """FormatError unless objects of these shapes serve a tensor of rows x cols."""

    def join(
        self, v: NDArray[np.float32], objects: Sequence[NDArray[np.float32]], box: Box, reference: bool
    ) -> NDArray[np.float32]:
        """The part `box` of the tensor, (h, w), from the numbers `v` of its rows, which may be changed.

        `v` is (h, w), or (h, C) where `whole_rows`.
        """

    def detail(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
        """What `rac info` says under `column` of a tensor that uses the objects of these names and shapes."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The stages of a record, in the order in which a decoder runs them."""

    coder: Coder
    numbers: Numbers | None = None
    product: Product | None = None
    fronts: tuple[int, ...] = field(init=False)
    """Bytes of each unit in front of the tiles."""

    def __post_init__(self) -> None:
        each = (self.coder.front, None if self.numbers is None else self.numbers.front)
        object.__setattr__(self, "fronts", tuple(n for n in each if n is not None))  # asked for at every tile

    def to_head(self) -> list[Head]:
        """The list of stage maps."""
        return [stage.to_head() for stage in (self.coder, self.numbers, self.product) if stage is not None]

    @property
    def method(self) -> str:
        """Name of the last stage, as an index row states it."""
        last = self.product or self.numbers or self.coder
        return last.id


def check_keys(head: Head, keys: Set[str], name: str) -> None:
    """FormatError where a stage map lacks a parameter, UnsupportedError where it has one that is not known."""
    if keys - head.keys():
        raise FormatError(f"{name} parameters are incomplete")
    if head.keys() - keys:
        raise UnsupportedError(f"unknown {name} parameters: {', '.join(sorted(head.keys() - keys))}")


def only_id(head: Head) -> None:
    """UnsupportedError unless a stage map has no parameters."""
    if head.keys() != {"id"}:
        raise UnsupportedError("unknown stage parameters")
