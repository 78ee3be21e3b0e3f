"""Bad archives of what is in the heads: tensors, attachments, index, trailer, digests."""

from dataclasses import replace
from typing import Any

from golden.bad_container import record_at, skipped
from golden.cases import (
    CHECKSUM,
    CONFIG,
    FORMAT,
    LANES,
    LIMIT,
    RAW,
    TOKENS,
    TRUNCATED,
    UNSUPPORTED,
    ZSTD,
    Patch,
    both,
    case,
    cut,
    fields,
    flip,
    head,
    index,
    index_record,
    keep,
    only,
    record,
    row,
    unit,
    zeros,
)
from golden.good import archive, attachment, frame, tensor
from golden.model import DROP, Archive, Record
from rac.container import msg, wire

# Tensor heads

keep(RAW)

for _key in ("axis", "digest", "dtype", "name", "shape", "stages", "tile", "units"):
    case(f"tensor-no-{_key}", FORMAT, "TEN-001", f"`{_key}` is missing.", head(RAW, **{_key: DROP}))
case("tensor-key", UNSUPPORTED, "TEN-002", "A key that is not assigned.", head(RAW, scale=1))
case("tensor-needs", UNSUPPORTED, "TEN-003", "`needs` is not empty.", head(RAW, needs=["rotation"]))
case("tensor-uses", FORMAT, "TEN-017", "`uses` is not empty, and no stage uses anything.", head(RAW, uses=["base"]))
case("tensor-needs-null", UNSUPPORTED, "TEN-003", "`needs` is null.", head(RAW, needs=None))
for _name, _wrong in (
    ("axis-text", {"axis": "0"}),
    ("axis-bool", {"axis": True}),
    ("axis-null", {"axis": None}),
    ("digest-15", {"digest": bytes(15)}),
    ("digest-text", {"digest": "0" * 16}),
    ("dtype-int", {"dtype": 7}),
    ("name-bin", {"name": b"raw"}),
    ("shape-text", {"shape": "2,3"}),
    ("shape-negative", {"shape": [-2, -3]}),
    ("shape-bool", {"shape": [2, True]}),
    ("shape-large", {"shape": [0, (1 << 62) + 1]}),
    ("shape-u64", {"shape": [(1 << 64) - 1, 0]}),
    ("tile-one", {"tile": [2]}),
    ("tile-text", {"tile": "2"}),
    ("tile-bool", {"tile": [True, 2]}),
    ("tile-map", {"tile": {}}),
    ("aliases-text", {"aliases": ["tied"]}),
    ("aliases-int", {"aliases": [["tied", 1]]}),
    ("aliases-three", {"aliases": [["tied", True, 1]]}),
    ("aliases-map", {"aliases": {}}),
    ("extra-array", {"extra": []}),
    ("extra-null", {"extra": None}),
    ("uses-null", {"uses": None}),
    ("uses-text", {"uses": "a"}),
    ("uses-int", {"uses": [1]}),
    ("stages-map", {"stages": {"id": "raw/1"}}),
    ("stages-text", {"stages": ["raw/1"]}),
    ("stages-null", {"stages": None}),
):
    case(f"tensor-{_name}", FORMAT, "TEN-004", f"{next(iter(_wrong))} has another type or range.", head(RAW, **_wrong))
case("tensor-dtype", UNSUPPORTED, "TEN-005", "A data type that is not assigned.", head(RAW, dtype="F128"))
case("tensor-dtype-case", UNSUPPORTED, "TEN-005", "Data types are upper-case.", head(RAW, dtype="i32"))
case("tensor-rank", LIMIT, "TEN-006", "65 dimensions.", head(RAW, shape=[1] * 65, axis=0))
case("tensor-product", FORMAT, "TEN-007", "A shape of 2^60 elements.", head(RAW, shape=[1 << 30, 1 << 30]))
case(
    "tensor-product-zero",
    FORMAT,
    "TEN-007",
    "An empty shape whose other dimensions multiply to 2^60.",
    head(RAW, shape=[1 << 60, 0]),
)
case(
    "tensor-product-wrap",
    FORMAT,
    "TEN-007",
    "A shape whose product is 0 modulo 2^64.",
    head(RAW, shape=[1 << 32, 1 << 32]),
)
case("tensor-stages-empty", FORMAT, "TEN-008", "No stage.", head(RAW, stages=[]))
case("tensor-stages-two", UNSUPPORTED, "TEN-009", "Two stages.", head(RAW, stages=[{"id": "delta/1"}, {"id": "raw/1"}]))
case(
    "tensor-stages-same",
    UNSUPPORTED,
    "TEN-009",
    "One stage twice.",
    head(RAW, stages=[{"id": "raw/1"}, {"id": "raw/1"}]),
)
case("tensor-stage", UNSUPPORTED, "TEN-009", "A stage that is not assigned.", head(RAW, stages=[{"id": "raw/2"}]))
case("tensor-stage-none", UNSUPPORTED, "TEN-009", "A stage without `id`.", head(RAW, stages=[{}]))
case("tensor-stage-int", UNSUPPORTED, "TEN-009", "The `id` is a number.", head(RAW, stages=[{"id": 1}]))
case("tensor-stage-array", UNSUPPORTED, "TEN-009", "The `id` is an array.", head(RAW, stages=[{"id": ["raw/1"]}]))


def f4(**values: Any) -> Patch:
    """An F4 tensor of shape [2, 4] with other values."""
    r = tensor("f4", "F4", [2, 4], [1, 2, 3, 4])
    r.head |= values
    return only(r)


case("f4-odd", FORMAT, "TEN-010", "F4 with an odd last dimension.", f4(shape=[4, 3], tile=[1, 2]))
case(
    "f4-odd-whole",
    FORMAT,
    "TEN-010",
    "F4 with an odd last dimension and an even product behind the axis.",
    f4(shape=[2, 1, 5], axis=0, tile=[1, 4]),
)
case("f4-scalar", FORMAT, "TEN-010", "F4 without dimensions.", f4(shape=[], axis=0, tile=[1, 1]))
case("f4-axis", FORMAT, "TEN-010", "F4 with the axis behind the last dimension.", f4(axis=2, tile=[8, 1]))
case(
    "f4-axis-zero",
    FORMAT,
    "TEN-010",
    "Empty F4 with the axis behind the last dimension.",
    f4(shape=[0, 4], axis=2, tile=[1, 1], units=b""),
)
case("axis-3", FORMAT, "TEN-011", "`axis` beyond the dimensions.", head(RAW, axis=3))
case("axis-negative", FORMAT, "TEN-011", "`axis` is -1.", head(RAW, axis=-1))
case("tile-zero", FORMAT, "TEN-012", "A tile without rows.", head(RAW, tile=[0, 2]))
case("tile-rows", FORMAT, "TEN-012", "A tile with more rows than the matrix.", head(RAW, tile=[3, 2]))
case("tile-cols", FORMAT, "TEN-012", "A tile with more columns than the matrix.", head(RAW, tile=[2, 4]))
case(
    "tile-empty",
    FORMAT,
    "TEN-012",
    "A tile of two rows for a matrix without any.",
    only(replace(tensor("e", "U8", [0, 3], []), head=tensor("e", "U8", [0, 3], []).head | {"tile": [2, 1]})),
)


def large(rows: int, cols: int, tile: list[int], units: list[bytes]) -> Patch:
    """A U8 tensor of zeros under zstd/1 whose digest is not looked at."""
    stated = {"name": "l", "dtype": "U8", "shape": [rows, cols], "axis": 1, "tile": tile, "digest": bytes(16)}
    return only(Record(1, stated | {"stages": [{"id": "zstd/1"}]}, units))


case(
    "tile-limit",
    LIMIT,
    "TEN-013",
    "A tile of 16 MiB + 1 byte.",
    large(1, (16 << 20) + 1, [1, (16 << 20) + 1], [zeros((16 << 20) + 1)]),
)
case(
    "units-missing", FORMAT, "TEN-014", "A unit less than tiles.", lambda a: setattr(a[RAW], "units", a[RAW].units[:1])
)
case("units-more", FORMAT, "TEN-014", "A unit more than tiles.", lambda a: a[RAW].units.append(b""))
case(
    "units-none",
    FORMAT,
    "TEN-014",
    "Under lanes/1 the shared unit is missing.",
    lambda a: setattr(a[LANES], "units", a[LANES].units[1:]),
    on=LANES,
)
case(
    "units-empty",
    FORMAT,
    "TEN-014",
    "A tensor without elements has a unit.",
    only(replace(tensor("e", "U8", [0], []), units=[b""])),
)
case(
    "units-huge",
    FORMAT,
    "TEN-014",
    "2^26 tiles and two units; the dense bytes are within the limit.",
    head(RAW, dtype="U8", shape=[1 << 13, 1 << 13], tile=[1, 1]),
)
case("expansion", LIMIT, "TEN-015", "128 MiB from units of size 0.", large(8, 16 << 20, [1, 16 << 20], [b""] * 8))
case(
    "expansion-2^59",
    LIMIT,
    "TEN-015",
    "2^59 bytes from one unit, in one tile of which the limit is met by its rows.",
    large(1 << 10, 16 << 20, [1, 16 << 20], [b""] * 1024),
)
case(
    "unit-large",
    FORMAT,
    "TEN-016",
    "A unit of more than twice its tile and 64 KiB.",
    unit(RAW, 0, lambda u: bytes(2 * 2 * 2 * 4 + 65537)),
)
case(
    "unit-shared-large",
    FORMAT,
    "TEN-016",
    "The shared unit is larger than its sections.",
    unit(LANES, 0, lambda u: u + b"\0"),
    on=LANES,
)

# Attachments

keep(CONFIG, TOKENS)

for _key in ("digest", "name", "size", "stages", "units"):
    case(f"attachment-no-{_key}", FORMAT, "ATT-001", f"`{_key}` is missing.", head(CONFIG, **{_key: DROP}))
case("attachment-key", UNSUPPORTED, "ATT-002", "A key that is not assigned.", head(CONFIG, mode=420))
case("attachment-name", FORMAT, "ATT-003", "The name is binary.", head(CONFIG, name=b"config.json"))
case("attachment-size-bool", FORMAT, "ATT-003", "`size` is true.", head(CONFIG, size=True))
case("attachment-size-negative", FORMAT, "ATT-003", "`size` is -1.", head(CONFIG, size=-1))
case("attachment-digest-15", FORMAT, "ATT-003", "The digest has 15 bytes.", head(CONFIG, digest=bytes(15)))
case("attachment-digest-text", FORMAT, "ATT-003", "The digest is a text.", head(CONFIG, digest="0" * 16))
case("attachment-units-two", FORMAT, "ATT-003", "Two units.", lambda a: a[CONFIG].units.append(b""))
case("attachment-units-none", FORMAT, "ATT-003", "No unit.", both(record(CONFIG, units=[]), head(CONFIG, size=0)))
case(
    "attachment-lanes",
    UNSUPPORTED,
    "ATT-004",
    "lanes/1 is not for attachments.",
    head(CONFIG, stages=[{"id": "lanes/1"}]),
)
case("attachment-stages-empty", UNSUPPORTED, "ATT-004", "No stage.", head(CONFIG, stages=[]))
case(
    "attachment-stages-key",
    UNSUPPORTED,
    "ATT-004",
    "The stage map has another key.",
    head(CONFIG, stages=[{"id": "raw/1", "level": 3}]),
)
case("attachment-limit", LIMIT, "ATT-005", "`size` is 1 GiB + 1.", head(TOKENS, size=(1 << 30) + 1))
case(
    "attachment-unit-large",
    FORMAT,
    "ATT-006",
    "The unit is 1025 bytes larger than the content.",
    both(unit(TOKENS, 0, lambda u: bytes(1029)), head(TOKENS, size=4)),
)
case("attachment-digest", CHECKSUM, "ATT-007", "The content has another digest.", head(TOKENS, digest=bytes(16)))
case("attachment-raw-size", FORMAT, "ATT-007", "Raw content of another size.", head(CONFIG, size=14))
case("attachment-zstd-size", FORMAT, "ZST-002", "The frame holds a byte more than `size`.", head(TOKENS, size=399))
case(
    "attachment-window",
    FORMAT,
    "ZST-003",
    "A single-segment frame of 2^27 + 1 zeros.",
    both(unit(TOKENS, 0, lambda u: zeros((1 << 27) + 1)), head(TOKENS, size=(1 << 27) + 1)),
)


def empty_frame(kind: int, block: bytes) -> Patch:
    """An empty attachment whose frame has one block of that type and content."""
    return only(replace(attachment("e", b"", "zstd/1"), units=[frame(b"", [(kind, block)])]))


case("attachment-empty-data", FORMAT, "ZST-005", "An empty frame yields a byte.", empty_frame(0, b"a"))
case(
    "attachment-empty-block-3",
    FORMAT,
    "ZST-005",
    "An empty frame, a block of type 3.",
    empty_frame(3, b""),
)
case(
    "attachment-empty-damaged",
    FORMAT,
    "ZST-005",
    "An empty frame, a damaged block.",
    empty_frame(2, b"\xff\xff\xff"),
)

# Index

keep(CONFIG, RAW, LANES)

case("index-head-key", FORMAT, "IDX-001", "The head of the index has an x- key.", index_record(head={"x-a": 1}))
case("index-head-size", FORMAT, "IDX-001", "`size` is missing.", index_record(head={"size": DROP}))
case("index-head-bool", FORMAT, "IDX-001", "`size` is true.", index_record(head={"size": True}))
case("index-head-units", FORMAT, "UNI-001", "`units` is missing.", index_record(head={"units": DROP}))
case("index-units-two", FORMAT, "IDX-001", "Two units.", fields(patch_record=lambda r: r.units.append(b"")))
case("index-units-none", FORMAT, "IDX-001", "No unit.", fields(patch_record=lambda r: r.units.clear()))
case("index-flag", UNSUPPORTED, "REC-003", "Flag bit 1 of the index is set.", index_record(flags=2))
case("index-limit", LIMIT, "IDX-002", "`size` is 256 MiB + 1.", index_record(head={"size": (256 << 20) + 1}))
case(
    "index-checksum",
    CHECKSUM,
    "IDX-003",
    "The unit of the index has another checksum.",
    fields(patch_record=lambda r: r.head.update(units=flip(8)(wire.directory(r.units)))),
)
case(
    "index-outside",
    TRUNCATED,
    "RAR-003",
    "The head of the index record would reach behind the end of the archive.",
    index_record(head_size=1 << 20),
)
case("index-plain", FORMAT, "IDX-003", "The index is not a frame.", fields(index_unit=lambda b: b))
case("index-size", FORMAT, "IDX-003", "The frame holds another size than `size`.", index_record(head={"size": 1000}))
case(
    "index-window",
    FORMAT,
    "ZST-003",
    "A single-segment frame of 2^27 + 1 zeros.",
    both(fields(index_unit=lambda b: zeros((1 << 27) + 1)), index_record(head={"size": (1 << 27) + 1})),
)
case(
    "index-zeros",
    FORMAT,
    "MSG-001",
    "The index is 64 MiB of zeros: the number 0 and what is behind it.",
    both(fields(index_unit=lambda b: zeros(64 << 20)), index_record(head={"size": 64 << 20})),
)
case(
    "index-padding",
    FORMAT,
    "CNV-001",
    "The padding behind the index is not zero.",
    fields(
        patch_record=lambda r: (
            setattr(r, "pad", bytes(-len(r.body()) % 64 - 1) + b"\1") if len(r.body()) % 64 else r.units.append(b"")
        )
    ),
)
case(
    "index-unit-padding",
    FORMAT,
    "CNV-001",
    "The padding behind the unit of the index is not zero.",
    fields(patch_record=lambda r: setattr(r, "payload", r.body()[:-1] + b"\1")),
)
case(
    "index-msg",
    FORMAT,
    "MSG-004",
    "The index map has its keys in descending order.",
    index(lambda m: b"\x82\xa7records" + msg.pack({"": m["records"]})[2:] + b"\xa6digest\xc4\x10" + m["digest"]),
)
case(
    "index-deep",
    FORMAT,
    "MSG-006",
    "The index is 100000 arrays in each other.",
    index(lambda m: b"\x82\xa6digest\xc4\x10" + bytes(16) + b"\xa7records" + b"\x91" * 100000 + b"\x90"),
)
case(
    "index-count",
    FORMAT,
    "MSG-007",
    "`records` counts 2^32 - 1 rows.",
    index(lambda m: b"\x82\xa6digest\xc4\x10" + bytes(16) + b"\xa7records\xdd\xff\xff\xff\xff" + bytes(9000)),
)
case("index-key", FORMAT, "IDX-004", "The index map has an x- key.", index(lambda m: m.update({"x-a": 1})))
case("index-no-records", FORMAT, "IDX-004", "`records` is missing.", index(lambda m: m.pop("records") and None))
case("index-no-digest", FORMAT, "IDX-004", "`digest` is missing.", index(lambda m: m.pop("digest") and None))
case("index-digest-15", FORMAT, "IDX-004", "`digest` has 15 bytes.", index(lambda m: m.update(digest=bytes(15))))
case("index-records-map", FORMAT, "IDX-004", "`records` is a map.", index(lambda m: m.update(records={})))
for _name, _i, _wrong in (
    ("row-no-at", RAW, {"at": DROP}),
    ("row-no-check", RAW, {"check": DROP}),
    ("row-no-name", RAW, {"name": DROP}),
    ("row-no-parts", RAW, {"parts": DROP}),
    ("row-no-aliases", RAW, {"aliases": DROP}),
    ("row-no-method", CONFIG, {"method": DROP}),
    ("row-x", RAW, {"x-a": 1}),
    ("row-key", CONFIG, {"dtype": "U8"}),
    ("row-at-bool", CONFIG, {"at": True}),
    ("row-at-negative", RAW, {"at": -64}),
    ("row-at-large", RAW, {"at": (1 << 63)}),
    ("row-check-7", RAW, {"check": bytes(7)}),
    ("row-check-int", RAW, {"check": 5}),
    ("row-name-bin", RAW, {"name": b"raw"}),
    ("row-dtype-null", RAW, {"dtype": None}),
    ("row-shape-negative", RAW, {"shape": [-1]}),
    ("row-shape-text", RAW, {"shape": "2"}),
    ("row-method-int", RAW, {"method": 1}),
    ("row-parts-5", RAW, {"parts": [0, 0, 0, 0, 64]}),
    ("row-parts-negative", RAW, {"parts": [-16, 16, 0, 0, 24, 8]}),
    ("row-aliases-int", RAW, {"aliases": [["a", 1]]}),
    ("row-type-text", RAW, {"type": "1"}),
    ("row-flags-65536", RAW, {"flags": 65536}),
):
    case(
        _name,
        FORMAT,
        "IDX-005",
        f"In an index row `{next(iter(_wrong))}` is missing, superfluous or of another type.",
        row(_i, **_wrong),
    )
case("row-text", FORMAT, "IDX-005", "A row is a text.", index(lambda m: m["records"].insert(1, "row")))
case("row-skipped-key", FORMAT, "IDX-005", "The row of a record to skip has another key.", skipped(row={"x-a": 1}))
case("row-skipped-name", FORMAT, "IDX-005", "The row of a record to skip has a name.", skipped(row={"name": "a"}))
case(
    "row-type-65536",
    FORMAT,
    "IDX-005",
    "The type of a row to skip needs 17 bits.",
    skipped(row={"type": 65536 + 40000}),
)
case(
    "row-type-5",
    UNSUPPORTED,
    "REC-011",
    "A row states an unknown type, its record does not.",
    both(row(RAW, type=5, **dict.fromkeys(("name", "method", "dtype", "shape", "aliases", "parts"), DROP))),
)
case(
    "row-index",
    FORMAT,
    "IDX-006",
    "The index has a row of its own.",
    index(lambda m: m["records"].append({"type": 4, "flags": 0, "at": 0, "head": 0, "payload": 0, "check": bytes(8)})),
)
case("row-parts-sum", FORMAT, "IDX-007", "`parts` do not sum to `payload`.", row(RAW, parts=[0, 0, 0, 0, 24, 9]))
case("row-rank", LIMIT, "IDX-008", "A row with 65 dimensions.", row(RAW, shape=[1] * 65))
case("row-product", FORMAT, "IDX-008", "A row with a shape of 2^60.", row(RAW, shape=[1 << 60]))
case(
    "row-hole",
    FORMAT,
    "IDX-009",
    "A row lies 64 bytes behind the end of the one before.",
    index(lambda m: m["records"][2].update(at=m["records"][2]["at"] + 64)),
)
case(
    "row-overlap",
    FORMAT,
    "IDX-009",
    "A row lies at the record before.",
    index(lambda m: m["records"][2].update(at=m["records"][1]["at"])),
)
case("row-first", FORMAT, "IDX-009", "The first row lies at 0.", index(lambda m: m["records"][0].update(at=0)))
case(
    "row-outside",
    FORMAT,
    "IDX-009",
    "A row lies far outside the archive.",
    index(lambda m: m["records"][2].update(at=1 << 62)),
)
case(
    "row-payload",
    FORMAT,
    "IDX-009",
    "A row states a payload of 2^62.",
    index(lambda m: m["records"][0].update(payload=1 << 62)),
)
case(
    "row-last",
    FORMAT,
    "IDX-009",
    "The last record does not end where the index begins.",
    index(
        lambda m: m["records"][-1].update(
            payload=m["records"][-1]["payload"] + 64, parts=[0, 0, 0, 0, 0, m["records"][-1]["payload"] + 64]
        )
    ),
)
case("row-missing", FORMAT, "FWD-004", "The last record has no row.", index(lambda m: m["records"].pop() and None))
case(
    "row-more",
    FORMAT,
    "FWD-004",
    "A row has no record; it takes no bytes from others.",
    index(lambda m: m["records"].append({"type": 9, "flags": 1, "at": 0, "head": 0, "payload": 0, "check": bytes(8)})),
)
case(
    "row-order",
    FORMAT,
    "IDX-009",
    "Two rows in another order than their records.",
    index(lambda m: m["records"].insert(1, m["records"].pop(2))),
)


def _hole(a: Archive) -> None:
    r = a.records[1]
    r.pad = bytes(-len(r.body()) % 64 + 64)


case("hole", FORMAT, "LAY-001", "64 zero bytes between two records, which the index knows of.", _hole)


def _hole_alone(a: Archive) -> Archive:
    out = archive()
    out.header_pad = bytes(-(32 + len(msg.pack(out.header))) % 64 + 64)
    return out


case("hole-alone", FORMAT, "IDX-009", "Without records, 64 zero bytes between header and index.", _hole_alone)


keep(CONFIG, RAW, ZSTD, TOKENS, LANES)
case("name-twice", FORMAT, "IDX-010", "Two tensors of one name.", head(ZSTD, name="raw"))
case("name-alias", FORMAT, "IDX-010", "A tensor has the name of another's alias.", head(ZSTD, name="tied"))
case("alias-own", FORMAT, "IDX-010", "An alias is the name itself.", head(RAW, aliases=[["raw", True]]))
case("alias-twice", FORMAT, "IDX-010", "An alias twice.", head(RAW, aliases=[["a", True], ["a", False]]))
case("attachment-twice", FORMAT, "IDX-010", "Two attachments of one name.", head(TOKENS, name="config.json"))
keep(CONFIG, RAW, LANES)
for _name, _i, _wrong in (
    ("name", RAW, {"name": "row"}),
    ("dtype", RAW, {"dtype": "U32"}),
    ("shape", RAW, {"shape": [3, 2]}),
    ("aliases", LANES, {"aliases": []}),
    ("aliases-tied", LANES, {"aliases": [["tied", False], ["equal", False]]}),
    ("aliases-order", LANES, {"aliases": [["equal", False], ["tied", True]]}),
    ("method", RAW, {"method": "zstd/1"}),
    ("check", RAW, {"check": bytes(8)}),
    ("attachment", CONFIG, {"name": "other"}),
    ("attachment-method", CONFIG, {"method": "zstd/1"}),
):
    case(
        f"differs-{_name}",
        FORMAT,
        "IDX-011",
        f"A row and its record differ in `{next(iter(_wrong))}`.",
        row(_i, **_wrong),
    )
case(
    "differs-skipped",
    FORMAT,
    "IDX-011",
    "The row of a record to skip has another checksum.",
    skipped(row={"check": bytes(8)}),
    seen="forward",
)
case(
    "differs-type",
    FORMAT,
    "IDX-011",
    "The row says that a tensor may be skipped.",
    both(
        row(RAW, type=40000, flags=1, **dict.fromkeys(("name", "method", "dtype", "shape", "aliases", "parts"), DROP))
    ),
    seen="forward",
)


def _swap(a: Archive) -> bytes:
    """Two records of one size change places; the rows stay."""
    pair = [tensor(n, "U8", [4], [i, 2, 3, 4]) for i, n in enumerate("ab")]
    good, other = archive(*pair).build(), archive(*pair[::-1]).build()
    at = wire.parse_trailer(good[-32:])[0]
    return other[:at] + good[at:]


case("swapped", FORMAT, "IDX-011", "Two records have changed places.", _swap)

# Trailer

keep(CONFIG, RAW)

case("cut-1", TRUNCATED, "TRL-001", "The last byte is missing.", cut(lambda d: len(d) - 1))
case("cut-trailer", TRUNCATED, "TRL-001", "The trailer is missing.", cut(lambda d: len(d) - 32))
case("end-magic", TRUNCATED, "TRL-001", "The end magic is another.", fields(end_magic=b"\x89EOF\r\n\x1a\n"))
case("trailer-checksum", CHECKSUM, "TRL-002", "The checksum of the trailer is another.", fields(trailer_check=1))
case(
    "trailer-header",
    FORMAT,
    "TRL-003",
    "The trailer points into the header.",
    fields(patch_trailer=lambda at, n: (64, at + n - 64)),
)
case("trailer-0", FORMAT, "TRL-003", "The trailer points at 0.", fields(patch_trailer=lambda at, n: (0, at + n)))
case(
    "trailer-size",
    FORMAT,
    "TRL-003",
    "The trailer states 64 bytes too many.",
    fields(patch_trailer=lambda at, n: (at, n + 64)),
)
case(
    "trailer-outside",
    FORMAT,
    "TRL-003",
    "The trailer points behind the end.",
    fields(patch_trailer=lambda at, n: (1 << 40, n)),
)
case(
    "trailer-wrap",
    FORMAT,
    "TRL-003",
    "Offset and size are right modulo 2^64 only.",
    fields(patch_trailer=lambda at, n: (2**64 - 64, at + n + 64)),
)


def _point_at(a: Archive, place: int) -> None:
    a.patch_trailer = lambda at, n: (place, at + n - place)


case(
    "trailer-tensor",
    FORMAT,
    "TRL-004",
    "The trailer points at the last tensor.",
    lambda a: _point_at(a, record_at(a, 1)),
)
case(
    "trailer-gap",
    TRUNCATED,
    "TRL-001",
    "64 zero bytes between index and trailer, which the trailer counts in.",
    fields(patch_record=lambda r: setattr(r, "pad", bytes(-len(r.body()) % 64 + 64))),
    random=FORMAT,
)
case("tail-1", FORMAT, "FWD-003", "A byte behind the trailer.", fields(tail=b"\n"), random=TRUNCATED)
case("tail-32", FORMAT, "FWD-003", "The trailer twice.", lambda a: (d := a.build()) + d[-32:], random=FORMAT)
case("tail-archive", FORMAT, "FWD-003", "Two archives in one file.", lambda a: a.build() * 2, random=FORMAT)

# Digests

keep(RAW, LANES)

case(
    "digest-tensor",
    CHECKSUM,
    "DIG-002",
    "The digest of a tensor is that of another.",
    head(RAW, digest=bytes(16)),
    seen="verify",
)
case(
    "digest-lanes",
    CHECKSUM,
    "DIG-002",
    "A plane of a tile differs from what was packed; all checksums are repaired.",
    unit(LANES, 2, flip(-16)),
    seen="verify",
)
case(
    "digest-content",
    CHECKSUM,
    "DIG-002",
    "The content digest of the index is another.",
    fields(digest=bytes(16)),
    seen="verify",
)
case(
    "parts",
    FORMAT,
    "IDX-012",
    "`parts` sum to the payload and are not those of the record.",
    row(RAW, parts=[0, 0, 0, 0, 25, 7]),
    seen="verify",
)
