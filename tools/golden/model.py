"""An archive as plain fields, each of which can be overruled, and its bytes.

`build` fills in every length, offset and checksum that is not overruled, so that one changed field is the only fault
of the result. `parse` is the inverse for whole archives.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rac.container import msg, wire, zstd
from rac.records import Limits, record_size

Map = dict[str, Any]
TENSOR, ATTACHMENT, OBJECT, INDEX = 1, 2, 3, 4


def up(n: int, to: int) -> int:
    """`n` rounded up to a multiple of `to`."""
    return -(-n // to) * to


@dataclass
class Record:
    """One record. None means: what belongs there."""

    type: int
    head: Any
    """A map, packed with its `units` filled in where absent; or the bytes as they are."""
    units: list[bytes] = field(default_factory=list)
    flags: int = 0
    reserved: int = 0
    magic: bytes = b"RREC"
    payload: bytes | None = None
    head_size: int | None = None
    payload_size: int | None = None
    check: int | None = None
    head_pad: bytes | None = None
    pad: bytes | None = None
    row: Map = field(default_factory=dict)
    """Keys of the index row to replace."""
    parts: tuple[int, ...] | None = None

    def body(self) -> bytes:
        """The payload."""
        if self.payload is not None:
            return self.payload
        return b"".join(u + bytes(-len(u) % 16) for u in self.units)

    def encode(self, at: int) -> tuple[bytes, Map]:
        """(bytes, index row) of the record at offset `at`."""
        payload = self.body()
        head = self.head
        if isinstance(head, dict):
            if self.type in (TENSOR, ATTACHMENT, OBJECT, INDEX) and "units" not in head:
                head = head | {"units": wire.directory(self.units)}
            head = msg.pack({k: v for k, v in head.items() if v is not DROP})
        h = len(head) if self.head_size is None else self.head_size
        p = len(payload) if self.payload_size is None else self.payload_size
        fixed = struct.pack("<4sHHIIQ", self.magic, self.type, self.flags, h, self.reserved, p)
        check = zstd.xxh3(fixed, head) if self.check is None else self.check
        head_pad = bytes(-(32 + len(head)) % 64) if self.head_pad is None else self.head_pad
        pad = bytes(-len(payload) % 64) if self.pad is None else self.pad
        if (len(payload) + len(pad)) % 64:  # or another fault would hide the one that is meant
            raise ValueError(f"{len(pad)} bytes of padding behind a payload of {len(payload)}")
        out = fixed + struct.pack("<Q", check) + head + head_pad + payload + pad
        row: Map = {
            "type": self.type,
            "flags": self.flags,
            "at": at,
            "head": h,
            "payload": p,
            "check": struct.pack("<Q", check),
        }
        if self.type in (TENSOR, ATTACHMENT, OBJECT):
            map_ = self.head if isinstance(self.head, dict) else {}
            stages = map_.get("stages")
            row["name"] = map_.get("name", "")
            last = stages[-1] if isinstance(stages, list) and stages else None
            method = last.get("id") if isinstance(last, dict) else None
            row["method"] = method if isinstance(method, str) else ""
            if self.type in (TENSOR, OBJECT):
                row |= {k: map_.get(k, d) for k, d in (("dtype", ""), ("shape", []))}
                row["parts"] = list(self.parts or self.plain_parts())
            if self.type == TENSOR:
                row["aliases"] = map_.get("aliases", [])
        return out, {k: v for k, v in (row | self.row).items() if v is not DROP}

    def plain_parts(self) -> list[int]:
        """`parts` of a payload that is not lanes/1."""
        raw = sum(len(u) for u in self.units)
        return [0, 0, 0, 0, raw, len(self.body()) - raw]


DROP: Any = object()
"""Value of a key that is to be left out."""


@dataclass
class Archive:
    """A whole archive. None means: what belongs there."""

    header: Any = field(default_factory=lambda: {"features": []})
    records: list[Record] = field(default_factory=list)
    magic: bytes = wire.MAGIC
    major: int = 0
    minor: int = 1
    flags: int = 0
    reserved: int = 0
    header_size: int | None = None
    header_check: int | None = None
    header_pad: bytes | None = None
    digest: bytes | None = None
    patch_index: Callable[[Map], Any] | None = None
    """Gets the index map and changes it, or returns the bytes to put in its place."""
    index_unit: Callable[[bytes], bytes] = zstd.compress
    patch_record: Callable[[Record], None] | None = None
    """Gets the index record and changes it."""
    patch_trailer: Callable[[int, int], tuple[int, int]] | None = None
    trailer_check: int | None = None
    end_magic: bytes = wire.END_MAGIC
    tail: bytes = b""

    def __getitem__(self, name: str) -> Record:
        """The record of that name."""
        return next(r for r in self.records if isinstance(r.head, dict) and r.head.get("name") == name)

    def content_digest(self) -> bytes:
        """Container section 13."""
        rows = []
        for r in self.records:
            if r.type == TENSOR and isinstance(r.head, dict):
                for name in (r.head["name"], *(a for a, _ in r.head.get("aliases", []))):
                    rows.append([name, r.head["dtype"], list(r.head["shape"]), r.head["digest"]])
        rows.sort(key=lambda row: row[0].encode())
        return zstd.digest(msg.pack(rows))

    def build(self) -> bytes:
        """The bytes."""
        header = self.header if isinstance(self.header, bytes) else msg.pack(self.header)
        size = len(header) if self.header_size is None else self.header_size
        pre = struct.pack("<8sHHIII", self.magic, self.major, self.minor, self.flags, size, self.reserved)
        check = zstd.xxh3(pre, header) if self.header_check is None else self.header_check
        pad = bytes(-(32 + len(header)) % 64) if self.header_pad is None else self.header_pad
        out = pre + struct.pack("<Q", check) + header + pad
        rows = []
        for r in self.records:
            data, row = r.encode(len(out))
            out += data
            rows.append(row)
        if self.digest is None:
            try:
                digest = self.content_digest()
            except (KeyError, TypeError, ValueError, AttributeError):  # of a head that is broken on purpose
                digest = bytes(16)
        else:
            digest = self.digest
        index: Map = {"digest": digest, "records": rows}
        body = self.patch_index(index) if self.patch_index else None
        if not isinstance(body, bytes):
            body = msg.pack(index)
        record = Record(INDEX, {"size": len(body)}, [self.index_unit(body)])
        if self.patch_record:
            self.patch_record(record)
        at = len(out)
        data, _ = record.encode(at)
        size = len(data)
        if self.patch_trailer:
            at, size = self.patch_trailer(at, size)
        end = struct.pack("<QQ", at, size)
        check = zstd.xxh3(end) if self.trailer_check is None else self.trailer_check
        return out + data + end + struct.pack("<Q", check) + self.end_magic + self.tail


def parse(data: bytes) -> Archive:
    """Fields of a whole archive: `parse(x).build()` is `x`. Raises a RacError on others."""
    limits = Limits()
    size = wire.parse_prelude(data[:32], limits)
    at = up(32 + size, 64)
    header = wire.parse_header(data[:32], data[32 : 32 + size], b"", limits)
    out = Archive(header, minor=struct.unpack_from("<H", data, 10)[0])
    end, _ = wire.parse_trailer(data[-32:])
    while at < end:
        kind, flags, h, p, _ = wire.parse_record(at, data[at : at + 32], limits)
        start = at + up(32 + h, 64)
        head = msg.unpack(data[at + 32 : at + 32 + h])
        r = Record(kind, head, [], flags)
        if kind in (TENSOR, ATTACHMENT, OBJECT):
            units = wire.parse_units(head.pop("units"), p)
            r.units = [data[start + u.offset : start + u.offset + u.size] for u in units]
        else:
            r.payload = data[start : start + p]
        out.records.append(r)
        at += record_size(h, p)
    start = end + up(32 + struct.unpack_from("<I", data, end + 8)[0], 64)
    head = msg.unpack(data[end + 32 : end + 32 + struct.unpack_from("<I", data, end + 8)[0]])
    unit = data[start : start + struct.unpack_from("<Q", head["units"])[0]]
    rows = msg.unpack(zstd.decompress(unit, head["size"]))["records"]
    for r, row in zip(out.records, rows, strict=True):
        if r.type in (TENSOR, OBJECT):
            r.parts = tuple(row["parts"])
    return out
