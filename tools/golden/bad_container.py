"""Bad archives of the container: prelude, header, structured data, records, units."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from golden.cases import (
    CHECKSUM,
    CONFIG,
    FORMAT,
    LANES,
    LIMIT,
    RAW,
    TRUNCATED,
    UNSUPPORTED,
    Patch,
    both,
    case,
    cut,
    directory,
    fields,
    flip,
    header,
    index_record,
    keep,
    record,
    row,
    set_bytes,
)
from golden.good import tensor
from golden.model import DROP, OBJECT, Archive, Record
from rac.container import msg, wire

# Prelude and header

keep(RAW)

case("magic", FORMAT, "PRE-002", "The first byte is that of another format.", fields(magic=b"\x88RAC\r\n\x1a\n"))
case("magic-text", FORMAT, "PRE-002", "CR LF became LF, as in a transfer as text.", fields(magic=b"\x89RAC\n\x1a\n\0"))
case("cut-0", TRUNCATED, "PRE-001", "No bytes at all.", cut(lambda d: 0))
case("cut-5", TRUNCATED, "PRE-001", "Ends inside the magic.", cut(lambda d: 5))
case("cut-31", TRUNCATED, "PRE-001", "Ends inside the prelude.", cut(lambda d: 31))
case("short-other", FORMAT, "PRE-001", "Short, and the bytes do not begin the magic.", lambda a: b"\x89RAX")
case("major", UNSUPPORTED, "PRE-003", "Major version 1.", fields(major=1))
case("major-65535", UNSUPPORTED, "PRE-003", "Major version 65535.", fields(major=65535))
case("flags", UNSUPPORTED, "PRE-004", "Bit 0 of the prelude flags is set.", fields(flags=1))
case("flags-31", UNSUPPORTED, "PRE-004", "Bit 31 of the prelude flags is set.", fields(flags=1 << 31))
case("reserved", UNSUPPORTED, "PRE-004", "The reserved field of the prelude is not 0.", fields(reserved=1))
case("header-limit", LIMIT, "PRE-005", "States a header of 16 MiB + 1.", fields(header_size=(16 << 20) + 1))
case("header-4g", LIMIT, "PRE-005", "States a header of 2^32 - 1 bytes.", fields(header_size=(1 << 32) - 1))
case("header-long", TRUNCATED, "PRE-006", "States a header of 1 MiB.", fields(header_size=1 << 20))
case("cut-header", TRUNCATED, "PRE-006", "Ends inside the header.", cut(lambda d: 40))
case("header-checksum", CHECKSUM, "PRE-007", "The checksum of the header is another.", fields(header_check=1))
case(
    "header-padding",
    FORMAT,
    "PRE-008",
    "The padding of the header is not zero.",
    lambda a: set_bytes(32 + len(msg.pack(a.header)), b"\1")(a.build()),
)
case("features-missing", FORMAT, "HDR-001", "No `features`.", header(features=DROP))
case("features-text", FORMAT, "HDR-001", "`features` is a text.", header(features="none"))
case("features-int", FORMAT, "HDR-001", "`features` holds a number.", header(features=[1]))
case("feature", UNSUPPORTED, "HDR-002", "Needs a feature that is not assigned.", header(features=["x-new"]))
case("metadata-int", FORMAT, "HDR-003", "A value of `metadata` is a number.", header(metadata={"a": 1}))
case("metadata-array", FORMAT, "HDR-003", "`metadata` is an array.", header(metadata=[]))
case("provenance-text", FORMAT, "HDR-003", "`provenance` is a text.", header(provenance="me"))
for _name, _shard in (
    ("zero", [0, 1]),
    ("beyond", [3, 2]),
    ("one", [1]),
    ("three", [1, 1, 1]),
    ("bool", [True, 1]),
    ("negative", [1, -1]),
    ("text", "1/1"),
    ("null", None),
    ("large", [1, (1 << 62) + 1]),
):
    case(f"shard-{_name}", FORMAT, "HDR-004", f"`shard` is {_shard}.", header(shard=_shard))
case("header-key", UNSUPPORTED, "HDR-005", "The header has a key that is not assigned.", header(colour="red"))
case("header-key-x", UNSUPPORTED, "HDR-005", "A key begins with x but not with x-.", header(xy=1))

# Structured data, in the header

keep()

FEATURES = b"\xa8features\x90"


def raw_header(body: bytes) -> Patch:
    """These bytes for the header."""
    return fields(header=body)


def value(code: bytes) -> bytes:
    """A header whose key "x-" has the value of these bytes."""
    return b"\x82" + FEATURES + b"\xa2x-" + code


for _name, _clause, _why, _body in (
    ("behind", "001", "A byte follows the map.", b"\x81" + FEATURES + b"\0"),
    ("array", "001", "An array, not a map.", b"\x91" + FEATURES[:-1]),
    ("text", "001", "A text, not a map.", b"\xa8features"),
    ("nothing", "001", "No value at all.", b""),
    ("uint8", "002", "5 in two bytes.", value(b"\xcc\x05")),
    ("uint16", "002", "255 in three bytes.", value(b"\xcd\x00\xff")),
    ("uint32", "002", "65535 in five bytes.", value(b"\xce\0\0\xff\xff")),
    ("uint64", "002", "2^32 - 1 in nine bytes.", value(b"\xcf\0\0\0\0\xff\xff\xff\xff")),
    ("int8", "002", "5 in signed form.", value(b"\xd0\x05")),
    ("int8-fix", "002", "-32 in two bytes.", value(b"\xd0\xe0")),
    ("int16", "002", "-128 in three bytes.", value(b"\xd1\xff\x80")),
    ("int64", "002", "2^40 in signed form.", value(b"\xd3\0\0\1\0\0\0\0\0")),
    ("str8", "002", "A text of 3 bytes with a length byte of its own.", value(b"\xd9\x03abc")),
    ("str16", "002", "A text of 40 bytes with two length bytes.", value(b"\xda\x00\x28" + b"a" * 40)),
    ("key-str8", "002", "A key with a length byte of its own.", b"\x81\xd9\x08features\x90"),
    ("bin16", "002", "A binary of 3 bytes with two length bytes.", value(b"\xc5\x00\x03abc")),
    ("array16", "002", "An empty array in three bytes.", value(b"\xdc\0\0")),
    ("map16", "002", "The outer map in three bytes.", b"\xde\0\1" + FEATURES),
    ("map32", "002", "An empty map in five bytes.", value(b"\xdf\0\0\0\0")),
    ("float32", "003", "A floating-point number.", value(b"\xca\x3f\x80\0\0")),
    ("float64", "003", "A floating-point number.", value(b"\xcb\x3f\xf0\0\0\0\0\0\0")),
    ("nan", "003", "A floating-point NaN, which equals nothing.", value(b"\xcb\x7f\xf8\0\0\0\0\0\0")),
    ("ext", "003", "An extension type.", value(b"\xd4\x01\x00")),
    ("ext8", "003", "An extension type with a length.", value(b"\xc7\x01\x01\x00")),
    ("timestamp", "003", "The timestamp extension.", value(b"\xd6\xff\0\0\0\1")),
    ("c1", "003", "The byte that is never used.", value(b"\xc1")),
    ("unordered", "004", "Keys in descending order.", b"\x82\xa2x-\x00" + FEATURES),
    ("twice", "004", "One key twice.", b"\x82" + FEATURES + FEATURES),
    ("key-int", "004", "A key is a number.", b"\x82\x01\x02" + FEATURES),
    ("key-bin", "004", "A key is binary.", b"\x82\xc4\x01a\x02" + FEATURES),
    ("key-null", "004", "A key is null.", b"\x82\xc0\x02" + FEATURES),
    ("inner-unordered", "004", "An inner map has keys in descending order.", value(b"\x82\xa1b\0\xa1a\0")),
    ("utf8", "005", "A text is not UTF-8.", value(b"\xa1\xff")),
    ("surrogate", "005", "A text holds a surrogate.", value(b"\xa3\xed\xa0\x80")),
    ("overlong", "005", "A text holds an overlong form.", value(b"\xa2\xc0\x80")),
    ("key-utf8", "005", "A key is not UTF-8.", b"\x82" + FEATURES + b"\xa3x-\xff\0"),
    ("depth-9", "006", "Nine levels.", value(b"\x91" * 7 + b"\x90")),
    ("depth-9-map", "006", "Nine levels, the last one an empty map.", value(b"\x81\xa0" * 7 + b"\x80")),
    ("depth-5000", "006", "5000 levels.", value(b"\x91" * 5000 + b"\x90")),
    ("depth-40000", "006", "40000 levels.", value(b"\x91" * 40000 + b"\x90")),
    ("array32", "007", "An array of 2^32 - 1 values and no bytes for them.", value(b"\xdd\xff\xff\xff\xff")),
    ("map32-huge", "007", "A map of 2^32 - 1 pairs.", value(b"\xdf\xff\xff\xff\xff" + b"\0" * 5000)),
    ("array32-long", "007", "An array of 2^30 values with 5000 bytes behind.", value(b"\xdd\x40\0\0\0" + b"\0" * 5000)),
    ("bin32", "007", "A binary of 2^32 - 1 bytes.", value(b"\xc6\xff\xff\xff\xff")),
    ("str32", "007", "A text of 2^31 bytes.", value(b"\xdb\x80\0\0\0")),
    ("nested-huge", "007", "Arrays in arrays that all count 2^16 - 1.", value(b"\xdc\xff\xff" * 7)),
    ("cut", "007", "Ends inside a number.", value(b"\xcf\1\2")),
    ("cut-map", "007", "The map counts a pair more than is there.", b"\x82" + FEATURES),
):
    case(f"msg-{_name}", FORMAT, f"MSG-{_clause}", _why, raw_header(_body))

# Records

keep(CONFIG, RAW)


def bytes_head(i: str, change: Callable[[bytes], bytes]) -> Patch:
    """Change the bytes of the head of record `i`; its row stays that of the map."""

    def patch(a: Archive) -> None:
        r = a[i]
        body = change(msg.pack(r.head | {"units": wire.directory(r.units)}))
        _, old = r.encode(0)
        r.head = body
        r.row = {k: v for k, v in old.items() if k not in ("at", "check", "flags", "head", "payload", "type")}

    return patch


case("record-magic", FORMAT, "REC-002", "A record does not begin with RREC.", record(RAW, magic=b"RRED"))
case("record-flag", UNSUPPORTED, "REC-003", "Flag bit 1 of a tensor record is set.", record(RAW, flags=2))
case(
    "record-flag-15",
    UNSUPPORTED,
    "REC-003",
    "Flag bit 15 of an attachment record is set.",
    record(CONFIG, flags=1 << 15),
)
case("record-reserved", UNSUPPORTED, "REC-003", "The reserved field of a record is not 0.", record(RAW, reserved=1))
case(
    "record-head-limit",
    LIMIT,
    "REC-004",
    "States a head of 64 MiB + 1; its row does not.",
    both(record(RAW, head_size=(64 << 20) + 1), lambda a: _true_row(a, RAW)),
)
case(
    "record-payload-limit",
    FORMAT,
    "REC-005",
    "States a payload of 2^62 + 1; its row does not.",
    both(record(RAW, payload_size=(1 << 62) + 1), lambda a: _true_row(a, RAW)),
)
case(
    "record-payload-max",
    FORMAT,
    "REC-005",
    "States a payload of 2^64 - 1; its row does not.",
    both(record(RAW, payload_size=(1 << 64) - 1), lambda a: _true_row(a, RAW)),
)


def _true_row(a: Archive, i: str) -> None:
    r = a[i]
    _, true = replace(r, head_size=None, payload_size=None).encode(0)
    r.row = {"head": true["head"], "payload": true["payload"]}


def header_end(a: Archive) -> int:
    n = 32 + len(msg.pack(a.header))
    return n + -n % 64


case("cut-record", TRUNCATED, "REC-001", "Ends 8 bytes into a record.", lambda a: a.build()[: record_at(a, 1) + 8])
case(
    "cut-record-head",
    TRUNCATED,
    "REC-006",
    "Ends inside the head of a record.",
    lambda a: a.build()[: record_at(a, 1) + 50],
)
case("cut-unit", TRUNCATED, "UNI-003", "Ends inside a unit.", lambda a: a.build()[: record_at(a, 2) - 70])
case("cut-between", TRUNCATED, "FWD-002", "Ends where a record ends.", lambda a: a.build()[: record_at(a, 1)])


def record_at(a: Archive, i: int) -> int:
    """Where record `i` begins, from the bytes."""
    data, at = a.build(), header_end(a)
    for _ in range(i):
        h, p = int.from_bytes(data[at + 8 : at + 12], "little"), int.from_bytes(data[at + 16 : at + 24], "little")
        at += 64 * (-(-(32 + h) // 64) + -(-p // 64))
    return at


case("record-checksum", CHECKSUM, "REC-007", "The checksum of a record head is another.", record(RAW, check=7))
case(
    "record-head-padding",
    FORMAT,
    "REC-008",
    "The padding behind the head of a record is not zero.",
    lambda a: set_bytes(
        record_at(a, 1) + 32 + len(msg.pack(a[RAW].head | {"units": wire.directory(a[RAW].units)})), b"\1"
    )(a.build()),
)
case(
    "record-msg",
    FORMAT,
    "MSG-002",
    "The head of a record is not in its shortest form.",
    bytes_head(RAW, lambda b: b.replace(b"\xa4axis\x01", b"\xa4axis\xcc\x01")),
)
case(
    "record-msg-twice",
    FORMAT,
    "MSG-004",
    "The head of a record has one key twice.",
    bytes_head(RAW, lambda b: bytes([b[0] + 1]) + b[1:7] + b[1:]),
)
case("ancillary-tensor", FORMAT, "REC-009", "A tensor has the ancillary flag.", record(RAW, flags=1))
case("ancillary-attachment", FORMAT, "REC-009", "An attachment has the ancillary flag.", record(CONFIG, flags=1))
case(
    "ancillary-object",
    FORMAT,
    "REC-009",
    "An object has the ancillary flag.",
    lambda a: a.records.append(replace(tensor("o", "F32", [1, 1], [0]), type=OBJECT, flags=1)),
)
case("ancillary-index", FORMAT, "REC-009", "The index has the ancillary flag.", index_record(flags=1))


def more_record(r: Record) -> Patch:
    """Add a record at the end."""
    return lambda a: a.records.append(r)


for _type in (0, 5, 40000):
    case(
        f"type-{_type}",
        UNSUPPORTED,
        "REC-011",
        f"A record of type {_type} that must not be skipped.",
        more_record(Record(_type, {}, payload=b"abc")),
    )


def skipped(**more: Any) -> Patch:
    """Put an ancillary record of an unknown type in front of the third record."""

    def patch(a: Archive) -> None:
        a.records.insert(2, replace(Record(40000, {"a": 1}, payload=b"abc", flags=1), **more))

    return patch


case(
    "skipped-flag",
    UNSUPPORTED,
    "REC-003",
    "A record that may be skipped has flag bit 1 set too.",
    skipped(flags=3),
)
case("row-flag", UNSUPPORTED, "REC-003", "The row of a tensor has flag bit 1 set.", row(RAW, flags=2))
case(
    "row-skipped-flag",
    UNSUPPORTED,
    "REC-003",
    "The row of a record to skip has flag bit 15 set.",
    skipped(row={"flags": 1 << 15 | 1}),
)
case(
    "skipped-reserved",
    UNSUPPORTED,
    "REC-003",
    "The reserved field of a record to skip is not 0.",
    skipped(reserved=1),
    seen="forward",
)
case(
    "skipped-checksum",
    CHECKSUM,
    "REC-007",
    "The head of a record to skip has another checksum.",
    skipped(check=1),
    seen="forward",
)
case(
    "skipped-padding",
    FORMAT,
    "CNV-001",
    "The padding behind a record to skip is not zero.",
    skipped(pad=bytes(60) + b"\1"),
    seen="forward",
)
case(
    "skipped-head",
    FORMAT,
    "MSG-001",
    "The head of a record to skip is an array.",
    skipped(head=b"\x90"),
    seen="forward",
)
case(
    "tensor-padding",
    FORMAT,
    "RAR-002",
    "The padding behind a tensor record is not zero.",
    record(RAW, pad=bytes(31) + b"\1"),
)
case(
    "attachment-padding",
    FORMAT,
    "RAR-002",
    "The padding behind an attachment record is not zero.",
    lambda a: setattr(a[CONFIG], "pad", bytes(-len(a[CONFIG].body()) % 64 - 1) + b"\1"),
)
case(
    "attachment-unit-padding",
    FORMAT,
    "RAR-002",
    "The padding behind the unit of an attachment is not zero.",
    lambda a: setattr(a[CONFIG], "payload", a[CONFIG].body()[:-1] + b"\1"),
)
case(
    "unit-padding",
    FORMAT,
    "RAR-002",
    "The padding between two units is not zero.",
    lambda a: setattr(a[LANES], "payload", set_bytes(len(a[LANES].units[0]), b"\1")(a[LANES].body())),
    on=LANES,
)

# Units

keep(CONFIG, RAW, LANES)

case("units-text", FORMAT, "UNI-001", "`units` is a text.", directory(RAW, lambda d: "units"))
case("units-17", FORMAT, "UNI-001", "`units` has a byte more than whole entries.", directory(RAW, lambda d: d + b"\0"))
case("units-attachment", FORMAT, "UNI-001", "`units` of an attachment is an array.", directory(CONFIG, lambda d: [1]))
case(
    "units-short",
    FORMAT,
    "UNI-002",
    "The units leave 16 bytes of the payload.",
    lambda a: setattr(a[RAW], "payload", a[RAW].body() + bytes(16)),
)
case(
    "units-long",
    FORMAT,
    "UNI-002",
    "The units need more than the payload.",
    directory(RAW, set_bytes(0, b"\x11\0\0\0\0\0\0\0")),
)
case("units-max", FORMAT, "UNI-002", "A unit of 2^64 - 1 bytes.", directory(RAW, set_bytes(0, b"\xff" * 8)))
case(
    "units-wrap",
    FORMAT,
    "UNI-002",
    "Unit sizes that sum to the payload modulo 2^64.",
    directory(RAW, lambda d: (2**64 - 16).to_bytes(8, "little") + d[8:16] + (64).to_bytes(8, "little") + d[24:]),
)
case(
    "unit-checksum",
    CHECKSUM,
    "UNI-003",
    "A unit of a tensor was changed after its checksum was made.",
    directory(RAW, flip(8)),
)
case(
    "unit-checksum-shared",
    CHECKSUM,
    "UNI-003",
    "The shared unit of lanes/1 has another checksum.",
    directory(LANES, flip(8)),
)
case("unit-checksum-tile", CHECKSUM, "UNI-003", "The last tile has another checksum.", directory(LANES, flip(-1)))
case("unit-checksum-attachment", CHECKSUM, "UNI-003", "An attachment has another checksum.", directory(CONFIG, flip(8)))
