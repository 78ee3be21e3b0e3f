"""Frozen records: what an archive states. No behaviour beyond arithmetic on their own fields."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

from rac.registry import DTYPES, ONLINE


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts before it has seen the bytes (format_spec/security.md). All in bytes but the last two."""

    header: int = 16 << 20
    head: int = 64 << 20
    index: int = 256 << 20
    tile: int = 16 << 20
    attachment: int = 1 << 30
    objects: int = 1 << 30
    free_alloc: int = 64 << 20
    expansion: int = 65536
    rank: int = 64
    depth: int = 8


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it lies in the file. `at` is its offset, `payload` that of its payload."""

    type: int
    flags: int
    at: int
    head: dict[str, Any]
    head_size: int
    payload: int
    payload_size: int
    check: int

    @property
    def end(self) -> int:
        """Offset of the next record."""
        return self.at + record_size(self.head_size, self.payload_size)


def record_size(head_size: int, payload_size: int) -> int:
    """All bytes of a record: fixed head, head and payload, each padded to 64."""
    return 64 * (-(-(32 + head_size) // 64) + -(-payload_size // 64))


class Unit(NamedTuple):
    """One independently read and checked byte range, relative to the payload."""

    offset: int
    size: int
    check: int


class Units(Sequence[Unit]):
    """The units of a record in their order: a list of each number, and a `Unit` only where one is asked for."""

    __slots__ = ("checks", "sizes", "starts")

    def __init__(self, starts: Sequence[int], sizes: Sequence[int], checks: Sequence[int]) -> None:
        """`starts` has one offset more than there are units: where the padding behind the last one ends."""
        self.starts, self.sizes, self.checks = starts, sizes, checks

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, i: int) -> Unit: ...

    @overload
    def __getitem__(self, i: slice) -> Units: ...

    def __getitem__(self, i: int | slice) -> Unit | Units:
        if isinstance(i, slice):  # of units that follow each other
            a, b, _ = i.indices(len(self.sizes))
            return Units(self.starts[a : max(a, b) + 1], self.sizes[a:b], self.checks[a:b])
        if i < 0:
            i += len(self.sizes)
        return Unit(self.starts[i], self.sizes[i], self.checks[i])

    def __iter__(self) -> Iterator[Unit]:
        return map(Unit, self.starts, self.sizes, self.checks)


@dataclass(frozen=True, slots=True)
class Online:
    """A map of a layer's input that the layer applies before its weight (format_spec/stages/online.md).

    With n the width of the weight (out, n) it is I_a (x) M (x) I_inner, M of order `size` and a = n / (size * inner);
    of "hadamard/1" M is the orthonormal matrix of that order, behind the signs of `seed`.
    """

    id: str
    size: int
    inner: int = 1
    seed: int | None = None
    object: str = ""  # name of the object that M is, of "matrix/1"

    @property
    def by_object(self) -> bool:
        """Whether M is an object of the file."""
        return "object" in ONLINE[self.id]

    def to_head(self) -> dict[str, Any]:
        """As the record states it."""
        if self.by_object:
            return {"id": self.id, "inner": self.inner, "object": self.object}
        return {"id": self.id, "inner": self.inner, "seed": self.seed, "size": self.size}


class Stated(Protocol):
    """What the index states of a tensor or object: its row, or the checked head of its record."""

    @property
    def type(self) -> int:
        """Type of the record."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """Data type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""

    @property
    def aliases(self) -> tuple[tuple[str, bool], ...]:
        """More names, and whether they share memory (tied) or merely equal it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""


class Entry(NamedTuple):
    """One record as the index states it. `dtype` to `parts` are for tensors and objects, `aliases` for tensors."""

    type: int
    name: str
    at: int
    head_size: int
    payload_size: int
    check: int
    flags: int = 0
    method: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()  # payload bytes by kind, those of PARTS
    aliases: tuple[tuple[str, bool], ...] = ()  # more names, and whether they share memory (tied) or merely equal it

    @property
    def size(self) -> int:
        """All bytes of the record."""
        return record_size(self.head_size, self.payload_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor or object."""
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *(alias for alias, _ in self.aliases))


PARTS = ("tables", "directories", "words", "escapes", "raw", "padding")


@dataclass(frozen=True, slots=True)
class Index:
    """What stands at the end of an archive."""

    entries: tuple[Entry, ...]
    digest: bytes
    at: int = 0
    size: int = 0
    header_size: int = 0
