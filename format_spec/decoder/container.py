"""Pieces of an archive, container.md sections 5, 6, 8, 11 and 12."""

import io
from dataclasses import dataclass
from math import prod
from os import PathLike
from typing import BinaryIO

import xxhash

from .errors import (
    MAX_PAYLOAD,
    ChecksumError,
    FormatError,
    LimitError,
    Limits,
    TruncatedError,
    UnsupportedError,
)
from .frames import decompress
from .structure import (
    Map,
    as_aliases,
    as_array,
    as_binary,
    as_count,
    as_counts,
    as_map,
    as_text,
    check_keys,
    parse_map,
)
from .tensors import (
    check_shape,
    read_unit,
    unit_directory,
)

MAGIC = b"\x89RAC\r\n\x1a\n"
RECORD_MAGIC = b"RREC"
END_MAGIC = b"\x89END\r\n\x1a\n"
TENSOR, ATTACHMENT, OBJECT, INDEX = 1, 2, 3, 4
PIECE = 1 << 20

Source = bytes | bytearray | memoryview | str | PathLike[str]


class Input:
    """Bytes in order; a false length costs no more memory than what arrives (RAC-SEC-003)."""

    def __init__(self, source: Source) -> None:
        self.file: BinaryIO
        if isinstance(source, bytes | bytearray | memoryview):
            self.file = io.BytesIO(source)
        else:
            self.file = open(source, "rb")  # noqa: SIM115
        self.at = 0

    def some(self, size: int) -> bytes:
        """At most size bytes; fewer only at the end."""
        pieces = []
        while size:
            piece = self.file.read(min(size, PIECE))
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
            self.at += len(piece)
        return b"".join(pieces)

    def read(self, size: int) -> bytes:
        data = self.some(size)
        if len(data) < size:
            raise TruncatedError(f"RAC-FWD-002, RAC-RAR-003: archive ends at {self.at}")
        return data

    def zeros(self, size: int) -> None:
        if any(self.read(size)):
            raise FormatError(f"RAC-CNV-001: padding before {self.at} is not zero")

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.read(min(size, PIECE)))

    def seek(self, at: int) -> None:
        self.at = self.file.seek(at)

    def size(self) -> int:
        size = self.file.seek(0, io.SEEK_END)
        self.file.seek(self.at)
        return size

    def close(self) -> None:
        self.file.close()


def u(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


# Section 5.


@dataclass(frozen=True)
class Header:
    end: int  # where the first record begins
    metadata: dict[str, str]
    provenance: Map
    shard: tuple[int, int]


def read_header(source: Input, limits: Limits) -> Header:
    prelude = source.some(32)
    if len(prelude) < 32:  # RAC-PRE-001
        if not MAGIC.startswith(prelude[:8]):
            raise FormatError("RAC-PRE-001: not a RAC archive")
        raise TruncatedError("RAC-PRE-001: archive ends inside the prelude")
    if prelude[:8] != MAGIC:
        raise FormatError("RAC-PRE-002: not a RAC archive")
    if u(prelude, 8, 2) != 0:  # any minor version is read, RAC-PRE-009
        raise UnsupportedError(f"RAC-PRE-003: major version {u(prelude, 8, 2)}")
    length = u(prelude, 16, 4)
    if length > limits.header:
        raise LimitError("RAC-PRE-005: header")
    header, padding = source.read(length), source.read(-(32 + length) % 64)  # RAC-PRE-006
    if xxhash.xxh3_64_intdigest(prelude[:24] + header) != u(prelude, 24, 8):
        raise ChecksumError("RAC-PRE-007: checksum of the header")
    if u(prelude, 12, 4) or u(prelude, 20, 4):
        raise UnsupportedError("RAC-PRE-004: flags or reserved field of the prelude")
    if any(padding):
        raise FormatError("RAC-PRE-008: padding of the header")
    table = parse_map(header)
    optional = {"metadata", "provenance", "shard"}
    check_keys(table, {"features"}, optional, ("RAC-HDR-001", "RAC-HDR-005"))
    features = [as_text(item, "RAC-HDR-001") for item in as_array(table["features"], "RAC-HDR-001")]
    if features:
        raise UnsupportedError(f"RAC-HDR-002: feature {features[0]!r}")
    metadata = {
        key: as_text(value, "RAC-HDR-003") for key, value in as_map(table.get("metadata", {}), "RAC-HDR-003").items()
    }
    provenance = as_map(table.get("provenance", {}), "RAC-HDR-003")
    k, n = as_counts(table.get("shard", [1, 1]), "RAC-HDR-004", 2)
    if not 1 <= k <= n:
        raise FormatError("RAC-HDR-004: shard")
    return Header(source.at, metadata, provenance, (k, n))


# Section 6.


@dataclass(frozen=True)
class Record:
    at: int
    type: int
    flags: int
    head_length: int
    payload: int
    check: bytes
    head: Map

    @property
    def size(self) -> int:
        return record_size(self.head_length, self.payload)

    def row(self) -> Map:
        """The keys of "all" that the index has for this record."""
        return {
            "type": self.type,
            "flags": self.flags,
            "at": self.at,
            "head": self.head_length,
            "payload": self.payload,
            "check": self.check,
        }


def record_size(head_length: int, payload: int) -> int:
    return 64 * (-(-(32 + head_length) // 64) + -(-payload // 64))


def read_record(source: Input, limits: Limits) -> Record:
    """Everything in front of the payload."""
    at = source.at
    fixed = source.read(32)  # RAC-REC-001
    if fixed[:4] != RECORD_MAGIC:
        raise FormatError("RAC-REC-002, RAC-LAY-001: no record here")
    length, payload = u(fixed, 8, 4), u(fixed, 16, 8)
    if length > limits.head:
        raise LimitError("RAC-REC-004: record head")
    if payload > MAX_PAYLOAD:
        raise FormatError("RAC-REC-005: payload length")
    head, padding = source.read(length), source.read(-(32 + length) % 64)  # RAC-REC-006
    if xxhash.xxh3_64_intdigest(fixed[:24] + head) != u(fixed, 24, 8):
        raise ChecksumError("RAC-REC-007: checksum of a record head")
    kind, flags = u(fixed, 4, 2), u(fixed, 6, 2)
    if flags & 0xFFFE or u(fixed, 12, 4):
        raise UnsupportedError("RAC-REC-003: flags or reserved field of a record")
    if any(padding):
        raise FormatError("RAC-REC-008: padding of a record head")
    table = parse_map(head)
    check_type(kind, flags)
    return Record(at, kind, flags, length, payload, fixed[24:], table)


def check_type(kind: int, flags: int) -> None:
    """Section 8."""
    if flags & ~1:
        raise UnsupportedError("RAC-REC-003: flags of a record")
    ancillary = bool(flags & 1)
    if kind in (TENSOR, ATTACHMENT, OBJECT, INDEX):
        if ancillary:
            raise FormatError("RAC-REC-009: ancillary flag")
    elif not ancillary:
        raise UnsupportedError(f"RAC-REC-011: record type {kind}")


# Section 11.

ROW_ALL = {"type", "flags", "at", "head", "payload", "check"}
ROW_NAMED = ROW_ALL | {"name", "method"}
ROW_OBJECT = ROW_NAMED | {"dtype", "shape", "parts"}
ROW_TENSOR = ROW_OBJECT | {"aliases"}


@dataclass(frozen=True)
class Index:
    digest: bytes
    rows: list[Map]


def read_index(source: Input, record: Record, header: Header, limits: Limits) -> Index:
    """The payload of the index record and its padding."""
    if record.head.keys() != {"size", "units"}:
        raise FormatError("RAC-IDX-001: keys of the index head")
    size = as_count(record.head["size"], "RAC-IDX-001")
    units = unit_directory(as_binary(record.head["units"], "RAC-UNI-001"), record.payload)
    if len(units) != 1:
        raise FormatError("RAC-IDX-001: number of units")
    if max(size, record.payload) > limits.index:
        raise LimitError("RAC-IDX-002: index")
    unit = read_unit(source, units[0])  # RAC-IDX-003
    source.zeros(-record.payload % 64)
    table = parse_map(decompress(unit, size))
    if table.keys() != {"digest", "records"}:
        raise FormatError("RAC-IDX-004: keys of the index map")
    digest = as_binary(table["digest"], "RAC-IDX-004", 16)
    rows = [as_map(row, "RAC-IDX-004") for row in as_array(table["records"], "RAC-IDX-004")]
    at = header.end
    names: dict[int, set[str]] = {TENSOR: set(), ATTACHMENT: set(), OBJECT: set()}
    objects = 0
    for row in rows:
        check_row(row, limits)
        if row["at"] != at:
            raise FormatError("RAC-IDX-009: records do not follow each other")
        at += record_size(as_count(row["head"], "RAC-IDX-005"), as_count(row["payload"], "RAC-IDX-005"))
        kind = as_count(row["type"], "RAC-IDX-005")
        if kind == OBJECT:
            objects += 4 * prod(as_counts(row["shape"], "RAC-IDX-005"))
            if objects > limits.objects:
                raise LimitError("RAC-OBJ-005: objects")
        if kind in names:
            seen = names[kind]
            for name in row_names(row):
                if name in seen:
                    raise FormatError(f"RAC-IDX-010: name {name!r} is there twice")
                seen.add(name)
    if at != record.at:
        raise FormatError("RAC-IDX-009: last record does not end at the index")
    return Index(digest, rows)


def check_row(row: Map, limits: Limits) -> None:
    for key in ROW_ALL:
        if key not in row:
            raise FormatError(f"RAC-IDX-005: key {key!r} is missing")
    for key in ROW_ALL - {"check"}:
        as_count(row[key], "RAC-IDX-005")
    as_binary(row["check"], "RAC-IDX-005", 8)
    kind, flags = as_count(row["type"], "RAC-IDX-005"), as_count(row["flags"], "RAC-IDX-005")
    if max(kind, flags) > 0xFFFF:
        raise FormatError("RAC-IDX-005: type or flags above 65535")
    if kind == INDEX:
        raise FormatError("RAC-IDX-006: row of type 4")
    check_type(kind, flags)
    if row.keys() != {TENSOR: ROW_TENSOR, ATTACHMENT: ROW_NAMED, OBJECT: ROW_OBJECT}.get(kind, ROW_ALL):
        raise FormatError("RAC-IDX-005: keys of a row")
    if kind in (TENSOR, ATTACHMENT, OBJECT):
        as_text(row["name"], "RAC-IDX-005")
        as_text(row["method"], "RAC-IDX-005")
    if kind in (TENSOR, OBJECT):
        as_text(row["dtype"], "RAC-IDX-005")
        shape = as_counts(row["shape"], "RAC-IDX-005")
        check_shape(shape, limits)  # RAC-IDX-008
        if kind == OBJECT and (len(shape) != 2 or 0 in shape):
            raise FormatError("RAC-IDX-008: shape of an object is not that of a matrix")
        as_aliases(row.get("aliases", []), "RAC-IDX-005")
        if sum(as_counts(row["parts"], "RAC-IDX-005", 6)) != row["payload"]:
            raise FormatError("RAC-IDX-007: parts")


def row_names(row: Map) -> list[str]:
    """All names of a tensor, attachment or object."""
    aliases = as_aliases(row.get("aliases", []), "RAC-IDX-005")
    return [as_text(row["name"], "RAC-IDX-005"), *(name for name, _ in aliases)]


def compare_row(row: Map, record: Map) -> None:
    """RAC-IDX-011, and RAC-IDX-012 where the record's side has `parts`."""
    for key, value in record.items():
        if row.get(key) != value:
            clause = "RAC-IDX-012" if key == "parts" else "RAC-IDX-011"
            raise FormatError(f"{clause}: index and record differ in {key!r}")


# Section 12.


def check_trailer(trailer: bytes) -> tuple[int, int]:
    """Offset and size of the index record."""
    if trailer[24:] != END_MAGIC:
        raise TruncatedError("RAC-TRL-001: no end magic")
    if xxhash.xxh3_64_intdigest(trailer[:16]) != u(trailer, 16, 8):
        raise ChecksumError("RAC-TRL-002: checksum of the trailer")
    return u(trailer, 0, 8), u(trailer, 8, 8)
