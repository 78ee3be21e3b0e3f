"""Prelude, records, units and trailer: every check of container.md, sections 5 to 7 and 12."""

from __future__ import annotations

import struct

import pytest

from rac.container import wire
from rac.container.zstd import digest, xxh3
from rac.errors import ChecksumError, FormatError, LimitError, TruncatedError, UnsupportedError
from rac.records import Limits, record_size

LIMITS = Limits()


def test_checksums_of_the_text():
    assert xxh3(b"") == 0x2D06800538D394C2
    assert xxh3(b"abc") == xxh3(b"a", b"bc") == 0x78AF5F94892F3950
    assert digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert digest(b"abc").hex() == "06b05ab6733a618578af5f94892f3950"


def split(data):
    size = int.from_bytes(data[16:20], "little")
    return data[:32], data[32 : 32 + size], data[32 + size :]


def sealed(data, at=0, size=None):
    """The checksum at 24 made right again."""
    size = len(split(data)[1]) if size is None else size
    return data[:24] + struct.pack("<Q", xxh3(data[:24], data[32 : 32 + size])) + data[32:]


def test_header():
    data = wire.header({"features": []})
    assert data == bytes.fromhex("89524143 0d0a1a0a 0000 0100 00000000 0b000000 00000000") + struct.pack(
        "<Q", xxh3(data[:24], data[32:43])
    ) + b"\x81\xa8features\x90" + bytes(21)
    pre, body, padding = split(data)
    assert wire.parse_prelude(pre, LIMITS) == 11
    assert wire.parse_header(pre, body, padding, LIMITS) == {"features": []}
    for n in range(32):
        with pytest.raises(TruncatedError):
            wire.parse_prelude(data[:n], LIMITS)
        if n:
            with pytest.raises(FormatError, match="wrong magic") as e:
                wire.parse_prelude(b"x" + data[1:n], LIMITS)
            assert not isinstance(e.value, TruncatedError)
    for at in range(8):
        bad = bytearray(pre)
        bad[at] ^= 1
        with pytest.raises(FormatError, match="wrong magic"):
            wire.parse_prelude(bytes(bad), LIMITS)
    with pytest.raises(UnsupportedError, match="version 1 "):
        wire.parse_prelude(pre[:8] + b"\x01\x00" + pre[10:], LIMITS)
    for size, error in ((LIMITS.header, None), (LIMITS.header + 1, LimitError), (2**32 - 1, LimitError)):
        head = pre[:16] + struct.pack("<I", size) + pre[20:]
        if error:
            with pytest.raises(error):
                wire.parse_prelude(head, LIMITS)
        else:
            assert wire.parse_prelude(head, LIMITS) == size
    for at in range(24):  # the checksum comes before what the fields mean
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises(ChecksumError):
            wire.parse_header(bytes(bad[:32]), body, padding, LIMITS)
    for at in (12, 15, 20, 23):
        bad = bytearray(data)
        bad[at] = 1
        pre, _, _ = split(sealed(bytes(bad), size=11))
        with pytest.raises(UnsupportedError):
            wire.parse_header(pre, body, padding, LIMITS)
    with pytest.raises(FormatError, match="padding"):
        wire.parse_header(split(data)[0], body, padding[:-1] + b"\1", LIMITS)
    newer = sealed(data[:10] + b"\x09\x00" + data[12:])
    assert wire.parse_header(split(newer)[0], body, padding, LIMITS) == {"features": []}


def test_record_head():
    data, check, size = wire.record_head(1, 0, {"a": 1}, 100)
    assert (size, len(data), check) == (4, 64, xxh3(data[:24], data[32:36]))
    assert data[:32] == b"RREC" + struct.pack("<HHIIQQ", 1, 0, 4, 0, 100, check)
    assert record_size(4, 100) == 64 + 128
    fixed, body, padding = data[:32], data[32:36], data[36:]
    record = wire.parse_record_body(128, data, LIMITS)
    assert (record.type, record.flags, record.at, record.head) == (1, 0, 128, {"a": 1})
    assert (record.payload, record.payload_size, record.end) == (192, 100, 320)
    for n in range(32):
        with pytest.raises(TruncatedError):
            wire.parse_record(0, fixed[:n], LIMITS)
    with pytest.raises(FormatError, match="no record"):
        wire.parse_record(0, b"RREX" + fixed[4:], LIMITS)
    with pytest.raises(LimitError):
        wire.parse_record(0, fixed[:8] + struct.pack("<I", LIMITS.head + 1) + fixed[12:], LIMITS)
    with pytest.raises(FormatError, match="out of range"):
        wire.parse_record(0, fixed[:16] + struct.pack("<Q", (1 << 62) + 1) + fixed[24:], LIMITS)
    assert wire.head_end(data) == len(data)
    for cut in (data[:32], data[:35], data[:-1]):
        with pytest.raises(TruncatedError):
            wire.parse_record_body(0, cut, LIMITS)
    for at in [*range(4, 8), *range(12, 24)]:
        bad = bytearray(fixed)
        bad[at] ^= 1
        with pytest.raises(ChecksumError):
            wire.parse_record_body(0, bytes(bad) + body + padding, LIMITS)
    with pytest.raises(FormatError, match="padding"):
        wire.parse_record_body(0, fixed + body + b"\1" + padding[1:], LIMITS)
    for at, value in ((6, 2), (7, 128), (12, 1), (15, 1)):
        bad = bytearray(data)
        bad[at] = value
        with pytest.raises(UnsupportedError, match="critical"):
            wire.parse_record_body(0, sealed(bytes(bad), size=4)[:32] + body + padding, LIMITS)


def test_units():
    units = [b"a" * 3, b"", b"b" * 16, b"c" * 17]
    table = wire.directory(units)
    assert len(table) == 64
    found = wire.parse_units(table, 16 + 0 + 16 + 32)
    assert [(u.offset, u.size, u.check) for u in found] == [
        (0, 3, xxh3(b"aaa")),
        (16, 0, xxh3(b"")),
        (16, 16, xxh3(b"b" * 16)),
        (32, 17, xxh3(b"c" * 17)),
    ]
    assert [*found[1:3]] == [found[1], found[2]] == [found[-3], found[-2]]
    assert (found[1:3].starts, len(found[2:2]), len(found[3:9])) == ([16, 16, 32], 0, 1)
    with pytest.raises(IndexError):
        found[4]
    assert [*wire.parse_units(b"", 0)] == []
    for bad, payload in ((table, 63), (table, 65), (table[:-1], 64), (table[:-16], 64), ("units", 64), (None, 0)):
        with pytest.raises(FormatError):
            wire.parse_units(bad, payload)
    for size in ((1 << 64) - 1, 1 << 63, (1 << 64) - 15):
        with pytest.raises(FormatError):
            wire.parse_units(struct.pack("<QQ", size, 0), 0)
        with pytest.raises(FormatError):
            wire.parse_units(struct.pack("<QQ", size, 0) * 2, (2 * size) % (1 << 64))


def test_trailer():
    data = wire.trailer(0x180, 256)
    assert data == bytes.fromhex("8001000000000000 0001000000000000 6f05268a1cfd3044 89454e44 0d0a1a0a")
    assert wire.parse_trailer(data) == (0x180, 256)
    for at in range(32):
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises(TruncatedError if at >= 24 else ChecksumError):
            wire.parse_trailer(bytes(bad))
    for n in range(32):
        with pytest.raises(TruncatedError):
            wire.parse_trailer(data[:n])
