"""A tensor as its record will hold it, and keeping many between the search for a scale and the writing."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import wire
from rac.container.writer import Writer
from rac.cpu.work import Place, Work, target
from rac.decoder import Decoder
from rac.errors import OutputError
from rac.records import Limits, Record, record_size
from rac.registry import RECORD_OBJECT, RECORD_TENSOR
from rac.tensor import Tensor, empty, parse

Bytes = bytes | memoryview
SPOOL = 1 << 24  # bytes of units that are kept in memory; more go to a file


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What quantising one tensor came to."""

    name: str
    shape: tuple[int, ...]
    alignment: str
    """"triangular", "pca", or "identity": all inputs count alike, or nothing is known of them."""
    rank: int
    """Rank of the low-rank part."""
    states: int
    snr: float
    """Signal to noise of the output (of the weights, where nothing is known of the inputs), in dB.

    Where outputs times the square of inputs are more than 2**35, of some outputs, evenly spread: 256 or more.
    """
    outliers: int
    dead: int
    """Columns that got no bits."""
    seconds: float
    lossless: int = 0
    """Bytes that it would take losslessly, about."""
    zeros: int = 0
    """Zeros of the source that are other numbers now."""
    size: int = 0
    """Bytes of the record, and of the objects that are written in front of it."""

    @property
    def bits(self) -> float:
        """Bytes * 8 / weights."""
        return 8 * self.size / math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor or an object that is ready to be written: what a worker returns."""

    head: dict[str, Any]  # the head of the record, but for its units
    units: Sequence[Bytes]
    row: dict[str, Any]  # what the index row adds to the record
    objects: tuple[Encoded, ...] = ()  # objects that the tensor or its layer uses; their records come first
    fidelity: Fidelity | None = None  # None: the tensor is lossless

    @property
    def name(self) -> str:
        """Name of the tensor or object."""
        return str(self.head["name"])

    @property
    def size(self) -> int:
        """Bytes of the record, without those of its objects."""
        payload = sum(len(u) + wire.pad(len(u), wire.STREAM_ALIGN) for u in self.units)
        full = self.head | {"units": wire.directory(self.units)}
        return record_size(wire.record_head(RECORD_TENSOR, 0, full, payload)[2], payload)

    def write(self, writer: Writer, there: set[str]) -> Fidelity | None:
        """Write the record behind the objects that are not `there` yet; returns the fidelity with the bytes written."""
        size = self.size if self.fidelity else 0
        for o in self.objects:
            if o.name not in there:
                writer.add(RECORD_OBJECT, 0, o.head, o.units, **o.row)
                there.add(o.name)
                size += o.size
        writer.add(RECORD_TENSOR, 0, self.head, self.units, **self.row)
        writer.flush()
        return self.fidelity and replace(self.fidelity, size=size)


def head_of(e: Encoded) -> Tensor:
    """What the head of its record states."""
    payload = sum(len(u) + wire.pad(len(u), wire.STREAM_ALIGN) for u in e.units)
    head = e.head | {"units": wire.directory(e.units)}
    record = Record(RECORD_TENSOR, 0, 0, head, head_size=0, payload=0, payload_size=payload, check=0)
    objects = {o.name: o for o in e.objects}
    return parse(record, Limits(), lambda name: tuple(objects[name].head["shape"]))


def decoded(e: Encoded) -> NDArray[Any]:
    """(R, C) words of the data type that a decoder restores of a tensor or an object, out of its units."""
    t, objects = head_of(e), {o.name: o for o in e.objects}
    used = [decoded(objects[name]).view(np.float32) for name in t.uses]
    decoder, out, work = Decoder(t, e.units[: t.first], objects=used), Place(empty(t)), Work()
    for band in t.bands():
        place = target(t, band, out)
        for i in band.tiles:
            work.add(decoder, range(i, i + 1), np.frombuffer(e.units[t.first + i], np.uint8), place)
        if t.chain.product is not None:
            work.join(decoder, place.words, out.part(band.box), band.box)
    work.run()
    return out.words


class Spool(Sequence[Bytes]):
    """Units in a file without a name, in the folder of a path; each is read where it is asked for."""

    def __init__(self, beside: str) -> None:
        self._beside = beside
        self._file: Any = None
        self._places: list[tuple[int, int]] = []  # offset and size of each
        self._end = 0

    def put(self, units: Sequence[Bytes]) -> list[int]:
        """Write units behind the others; their numbers. OutputError where the disk is full."""
        try:
            if self._file is None:
                folder = os.path.dirname(os.path.abspath(self._beside))
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed in the next line
                weakref.finalize(self, self._file.close)
            first = len(self._places)
            for unit in units:
                self._file.seek(self._end)
                left = memoryview(unit).cast("B")
                self._places.append((self._end, len(left)))
                self._end += len(left)
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise OutputError(error.strerror or str(error), file=self._beside) from error
        return [*range(first, len(self._places))]

    def arrange(self, order: list[int]) -> None:
        """Sort: unit i is then the one of number `order[i]`."""
        self._places = [self._places[i] for i in order]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        at, size = self._places[i]
        out = bytearray(size)
        left = memoryview(out)
        try:
            self._file.seek(at)
            while left:
                left = left[self._file.readinto(left) :]
        except OSError as error:
            raise OutputError(error.strerror or str(error), file=self._beside) from error
        return memoryview(out)


@dataclass(slots=True)
class Kept:
    """Encoded tensors by name, their units in memory while they are few, else in a file without a name."""

    beside: str  # a path in whose folder that file is
    _file: Any = None
    _end: int = 0
    _found: dict[str, tuple[int, Encoded, list[list[int]]]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget all."""
        self._end = 0
        self._found.clear()

    def put(self, name: str, e: Encoded) -> None:
        """Keep a tensor. OutputError where the disk is full."""
        records = (e, *e.objects)
        try:
            if self._file is None:
                folder = os.path.dirname(os.path.abspath(self.beside))
                self._file = tempfile.SpooledTemporaryFile(SPOOL, dir=folder)  # noqa: SIM115 - `close` closes it
            self._file.seek(self._end)
            for unit in (u for r in records for u in r.units):
                self._file.write(unit)
            bare = replace(e, units=[], objects=tuple(replace(o, units=[]) for o in e.objects))
            self._found[name] = self._end, bare, [[len(u) for u in r.units] for r in records]
            self._end = self._file.tell()
        except OSError as error:
            raise OutputError(error.strerror or str(error), file=self.beside) from error

    @property
    def names(self) -> list[str]:
        """Names of the tensors that are kept."""
        return [*self._found]

    def take(self, name: str) -> Encoded | None:
        """A tensor, which is forgotten; None where it is not kept."""
        if name not in self._found:
            return None
        e = self.get(name)
        del self._found[name]
        return e

    def get(self, name: str) -> Encoded:
        """A tensor that is kept."""
        at, bare, sizes = self._found[name]
        self._file.seek(at)
        own, *others = [[self._file.read(n) for n in of_record] for of_record in sizes]
        objects = tuple(replace(o, units=units) for o, units in zip(bare.objects, others, strict=True))
        return replace(bare, units=own, objects=objects)

    def close(self) -> None:
        """Give the memory and the file back."""
        self.clear()
        if self._file is not None:
            self._file.close()
