"""Reading forward once: a pipe, an HTTP body (format_spec/container.md, "Reading")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rac.container import index as index_format
from rac.container import wire, zstd
from rac.container.feed import PIECE, Feed, Held, Near, Plain, Readable
from rac.container.reader import check_header
from rac.errors import ChecksumError, FormatError, LimitError, TruncatedError
from rac.records import Entry, Index, Limits, Record, Unit, Units
from rac.registry import RECORD_INDEX, RECORD_TENSOR


def _give(held: Held | None) -> None:
    if held:
        held.give()


class Walk:
    """Records of a feed, one piece after the other; `at` is the offset of the next."""

    def __init__(self, feed: Feed, name: str, limits: Limits) -> None:
        self.feed, self.name, self.limits, self.at = feed, name, limits, 0

    def piece(self, size: int, short: bool = False) -> tuple[memoryview, Held | None]:
        """A view of `size` bytes, and what to give back; TruncatedError where the stream ends early."""
        out, held = self.feed.take(size)
        self.at += len(out)
        if len(out) < size and not short:
            _give(held)
            raise TruncatedError("the stream ends early", file=self.name, offset=self.at)
        return out, held

    def read(self, size: int, short: bool = False) -> bytes:
        """A copy of `size` bytes."""
        view, held = self.piece(size, short)
        out = bytes(view)
        _give(held)
        return out

    def padding(self) -> None:
        """Read up to the next multiple of 64; the bytes must be 0."""
        at = self.at
        if at % wire.ALIGN and any(self.read(wire.pad(at))):
            raise FormatError("padding is not zero", file=self.name, offset=at)

    def head(self, size: int = 0) -> Record:
        """The head of the record that begins here; `size`: bytes of it, with its padding, that should be there."""
        at, least = self.at, wire.RECORD_HEAD
        data = self.read(max(size, least), short=True)
        if len(data) != (end := wire.head_end(data)):
            end = least + wire.parse_record(at, data[:least], self.limits)[2]
            end += wire.pad(end)
            if len(data) < end:
                data += self.read(end - len(data))
        return wire.parse_record_body(at, data, self.limits)

    def pass_by(self, size: int) -> None:
        """Read on without a look."""
        end = self.at + size
        if isinstance(self.feed, Near):
            self.go(end)
        while self.at < end:
            _give(self.piece(min(PIECE, end - self.at))[1])

    def go(self, at: int) -> None:
        """On from there, in a feed that can."""
        if isinstance(self.feed, Near):
            self.feed.go(at)
        self.at = at

    def skip(self, record: Record) -> None:
        """Go to the end of a record."""
        self.pass_by(record.payload + record.payload_size - self.at)
        self.padding()

    def take(self, units: Units, record: Record, what: Callable[[int], str]) -> tuple[memoryview, Held | None]:
        """The next units of a record, padding checked, and what to give back; `what(i)` names units[i] in errors."""
        start = units.starts[0]
        if self.at != record.payload + start:
            raise ValueError("units must be read in order")
        end = units.starts[len(units) - 1] + units.sizes[-1] - start
        view, held = self.piece(units.starts[len(units)] - start)
        try:
            self.check_padding(view, units, record, what)
        except FormatError:
            _give(held)
            raise
        return view[:end], held

    def check_padding(self, data: memoryview, units: Units, record: Record, what: Callable[[int], str]) -> None:
        """FormatError unless the bytes behind each unit in `data`, up to a multiple of 16, are 0."""
        start = units.starts[0]
        for i, size in enumerate(units.sizes):
            if size % wire.STREAM_ALIGN:
                behind = units.starts[i] - start + size
                if any(data[behind : behind + wire.pad(behind, wire.STREAM_ALIGN)]):
                    at = record.payload + start + behind
                    raise FormatError("padding is not zero", file=self.name, unit=what(i), offset=at)

    def later(self, units: Units, record: Record) -> tuple[int, int, int]:
        """(offset, bytes with the padding behind the last, without) of the next units, for others to read."""
        assert isinstance(self.feed, Near)  # noqa: S101 - the caller asked
        start, size = units.starts[0], units.starts[len(units)] - units.starts[0]
        if self.at != record.payload + start:
            raise ValueError("units must be read in order")
        self.at += size
        return self.feed.later(size), size, units.starts[len(units) - 1] + units.sizes[-1] - start

    def unit(self, unit: Unit, record: Record, most: int, what: str) -> bytes:
        """A copy of the next unit of a record, checked."""
        at = self.at
        if unit.size > most:
            raise LimitError(f"unit of {unit.size} bytes exceeds {most}", file=self.name, unit=what, offset=at)
        one = Units((unit.offset, unit.offset + unit.size + wire.pad(unit.size, wire.STREAM_ALIGN)), (unit.size,), ())
        view, held = self.take(one, record, lambda _: what)
        data = bytes(view)
        _give(held)
        if zstd.xxh3(data) != unit.check:
            raise ChecksumError("checksum does not match", file=self.name, unit=what, offset=at)
        return data


class Forward(Walk):
    """An archive read front to back, every byte checked; at its end the index must name the records that went by."""

    def __init__(self, stream: Readable | Feed, name: str = "<stream>", limits: Limits | None = None) -> None:
        super().__init__(stream if isinstance(stream, Feed) else Plain(stream, name), name, limits or Limits())
        pre = self.read(wire.PRELUDE, short=True)
        size = wire.parse_prelude(pre, self.limits)
        body = self.read(size)
        head = wire.parse_header(pre, body, self.read(wire.pad(self.at)), self.limits)
        self.header: dict[str, Any] = check_header(head)
        self.header_size = self.at
        self.index: Index | None = None
        self._seen: list[Record] = []

    def records(self) -> Iterator[Record]:
        """Heads of all records. The caller reads the payload with `unit`; what it leaves is skipped."""
        while True:
            record = self.head()
            if record.type == RECORD_INDEX:
                self._finish(record)
                return
            if index_format.check_type(record):
                yield record
            self.skip(record)
            kept = {k: v for k, v in record.head.items() if k in index_format.HEAD_KEYS}
            self._seen.append(replace(record, head=kept))

    def _finish(self, record: Record) -> None:
        if record.payload_size > self.limits.index:
            raise LimitError("index exceeds the limit", file=self.name, unit="index", offset=record.at)
        units = wire.parse_units(record.head.get("units"), record.payload_size)
        if len(units) != 1:
            raise FormatError("index head is malformed", file=self.name, unit="index", offset=record.at)
        body = self.unit(units[0], record, self.limits.index, "index")
        self.padding()
        index = index_format.parse(record, body, self.header_size, self.limits)
        at, size = wire.parse_trailer(self.read(wire.TRAILER, short=True))
        if (at, size) != (record.at, record.end - record.at):
            raise FormatError("the trailer does not point at the index", file=self.name, unit="trailer", offset=self.at)
        if self.read(1, short=True):
            raise FormatError("bytes follow the trailer", file=self.name, offset=self.at - 1)
        if len(index.entries) != len(self._seen):
            raise FormatError("the index names other records than are there", file=self.name, unit="index")
        for entry, seen in zip(index.entries, self._seen, strict=True):
            index_format.match(entry, seen)
        self.index = index


def entries_by_name(index: Index) -> dict[str, Entry]:
    """Tensor rows by each of their names."""
    return {n: e for e in index.entries if e.type == RECORD_TENSOR for n in e.names}
