"""Byte structures of a `.rac` file and their checks (format_spec/container.md)."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from rac.container import msg
from rac.container.zstd import xxh3
from rac.errors import ChecksumError, FormatError, LimitError, TruncatedError, UnsupportedError
from rac.records import Limits, Record, Units

MAGIC = b"\x89RAC\r\n\x1a\n"
END_MAGIC = b"\x89END\r\n\x1a\n"
MAJOR, MINOR = 0, 1
PRELUDE, RECORD_HEAD, TRAILER, ALIGN, STREAM_ALIGN = 32, 32, 32, 64, 16
_PRELUDE = struct.Struct("<8sHHIII")
_RECORD = struct.Struct("<4sHHIIQ")
_TRAILER = struct.Struct("<QQ")
_U64 = struct.Struct("<Q")


def pad(n: int, to: int = ALIGN) -> int:
    """Zero bytes that bring `n` to a multiple of `to`."""
    return -n % to


def padded(n: int) -> int:
    """`n` and its padding."""
    return n + -n % ALIGN


def header(head: dict[str, Any]) -> bytes:
    """Prelude, header and padding."""
    body = msg.pack(head)
    pre = _PRELUDE.pack(MAGIC, MAJOR, MINOR, 0, len(body), 0)
    return pre + _U64.pack(xxh3(pre, body)) + body + bytes(pad(PRELUDE + len(body)))


def parse_prelude(data: bytes, limits: Limits) -> int:
    """Length of the header behind a 32-byte prelude."""
    if len(data) < PRELUDE:
        if not MAGIC.startswith(data[:8]):
            raise FormatError("not a .rac file: wrong magic", offset=0)
        raise TruncatedError("file ends inside the prelude", offset=len(data))
    magic, major, _, _, size, _ = _PRELUDE.unpack_from(data)
    if magic != MAGIC:
        raise FormatError("not a .rac file: wrong magic", offset=0)
    if major != MAJOR:
        raise UnsupportedError(f"format version {major} is not supported (this reader knows {MAJOR})", offset=8)
    if size > limits.header:
        raise LimitError(f"header of {size} bytes exceeds the limit of {limits.header}", offset=16)
    return int(size)


def parse_header(prelude: bytes, body: bytes, padding: bytes, limits: Limits) -> dict[str, Any]:
    """Check and decode the header."""
    if xxh3(prelude[:24], body) != _U64.unpack_from(prelude, 24)[0]:
        raise ChecksumError("header checksum does not match", unit="header", offset=0)
    flags, zero = struct.unpack_from("<I4xI", prelude, 12)
    if flags or zero:
        raise UnsupportedError("unknown critical flags in the prelude", offset=12)
    if any(padding):
        raise FormatError("padding is not zero", unit="header", offset=PRELUDE + len(body))
    return msg.unpack(body, limits.depth)


def record_head(kind: int, flags: int, head: dict[str, Any], payload_size: int) -> tuple[bytes, int, int]:
    """(bytes in front of the payload, checksum, length of the msgpack head) of a record."""
    body = msg.pack(head)
    fixed = _RECORD.pack(b"RREC", kind, flags, len(body), 0, payload_size)
    check = xxh3(fixed, body)
    return fixed + _U64.pack(check) + body + bytes(pad(RECORD_HEAD + len(body))), check, len(body)


def parse_record(at: int, fixed: bytes, limits: Limits) -> tuple[int, int, int, int, int]:
    """(type, flags, head length, payload length, checksum) of a 32-byte fixed record head."""
    if len(fixed) < RECORD_HEAD:
        raise TruncatedError("file ends inside a record head", offset=at + len(fixed))
    magic, kind, flags, size, _, payload = _RECORD.unpack_from(fixed)
    if magic != b"RREC":
        raise FormatError("no record starts here", offset=at)
    if size > limits.head:
        raise LimitError(f"record head of {size} bytes exceeds the limit of {limits.head}", offset=at)
    if payload > 1 << 62:
        raise FormatError("record payload length is out of range", offset=at + 16)
    return kind, flags, size, payload, _U64.unpack_from(fixed, 24)[0]


def head_end(data: bytes) -> int:
    """Bytes of a record's head with its padding, as `data` states, which begins with it and was not checked yet."""
    end = RECORD_HEAD + int.from_bytes(data[8:12], "little")
    return end + pad(end)


def parse_record_body(at: int, data: bytes, limits: Limits) -> Record:
    """Check and decode the head of a record: `data` has it, and may have bytes of the payload behind it."""
    kind, flags, size, payload, check = parse_record(at, data[:RECORD_HEAD], limits)
    end = RECORD_HEAD + size
    start = end + pad(end)
    if len(data) < start:
        raise TruncatedError("file ends inside a record head", offset=at)
    body = data[RECORD_HEAD:end]
    if xxh3(data[:24] + body) != check:
        raise ChecksumError("record head checksum does not match", offset=at)
    if flags & ~1 or data[12:16] != bytes(4):
        raise UnsupportedError("unknown critical record flags", offset=at + 6)
    if any(data[end:start]):
        raise FormatError("padding is not zero", offset=at + end)
    return Record(kind, flags, at, msg.unpack(body, limits.depth), size, at + start, payload, check)


class Listed(list[bytes | memoryview]):
    """Units whose directory is known."""

    def __init__(self, units: Iterable[bytes | memoryview], table: bytes) -> None:
        """`table`: their directory."""
        super().__init__(units)
        self.table = table


def joined(parts: Sequence[Sequence[bytes | memoryview]]) -> Listed:
    """The units of all parts."""
    return Listed(itertools.chain.from_iterable(parts), b"".join(map(directory, parts)))


def directory(units: Sequence[bytes | memoryview]) -> bytes:
    """16 bytes per unit: length and XXH3-64."""
    if isinstance(units, Listed):
        return units.table
    return b"".join(struct.pack("<QQ", len(u), xxh3(u)) for u in units)


def payload_size(units: bytes) -> int:
    """Bytes that the units of a directory take, each with its padding."""
    sizes: tuple[int, ...] = struct.unpack(f"<{len(units) // 8}Q", units)[::2]
    return sum(sizes) + sum(-size % STREAM_ALIGN for size in sizes)


def parse_units(data: Any, payload_size: int) -> Units:
    """Unit table of a record; together the 16-byte aligned units fill the payload exactly."""
    if not isinstance(data, bytes) or len(data) % 16:
        raise FormatError("unit directory is malformed")
    stated = struct.unpack(f"<{len(data) // 8}Q", data)
    sizes = stated[::2]
    starts = [*itertools.accumulate([size + -size % STREAM_ALIGN for size in sizes], initial=0)]
    if starts[-1] != payload_size:
        raise FormatError("units do not fill the payload exactly")
    return Units(starts, sizes, stated[1::2])


def trailer(at: int, size: int) -> bytes:
    """The last 32 bytes: offset and size of the index record, checksum, end magic."""
    body = _TRAILER.pack(at, size)
    return body + _U64.pack(xxh3(body)) + END_MAGIC


def parse_trailer(data: bytes) -> tuple[int, int]:
    """(offset, size) of the index record."""
    if len(data) != TRAILER or data[24:] != END_MAGIC:
        raise TruncatedError("file has no trailer: it is cut off, was never finished, or is still being written")
    if xxh3(data[:16]) != _U64.unpack_from(data, 16)[0]:
        raise ChecksumError("trailer checksum does not match", unit="trailer")
    return _TRAILER.unpack_from(data)
