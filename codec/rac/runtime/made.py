"""A weight that several tensors of a file stand for, held as their records: codes and scales of other tools.

What it is made of is worked out from names, types and shapes, as when the weight is loaded dense (rac.dequantise), and
the numbers are the same, bit for bit. Codes are decoded whenever the weight is, a few rows of tiles at a time; scales
and other small parts once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import dequantise
from rac.dequantise import Logical, Rows
from rac.errors import LimitError, MismatchError, SourceError
from rac.grid import Grid
from rac.registry import DTYPES
from rac.runtime import record
from rac.runtime.record import Array, Bytes
from rac.stages.words import put_words

FEW = 1 << 17
"""Numbers that are made in one go: they are still in a cache when they are rounded."""
BAND = 1 << 20
"""Bytes of codes that are decoded in one go: each call has tables to set up."""
SMALL = 32
"""Parts that take at most this fraction of the first one's bytes are kept dense."""


@dataclass(frozen=True, slots=True)
class Making:
    """How weights are made of the tensors in records."""

    stated: str
    """What the configuration says of the quantisation, in JSON."""
    dtype: str
    """Data type of the numbers."""
    names: tuple[str, ...]
    """Names of the tensors, on a path that is the same for all weights: a record that several share has one name."""

    @classmethod
    def of(cls, stated: Mapping[str, Any], dtype: str, names: Sequence[str]) -> Making:
        """For tensors with these names."""
        shared = os.path.commonprefix(names).rpartition(".")[0]  # noqa: RUF071 - no paths
        own = (f"layer.{n[len(shared) + bool(shared) :]}" for n in names)
        return cls(json.dumps(stated, sort_keys=True), dtype, tuple(own))

    def to_dict(self) -> dict[str, Any]:
        """For a configuration; `of` makes it again."""
        return {"stated": json.loads(self.stated), "dtype": self.dtype, "names": [*self.names]}

    def find(self, tensors: Sequence[Any]) -> Logical:
        """What tensors of these names stand for; SourceError where that is not one matrix of all of them."""
        found, _ = dequantise.find({t.name: t for t in tensors}, json.loads(self.stated), "")
        if len(found) != 1 or len(found[0].parts) != len(tensors):
            raise SourceError(f"{', '.join(self.names)} are not the parts of one weight")
        return found[0]


class _Part:
    """A tensor that a weight is made of."""

    def __init__(self, name: str, stored: record.Stored, start: int) -> None:
        t = stored.tensor
        self.name, self.dtype, self.shape = name, t.dtype, t.shape
        self.stored, self.start, self.nbytes = stored, start, t.nbytes
        width = max(1, t.grid.cols * t.word)
        self.high = t.grid.tr * max(1, BAND // (width * t.grid.tr))
        """Rows that are decoded in one go; whole tiles."""
        self.kept: Bytes | None = None
        """All its bytes, where they are few."""

    @property
    def stop(self) -> int:
        """Where its record ends among those of the weight."""
        return self.start + self.stored.size

    def keep(self, data: Bytes) -> None:
        """Decode it for good; RacError where it is damaged."""
        words = self.stored.room()
        self.stored.decode(data[self.start : self.stop], words)
        self.kept = words.reshape(-1).view(np.uint8)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of what is kept."""
        assert self.kept is not None  # noqa: S101 - else it is opened
        return self.kept[start:stop]

    def opened(self, data: Bytes, pool: Executor | None) -> dequantise.Stored:
        """What can be read."""
        return _Open(self, data, pool) if self.kept is None else self


class _Open:
    """A part while a weight is made: the rows of tiles that were asked for last are in memory."""

    def __init__(self, part: _Part, data: Bytes, pool: Executor | None) -> None:
        self.name, self.dtype, self.shape, self.nbytes = part.name, part.dtype, part.shape, part.nbytes
        self._stored, self._data, self._pool = part.stored, data[part.start : part.stop], pool
        self._high = part.high
        self._at, self._bytes = (0, 0), np.empty(0, np.uint8)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop)."""
        t = self._stored.tensor
        band = t.grid.cols * t.word * self._high
        at = start // band, max(start // band + 1, -(-stop // band))
        if at != self._at:
            a, b = (min(t.grid.rows, i * self._high) for i in at)
            words = np.empty((b - a, t.grid.cols), f"<u{t.word}")
            self._stored.decode(self._data, words, a // t.grid.tr, -(-b // t.grid.tr), self._pool)
            self._at, self._bytes = at, words.reshape(-1).view(np.uint8)
        return self._bytes[start - at[0] * band : stop - at[0] * band]


@dataclass(frozen=True, slots=True)
class Matrix:
    """What a layer asks of the tensor that its record states, for a weight that is made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    grid: Grid

    @property
    def word(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].word

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return math.prod(self.shape) * self.word


class Made:
    """The records that make up a weight, parsed; it is decoded as one record is (rac.runtime.record.Stored).

    `data` are the bytes of the records of `making.names`, as `collect` gives them, one after the other. RacError where
    they are damaged, or do not make up one weight.
    """

    def __init__(self, data: Bytes, making: Making) -> None:
        spans = record.split(data)
        if len(spans) != len(making.names):
            raise MismatchError(f"holds {len(spans)} records, a weight is made of {', '.join(making.names)}")
        named = zip(making.names, spans, strict=True)
        self._parts = [_Part(name, record.parse(data[a:b]), a) for name, (a, b) in named]
        codes = max(self._parts, key=lambda part: part.nbytes)
        for part in self._parts:
            if part.nbytes * SMALL <= codes.nbytes:
                part.keep(data)
        one = making.find([part.opened(data, None) for part in self._parts])
        self.size, self._rows = len(data), dequantise.rebound(one.rows, {part.name: part for part in self._parts})
        rows, cols = math.prod(one.shape[:-1]), one.shape[-1]
        high = codes.high if codes.stored.tensor.grid.rows == rows else one.shape[-2]  # decodes no codes twice; experts
        word = DTYPES[making.dtype].word
        self.tensor = Matrix(codes.stored.tensor.name, making.dtype, one.shape, Grid(rows, cols, word, high, cols))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix of words."""
        return self.tensor.grid.rows, self.tensor.grid.cols

    @property
    def kept(self) -> int:
        """Bytes of parts that are dense."""
        return sum(part.nbytes for part in self._parts if part.kept is not None)

    @property
    def stored(self) -> list[record.Stored]:
        """What was parsed of each record."""
        return [part.stored for part in self._parts]

    def describes(self, data: Bytes) -> bool:
        """Whether these are the bytes that were parsed, as far as the heads say; units are checked when decoded."""
        each = (part.stored.describes(data[part.start : part.stop]) for part in self._parts)
        return len(data) == self.size and all(each)

    def room(self) -> Array:
        """The dense matrix of words (R, C), not yet filled; LimitError where memory is short."""
        try:
            return np.empty(self.shape, f"<u{self.tensor.word}")
        except MemoryError as e:
            raise LimitError(f"not enough memory for {self.tensor.nbytes} bytes", unit=repr(self.tensor.name)) from e

    def transform(self, data: Bytes) -> None:
        """Nothing: a layer with such a weight takes its input as it is."""

    def decode(
        self, data: Bytes, out: Array, first: int = 0, last: int | None = None, pool: Executor | None = None
    ) -> None:
        """Make the bands of rows first..last - 1 (by default all), as rac.runtime.record.decode decodes tiles."""
        grid = self.tensor.grid
        opened = {part.name: part.opened(data, pool) for part in self._parts}
        rows: Rows = dequantise.rebound(self._rows, opened)
        top, step = first * grid.tr, max(1, FEW // grid.cols)
        for band in range(first, grid.down if last is None else last):
            end = min(grid.rows, (band + 1) * grid.tr)
            for a in range(band * grid.tr, end, step):
                b = min(end, a + step)
                with np.errstate(all="ignore"):  # damaged scales: the numbers are those of a dense load
                    made = np.ascontiguousarray(rows(a, b), np.float32)
                put_words(made, self.tensor.dtype, out[a - top : b - top])


Weight = record.Stored | Made
"""What is parsed of the bytes of a layer."""


def parse(data: Bytes, making: Making | None) -> Weight:
    """The bytes of one weight: of a record, or of those that it is made of. RacError where they are damaged."""
    return record.parse(data) if making is None else Made(data, making)
