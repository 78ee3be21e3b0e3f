"""Reading forward once: a pipe, an HTTP body (format_spec/container.md, "Reading")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from rac.container import index as index_format
from rac.container import wire, zstd
from rac.container.feed import PIECE, Feed, Held, Near, Plain, Readable
from rac.container.reader import check_header
from rac.errors import ChecksumError, FormatError, LimitError, TruncatedError
from rac.records import Entry, Index, Limits, Record, Unit
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

    def head(self) -> Record:
        """The head of the record that begins here."""
        at = self.at
        fixed = self.read(wire.RECORD_HEAD, short=True)
        size = wire.parse_record(at, fixed, self.limits)[2]
        rest = self.read(size + wire.pad(self.at + size))
        return wire.parse_record_body(at, fixed, rest[:size], rest[size:], self.limits)

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

    def take(self, units: Sequence[Unit], record: Record, what: Callable[[int], str]) -> tuple[memoryview, Held | None]:
        """The next units of a record, padding checked, and what to give back; `what(i)` names units[i] in errors."""
        start, last = units[0].offset, units[-1]
        if self.at != record.payload + start:
            raise ValueError("units must be read in order")
        end = last.offset + last.size - start
        view, held = self.piece(end + wire.pad(end, wire.STREAM_ALIGN))
        try:
            self.check_padding(view, units, record, what)
        except FormatError:
            _give(held)
            raise
        return view[:end], held

    def check_padding(
        self, data: memoryview, units: Sequence[Unit], record: Record, what: Callable[[int], str]
    ) -> None:
        """FormatError unless the bytes behind each unit in `data`, up to a multiple of 16, are 0."""
        start = units[0].offset
        for i, unit in enumerate(units):
            if unit.size % wire.STREAM_ALIGN:
                behind = unit.offset - start + unit.size
                if any(data[behind : behind + wire.pad(behind, wire.STREAM_ALIGN)]):
                    at = record.payload + start + behind
                    raise FormatError("padding is not zero", file=self.name, unit=what(i), offset=at)

    def later(self, units: Sequence[Unit], record: Record) -> tuple[int, int, int]:
        """(offset, bytes with the padding behind the last, without) of the next units, for others to read."""
        assert isinstance(self.feed, Near)  # noqa: S101 - the caller asked
        start, end = units[0].offset, units[-1].offset + units[-1].size
        if self.at != record.payload + start:
            raise ValueError("units must be read in order")
        size = end - start + wire.pad(end, wire.STREAM_ALIGN)
        self.at += size
        return self.feed.later(size), size, end - start

    def unit(self, unit: Unit, record: Record, most: int, what: str) -> bytes:
        """A copy of the next unit of a record, checked."""
        at = self.at
        if unit.size > most:
            raise LimitError(f"unit of {unit.size} bytes exceeds {most}", file=self.name, unit=what, offset=at)
        view, held = self.take([unit], record, lambda _: what)
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
