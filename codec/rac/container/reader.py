"""Random access: header and index first, then any record (format_spec/container.md, "Reading")."""

from __future__ import annotations

from typing import Any

from rac.container import index, wire
from rac.container.access import Access, InFile, read
from rac.errors import FormatError, LimitError, SourceError, TruncatedError, UnsupportedError
from rac.records import Entry, Index, Limits, Record
from rac.registry import RECORD_OBJECT

TAIL = 1 << 16
_HEADER = {"features", "metadata", "provenance", "shard"}


def check_header(head: dict[str, Any]) -> dict[str, Any]:
    """The header's map, checked (format_spec/container.md, "Header")."""
    if not isinstance(head.get("features"), list) or not all(isinstance(f, str) for f in head["features"]):
        raise FormatError("header states no features", unit="header", offset=0)
    if head["features"]:
        raise UnsupportedError(f"needs the unknown feature {head['features'][0]!r}", unit="header", offset=0)
    meta, origin = head.get("metadata", {}), head.get("provenance", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise FormatError("metadata does not map text to text", unit="header", offset=0)
    if not isinstance(origin, dict):
        raise FormatError("header is malformed", unit="header", offset=0)
    shard = head.get("shard", [1, 1])
    well = isinstance(shard, list) and len(shard) == 2 and index.are_counts(shard)
    if not well or not 1 <= shard[0] <= shard[1]:
        raise FormatError("shard is malformed", unit="header", offset=0)
    if unknown := [k for k in head if k not in _HEADER and not k.startswith("x-")]:
        raise UnsupportedError(f"unknown header field {unknown[0]!r}", unit="header", offset=0)
    return head


class Archive:
    """An archive that can be read at any place. Reads the header and the tail when it is made."""

    def __init__(self, access: Access, limits: Limits | None = None) -> None:
        self.access, self.limits = access, limits or Limits()
        try:
            with InFile(access.name):
                self.header, header_size = self._header()
                self.index: Index = self._index(header_size)
        except BaseException:
            access.close()
            raise
        self.objects = {e.name: e for e in self.index.entries if e.type == RECORD_OBJECT}
        self.kept: dict[str, Any] = {}
        """Contents of objects, for those who decode them; at most `limits.objects` bytes, all of them."""

    def _header(self) -> tuple[dict[str, Any], int]:
        size = self.access.size
        start = read(self.access, 0, min(4096, size))
        length = wire.parse_prelude(start[: wire.PRELUDE], self.limits)
        end = wire.PRELUDE + length
        end += wire.pad(end)
        if end > size:
            raise TruncatedError("file ends inside the header", unit="header", offset=size)
        data = start if end <= len(start) else read(self.access, 0, end)
        body = data[wire.PRELUDE : wire.PRELUDE + length]
        head = wire.parse_header(data[: wire.PRELUDE], body, data[wire.PRELUDE + length : end], self.limits)
        return check_header(head), end

    def _index(self, header_size: int) -> Index:
        size = self.access.size
        tail_at = max(header_size, size - TAIL)
        tail = read(self.access, tail_at, size - tail_at)
        with InFile(self.access.name, "trailer", size - wire.TRAILER):
            at, length = wire.parse_trailer(tail[-wire.TRAILER :])
        if at < header_size or at + length + wire.TRAILER != size:
            raise FormatError("the trailer points outside the file", unit="trailer", offset=size - wire.TRAILER)
        if length > self.limits.index + self.limits.head:
            raise LimitError(f"index of {length} bytes exceeds the limit", unit="trailer", offset=size - wire.TRAILER)
        data = tail[at - tail_at :] if at >= tail_at else read(self.access, at, size - at)
        record = self.parse_record(at, data)
        if record.end != at + length:
            raise FormatError("the trailer states another size than the index has", unit="trailer", offset=at)
        start = record.payload - at
        unit, rest = data[start : start + record.payload_size], data[start + record.payload_size : length]
        units = wire.parse_units(record.head.get("units"), record.payload_size)
        if not units:
            raise FormatError("index head is malformed", offset=at)
        if any(unit[units[0].size :]) or any(rest):
            raise FormatError("padding is not zero", unit="index", offset=at)
        return index.parse(record, unit[: units[0].size], header_size, self.limits)

    def parse_record(self, at: int, data: bytes) -> Record:
        """The record head that `data`, read from offset `at`, begins with."""
        return wire.parse_record_body(at, data, self.limits)

    def record(self, entry: Entry) -> Record:
        """The record of an index row, its head read and checked."""
        with InFile(self.access.name, repr(entry.name)):
            if entry.head_size > self.limits.head:
                raise LimitError(f"record head of {entry.head_size} bytes exceeds the limit", offset=entry.at)
            size = entry.size - (entry.payload_size + wire.pad(entry.payload_size))
            record = self.parse_record(entry.at, read(self.access, entry.at, size))
            index.match(entry, record)
            index.check_type(record)
            return record

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.access, self.limits, self.index.digest)

    def close(self) -> None:
        """Close what is below."""
        self.kept.clear()
        self.access.close()


def _again(access: Access, limits: Limits, digest: bytes) -> Archive:
    """An archive that was copied or pickled; SourceError where the file has other content now."""
    out = Archive(access, limits)
    if out.index.digest != digest:
        out.close()
        raise SourceError("has changed since it was opened", file=access.name)
    return out
