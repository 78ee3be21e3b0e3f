"""The index: one row per record, in the order of the file (format_spec/container.md, "Index")."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rac.container import msg, wire, zstd
from rac.errors import ChecksumError, FormatError, LimitError, UnsupportedError
from rac.records import Entry, Index, Limits, Record
from rac.registry import FLAG_ANCILLARY, RECORD_ATTACHMENT, RECORD_INDEX, RECORD_OBJECT, RECORD_TENSOR

_ROW = {"at", "check", "flags", "head", "payload", "type"}
HEAD_KEYS = ("name", "dtype", "shape", "aliases", "stages")  # what a record head and its index row both state
_NAMED = _ROW | {"method", "name"}
_KEYS = {
    RECORD_TENSOR: _NAMED | {"aliases", "dtype", "parts", "shape"},
    RECORD_ATTACHMENT: _NAMED,
    RECORD_OBJECT: _NAMED | {"dtype", "parts", "shape"},
}


def _row(e: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"at": e.at, "flags": e.flags, "head": e.head_size, "payload": e.payload_size, "type": e.type}
    row["check"] = e.check.to_bytes(8, "little")
    if e.type in _KEYS:
        row |= {"method": e.method, "name": e.name}
    if e.type in (RECORD_TENSOR, RECORD_OBJECT):
        row |= {"dtype": e.dtype, "parts": list(e.parts), "shape": list(e.shape)}
    if e.type == RECORD_TENSOR:
        row["aliases"] = [list(a) for a in e.aliases]
    return row


def build(entries: list[Entry], digest: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Head, and the one unit, of the index record."""
    body = msg.pack({"digest": digest, "records": [_row(e) for e in entries]})
    return {"size": len(body)}, [zstd.compress(body)]


def content_digest(rows: list[list[Any]]) -> bytes:
    """Digest of [name, dtype, shape, digest] of every name (format_spec/container.md, "Content digest")."""
    return zstd.digest(msg.pack(sorted(rows, key=lambda row: row[0].encode())))


def are_counts(v: Iterable[Any], most: int = 1 << 62) -> bool:
    """True where all are ints (not bools) in 0..most."""
    values = [*v]
    return not values or (set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= most)


def is_count(v: Any) -> bool:
    """True for an int (not a bool) in 0..2**62."""
    return type(v) is int and 0 <= v <= 1 << 62


def parse_shape(v: Any, limits: Limits) -> tuple[int, ...]:
    """A list of dimensions whose product stays below 2**59."""
    if not isinstance(v, list) or not are_counts(v):
        raise FormatError("shape is malformed")
    if len(v) > limits.rank:
        raise LimitError(f"shape of {len(v)} dimensions exceeds the limit of {limits.rank}")
    total = 1
    for n in v:
        total *= n or 1
        if total > 1 << 59:
            raise FormatError("shape is out of range")
    return tuple(v)


def parse_aliases(v: Any) -> tuple[tuple[str, bool], ...]:
    """A list of [name, tied]."""
    if not isinstance(v, list) or any(type(a) is not list or [*map(type, a)] != [str, bool] for a in v):
        raise FormatError("aliases are malformed")
    return tuple((a, b) for a, b in v)


def _sound(well: bool) -> None:
    if not well:
        raise FormatError("index row is malformed")


_USUAL = (*sorted(_KEYS[RECORD_TENSOR]),)
_USUAL_TYPES = (list, int, bytes, str, int, int, str, str, list, int, list, int)
_MOST = 1 << 62


def _usual(row: Any, limits: Limits) -> Entry | None:
    """The row of a tensor without aliases, in few steps; None where it is another, or wrong, which `_entry` tells."""
    if type(row) is not dict or (*row,) != _USUAL or (*map(type, values := (*row.values(),)),) != _USUAL_TYPES:
        return None
    aliases, at, check, dtype, flags, head, method, name, parts, payload, shape, kind = values
    if kind != RECORD_TENSOR or flags or aliases or len(check) != 8 or len(parts) != 6:
        return None
    if not (0 <= at <= _MOST and 0 <= head <= _MOST and 0 <= payload <= _MOST):
        return None
    if {*map(type, parts)} != {int} or min(parts) < 0 or sum(parts) != payload:
        return None
    place = (at, head, payload, int.from_bytes(check, "little"), 0)
    return Entry(kind, name, *place, method, dtype, parse_shape(shape, limits), (*parts,))


def _entry(row: Any, limits: Limits) -> Entry:
    if usual := _usual(row, limits):
        return usual
    _sound(isinstance(row, dict) and row.keys() >= _ROW)
    kind, check = row["type"], row["check"]
    _sound(are_counts((row["at"], row["head"], row["payload"])) and are_counts((kind, row["flags"]), 0xFFFF))
    _sound(isinstance(check, bytes) and len(check) == 8)
    place = (row["at"], row["head"], row["payload"], int.from_bytes(check, "little"), row["flags"])
    if kind == RECORD_INDEX:
        raise FormatError("the index has a row of its own")
    if not needed(kind, row["flags"], row["at"]):
        _sound(row.keys() == _ROW)
        return Entry(kind, "", *place)
    _sound(row.keys() == _KEYS[kind] and isinstance(row["name"], str) and isinstance(row["method"], str))
    if kind == RECORD_ATTACHMENT:
        return Entry(kind, row["name"], *place, row["method"])
    parts = row["parts"]
    _sound(isinstance(row["dtype"], str) and isinstance(parts, list) and len(parts) == 6)
    if not are_counts(parts) or sum(parts) != row["payload"]:
        raise FormatError("parts of an index row do not add up to its payload")
    shape = parse_shape(row["shape"], limits)
    if kind == RECORD_OBJECT and (len(shape) != 2 or 0 in shape):
        raise FormatError("the index row of an object has no shape of a matrix")
    aliases = parse_aliases(row["aliases"]) if "aliases" in row else ()
    return Entry(kind, row["name"], *place, row["method"], row["dtype"], shape, tuple(parts), aliases)


def parse(record: Record, unit: bytes, header_size: int, limits: Limits) -> Index:
    """Check and decode an index record; its rows must cover the file from the header to the index exactly."""
    if record.type != RECORD_INDEX or record.flags:
        raise FormatError("the trailer does not point at an index", offset=record.at)
    units = wire.parse_units(record.head.get("units"), record.payload_size)
    size = record.head.get("size", -1)
    if record.head.keys() != {"size", "units"} or len(units) != 1 or not is_count(size):
        raise FormatError("index head is malformed", offset=record.at)
    if size > limits.index:
        raise LimitError(f"index of {size} bytes exceeds the limit of {limits.index}", offset=record.at)
    if zstd.xxh3(unit) != units[0].check:
        raise ChecksumError("checksum does not match", unit="index", offset=record.at)
    body = msg.unpack(zstd.decompress(unit, size), limits.depth)
    stated: tuple[Any, Any] = body.get("digest"), body.get("records")
    digest, rows = stated
    well = body.keys() == {"digest", "records"} and isinstance(digest, bytes) and isinstance(rows, list)
    if not well or len(digest) != 16:
        raise FormatError("index is malformed", unit="index", offset=record.at)
    entries = tuple(_entry(row, limits) for row in rows)
    _check_rows(entries, header_size, record.at, limits)
    return Index(entries, digest, record.at, record.end - record.at, header_size)


def _check_rows(entries: Iterable[Entry], at: int, end: int, limits: Limits) -> None:
    """The rows cover the file from `at` to `end`, no name is there twice, and the objects fit into memory."""
    held = 0
    kinds = {RECORD_TENSOR: "tensor", RECORD_ATTACHMENT: "attachment", RECORD_OBJECT: "object"}
    seen: dict[int, set[str]] = {kind: set() for kind in kinds}
    for e in entries:
        if e.at != at:
            raise FormatError("index rows leave a hole or overlap", unit="index", offset=e.at)
        at += e.size
        for name in e.names if e.type in seen else ():
            if name in seen[e.type]:
                raise FormatError(f"{kinds[e.type]} {name!r} is there twice", unit="index", offset=e.at)
            seen[e.type].add(name)
        if e.type == RECORD_OBJECT:
            held += 4 * math.prod(e.shape)
            if held > limits.objects:
                raise LimitError(f"objects of more than {limits.objects} bytes", unit="index", offset=e.at)
    if at != end:
        raise FormatError("index rows do not end where the index begins", unit="index", offset=at)


def needed(kind: int, flags: int, at: int) -> bool:
    """True for a record to read, False for one to skip; UnsupportedError for an unknown one that is needed."""
    if flags & ~FLAG_ANCILLARY:
        raise UnsupportedError("unknown critical record flags", offset=at)
    if kind in _KEYS or kind == RECORD_INDEX:
        if flags:
            raise FormatError("a tensor, attachment, object or index is marked as ancillary", offset=at)
        return True
    if flags & FLAG_ANCILLARY:
        return False
    raise UnsupportedError(f"record type {kind} is not known to this version", offset=at)


def check_type(record: Record) -> bool:
    """`needed` of a record."""
    return needed(record.type, record.flags, record.at)


def method_of(record: Record) -> str:
    """Name of the last stage of a record, as its index row states it."""
    stages = record.head.get("stages")
    last = stages[-1] if isinstance(stages, list) and stages else None
    method = last.get("id") if isinstance(last, dict) else None
    return method if isinstance(method, str) else ""


def match(e: Entry, record: Record) -> None:
    """FormatError unless the record at the place of an index row is the one that the row means."""
    same = (
        e.check == record.check
        and (e.at, e.head_size, e.payload_size) == (record.at, record.head_size, record.payload_size)
        and (e.type, e.flags) == (record.type, record.flags)
    )
    if e.type in _KEYS:
        same = same and record.head.get("name") == e.name and method_of(record) == e.method
    if e.type in (RECORD_TENSOR, RECORD_OBJECT):
        same = same and (record.head.get("dtype"), record.head.get("shape")) == (e.dtype, list(e.shape))
    if e.type == RECORD_TENSOR:
        same = same and record.head.get("aliases", []) == [list(a) for a in e.aliases]
    if not same:
        raise FormatError("the record is not the one that the index names", unit=repr(e.name), offset=record.at)
