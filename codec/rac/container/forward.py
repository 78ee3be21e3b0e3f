"""Reading forward once: a pipe, an HTTP body (format_spec/container.md, "Reading")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from rac.container import index as ix
from rac.container import wire, zstd
from rac.container.reader import check_header
from rac.errors import ChecksumError, FormatError, LimitError, SourceError, TruncatedError
from rac.records import Entry, Index, Limits, Record, Unit
from rac.registry import RECORD_INDEX, RECORD_TENSOR

PIECE = 1 << 20


class Readable(Protocol):
    """Anything with `read`."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; empty at the end."""


class Forward:
    """An archive read from front to back; holds one record head and one unit at a time.

    Every byte is checked, padding included, and at the end the index must name the records that went by.
    """

    def __init__(self, stream: Readable, name: str = "<stream>", limits: Limits | None = None) -> None:
        self._stream, self.name, self.limits, self.at = stream, name, limits or Limits(), 0
        pre = self._read(wire.PRELUDE, short=True)
        size = wire.parse_prelude(pre, self.limits)
        body = self._read(size)
        head = wire.parse_header(pre, body, self._read(wire.pad(self.at)), self.limits)
        self.header: dict[str, Any] = check_header(head)
        self.header_size = self.at
        self.index: Index | None = None
        self._seen: list[Record] = []

    def _read(self, size: int, short: bool = False) -> bytes:
        """`size` bytes, asked for in pieces so that a false length allocates nothing."""
        out = bytearray()
        while len(out) < size:
            try:
                got = self._stream.read(min(PIECE, size - len(out)))
            except OSError as e:
                raise SourceError(e.strerror or str(e), file=self.name, offset=self.at) from e
            if not got:
                break
            out += got
        self.at += len(out)
        if len(out) < size and not short:
            raise TruncatedError("the stream ends early", file=self.name, offset=self.at)
        return bytes(out)

    def padding(self, to: int = wire.ALIGN) -> None:
        """Read up to the next multiple of `to`; the bytes must be 0."""
        at = self.at
        if any(self._read(wire.pad(at, to))):
            raise FormatError("padding is not zero", file=self.name, offset=at)

    def records(self) -> Iterator[Record]:
        """Heads of all records. The caller reads the payload with `unit`; what it leaves is skipped."""
        while True:
            at = self.at
            fixed = self._read(wire.RECORD_HEAD, short=True)
            size = wire.parse_record(at, fixed, self.limits)[2]
            body = self._read(size)
            record = wire.parse_record_body(at, fixed, body, self._read(wire.pad(self.at)), self.limits)
            if record.type == RECORD_INDEX:
                self._finish(record)
                return
            if ix.check_type(record):
                yield record
            self.skip(record)
            self._seen.append(replace(record, head={k: v for k, v in record.head.items() if k in ix.HEAD_KEYS}))

    def skip(self, record: Record) -> None:
        """Go to the end of a record."""
        while self.at < record.payload + record.payload_size:
            self._read(min(PIECE, record.payload + record.payload_size - self.at))
        self.padding()

    def unit(self, unit: Unit, record: Record, most: int, what: str) -> bytes:
        """The next unit of a record, checked; LimitError where it claims more than `most` bytes."""
        if self.at != record.payload + unit.offset:
            raise ValueError("units must be read in order")
        if unit.size > most:
            raise LimitError(f"unit of {unit.size} bytes exceeds {most}", file=self.name, unit=what, offset=self.at)
        at = self.at
        data = self._read(unit.size)
        if zstd.xxh3(data) != unit.check:
            raise ChecksumError("checksum does not match", file=self.name, unit=what, offset=at)
        self.padding(wire.STREAM_ALIGN)
        return data

    def _finish(self, record: Record) -> None:
        if record.payload_size > self.limits.index:
            raise LimitError("index exceeds the limit", file=self.name, unit="index", offset=record.at)
        units = wire.parse_units(record.head.get("units"), record.payload_size)
        if len(units) != 1:
            raise FormatError("index head is malformed", file=self.name, unit="index", offset=record.at)
        body = self.unit(units[0], record, self.limits.index, "index")
        self.padding()
        index = ix.parse(record, body, self.header_size, self.limits)
        at, size = wire.parse_trailer(self._read(wire.TRAILER, short=True))
        if (at, size) != (record.at, record.end - record.at):
            raise FormatError("the trailer does not point at the index", file=self.name, unit="trailer", offset=self.at)
        if self._read(1, short=True):
            raise FormatError("bytes follow the trailer", file=self.name, offset=self.at - 1)
        if len(index.entries) != len(self._seen):
            raise FormatError("the index names other records than are there", file=self.name, unit="index")
        for entry, seen in zip(index.entries, self._seen, strict=True):
            ix.match(entry, seen)
        self.index = index


def entries_by_name(index: Index) -> dict[str, Entry]:
    """Tensor rows by each of their names."""
    return {n: e for e in index.entries if e.type == RECORD_TENSOR for n in (e.name, *(a for a, _ in e.aliases))}
