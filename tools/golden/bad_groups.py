"""Bad archives of bits/1 and groups/1."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from golden.bad_trellis import ending, fixed
from golden.cases import CHECKSUM, FORMAT, LIMIT, UNSUPPORTED, Patch, case, directory, flip, head, row, unit, zeros
from golden.good import archive, attachment
from golden.good_groups import groups_base
from golden.groups import Groups, grouped
from golden.model import DROP, TENSOR, Archive, Record
from rac.container import zstd

LANES, BITS, RAW, FRAMED, ALONE = "lanes", "bits", "raw", "framed", "alone"
"""Records of `groups_base`."""
LISTS = {"upper": 0, "lower": 1, "zeros": 2}


def on(name: str, *patches: Patch) -> Patch:
    """One record of `groups_base`, changed."""

    def patch(_: Archive) -> Archive:
        a = archive(groups_base()[name])
        for p in patches:
            p(a)
        return a

    return patch


def stages(name: str, make: Callable[..., list[Any]]) -> Patch:
    """Replace `stages`, given the maps."""

    def patch(a: Archive) -> None:
        a[name].head["stages"] = make(*a[name].head["stages"])

    return patch


def keys(name: str, k: int, **values: Any) -> Patch:
    """Replace keys of the map of stage `k`."""

    def patch(a: Archive) -> None:
        old = a[name].head["stages"]
        new = {k: v for k, v in (old[k] | values).items() if v is not DROP}
        a[name].head["stages"] = [*old[:k], new, *old[k + 1 :]]

    return patch


def section(name: str, what: str, change: Callable[[bytes], bytes]) -> Patch:
    """Change one section of the groups unit."""

    def patch(a: Archive) -> None:
        r = a[name]
        k = 1 if name == LANES else 0
        sizes = r.head["stages"][1]["sizes"]
        ends = [sum(sizes[:i]) for i in range(4)]
        sections = [r.units[k][x:y] for x, y in pairwise(ends)]
        sections[LISTS[what]] = change(sections[LISTS[what]])
        r.units[k] = b"".join(sections)
        keys(name, 1, sizes=[len(s) for s in sections])(a)

    return patch


def units(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Patch:
    """Other units."""

    def patch(a: Archive) -> None:
        a[name].units = change(a[name].units)

    return patch


def bits(name: str, clause: str, why: str, patch: Patch, error: str = FORMAT, **more: str) -> None:
    """Register one of bits/1."""
    case(f"bits-{name}", error, clause, why, patch, **more)


def bad(name: str, clause: str, why: str, patch: Patch, error: str = FORMAT, **more: str) -> None:
    """Register one of groups/1."""
    case(f"groups-{name}", error, clause, why, patch, **more)


# Chains of stages

for _name, _why, _make in (
    ("alone", "groups/1 alone.", lambda f, g: [g]),
    ("first", "groups/1 in front of raw/1.", lambda f, g: [g, f]),
    ("twice", "groups/1 twice.", lambda f, g: [f, g, g]),
    ("lowrank", "lowrank/1 behind groups/1.", lambda f, g: [f, g, {"id": "lowrank/1"}]),
    ("basis", "basis/1 behind groups/1.", lambda f, g: [f, g, {"id": "basis/1"}]),
    ("coders", "Two coders in front of groups/1.", lambda f, g: [f, {"id": "bits/1", "bits": 4}, g]),
    ("version", "A version of groups that is not assigned.", lambda f, g: [f, g | {"id": "groups/2"}]),
    ("bits", "A version of bits that is not assigned.", lambda f, g: [{"id": "bits/2", "bits": 4}, g]),
):
    bad(f"stages-{_name}", "TEN-009", _why, on(RAW, stages(RAW, _make)), UNSUPPORTED)
bits("stages-last", "TEN-009", "bits/1 behind bits/1.", on(ALONE, stages(ALONE, lambda f: [f, f])), UNSUPPORTED)


def _attachment(a: Archive) -> Archive:
    """An attachment behind bits/1."""
    r = attachment("a", b"abc")
    r.head["stages"] = [{"id": "bits/1", "bits": 8}]
    return archive(r)


bits("attachment", "ATT-004", "An attachment behind bits/1.", _attachment, UNSUPPORTED)

# bits/1

bits("no-bits", "BIT-001", "`bits` is missing.", on(ALONE, keys(ALONE, 0, bits=DROP)))
bits("no-bits-front", "BIT-001", "`bits` is missing, in front of groups/1.", on(BITS, keys(BITS, 0, bits=DROP)))
bits("key", "BIT-002", "A key that is not assigned.", on(ALONE, keys(ALONE, 0, zero=0)), UNSUPPORTED)
bits("key-x", "BIT-002", "An x- key.", on(BITS, keys(BITS, 0, **{"x-a": 1})), UNSUPPORTED)
for _n, _value in enumerate((0, 9, -1, 16, True, "3", None, [3])):
    bits(f"bits-{_n}", "BIT-003", f"`bits` is {_value}.", on(ALONE, keys(ALONE, 0, bits=_value)))
for _dtype in ("F32", "BF16", "I16", "C64"):
    _patch = on(ALONE, head(ALONE, dtype=_dtype, shape=[9, 7] if _dtype == "C64" else [9, 14]))
    bits(f"dtype-{_dtype}", "BIT-004", f"The data type is {_dtype}, and no second stage is there.", _patch)
for _name, _clause, _why, _patch in (
    ("less", "BIT-005", "A tile lacks a byte of padding.", on(ALONE, unit(ALONE, 0, lambda u: u[:-1]))),
    ("less-16", "BIT-005", "A tile lacks a plane.", on(ALONE, unit(ALONE, 0, lambda u: u[:32]))),
    ("more", "BIT-005", "A byte behind the last plane.", on(ALONE, unit(ALONE, 0, lambda u: u + b"\0"))),
    ("more-16", "BIT-005", "16 bytes behind the last plane.", on(BITS, unit(BITS, 1, lambda u: u + bytes(16)))),
    ("none", "BIT-005", "A tile is empty.", on(BITS, unit(BITS, 2, lambda u: b""))),
    ("wide", "BIT-005", "Planes of four bits, where `bits` is 5.", on(BITS, keys(BITS, 0, bits=5))),
    ("narrow", "BIT-005", "Planes of four bits, where `bits` is 3.", on(BITS, keys(BITS, 0, bits=3))),
    ("padding", "BIT-006", "Padding between planes is not zero.", on(ALONE, unit(ALONE, 0, flip(31)))),
    ("padding-last", "BIT-006", "Padding behind the last plane is not zero.", on(ALONE, unit(ALONE, 0, flip(47)))),
    ("behind", "BIT-007", "Bits behind the last word of a plane.", on(ALONE, unit(ALONE, 0, flip(17, 0x10)))),
    (
        "behind-last",
        "BIT-007",
        "A bit behind the last word of the last plane.",
        on(ALONE, unit(ALONE, 0, flip(40, 0x80))),
    ),
):
    bits(_name, _clause, _why, _patch)


def _word(a: Archive) -> None:
    """Another word."""
    a[ALONE].units[0] = flip(0)(a[ALONE].units[0])


bits(
    "word",
    "DIG-002",
    "A word differs from what was packed; all checksums are repaired.",
    on(ALONE, _word),
    CHECKSUM,
    seen="verify",
)

# Parameters of groups/1

for _key in ("bits", "group", "zero", "exponent", "sizes"):
    bad(f"no-{_key}", "GRP-001", f"`{_key}` is missing.", on(RAW, keys(RAW, 1, **{_key: DROP})))
bad("key", "GRP-002", "A key that is not assigned.", on(RAW, keys(RAW, 1, scale=4)), UNSUPPORTED)
bad("key-x", "GRP-002", "An x- key.", on(RAW, keys(RAW, 1, **{"x-a": 1})), UNSUPPORTED)
WRONG: dict[str, list[Any]] = {
    "bits": [0, 9, -4, True, "4", None],
    "group": [0, 15, -1, 1 << 40, True, None],
    "zero": [256, -1, True, None, [8]],
    "exponent": [61, -61, True, None, "0"],
    "sizes": [[9, 9], [9, 9, 0, 0], [-1, 10, 9], [9, 9, (1 << 40) + 1], 18, [True, 9, 8], None],
}
for _key, _values in WRONG.items():
    for _n, _value in enumerate(_values):
        bad(f"{_key}-{_n}", "GRP-003", f"`{_key}` is {_value}.", on(RAW, keys(RAW, 1, **{_key: _value})))
for _dtype in ("F64", "I16", "U8", "F8_E4M3"):
    bad(f"dtype-{_dtype}", "GRP-004", f"The data type is {_dtype}.", on(RAW, head(RAW, dtype=_dtype)))
bad("zero-list", "GRP-005", "A zero beside a list of zeros.", on(BITS, keys(BITS, 1, zero=8)))


def empty(a: Archive) -> None:
    """A tensor without elements: the groups unit, no tile."""
    r = a[RAW]
    r.head |= {"shape": [0, 14], "tile": [1, 14], "digest": zstd.digest(b"")}
    r.units, r.parts = r.units[:1], None


bad("empty", "GRP-006", "A tensor without elements.", on(RAW, empty))

# Units

for _name, _clause, _why, _patch in (
    ("units-none", "TEN-014", "The groups unit is missing.", on(RAW, units(RAW, lambda u: u[1:]))),
    ("units-less", "TEN-014", "A tile is missing.", on(BITS, units(BITS, lambda u: u[:-1]))),
    ("units-two", "TEN-014", "The groups unit is there twice.", on(BITS, units(BITS, lambda u: [u[0], *u]))),
    ("units-order", "TEN-016", "The groups unit first.", on(LANES, units(LANES, lambda u: [u[1], u[0], *u[2:]]))),
    ("unit-more", "TEN-016", "A byte behind the sections.", on(RAW, unit(RAW, 0, lambda u: u + b"\0"))),
    ("unit-less", "TEN-016", "The last section lacks a byte.", on(LANES, unit(LANES, 1, lambda u: u[:-1]))),
    ("unit-none", "TEN-016", "The groups unit is empty.", on(RAW, unit(RAW, 0, lambda u: b""))),
    ("unit-sizes", "GRP-007", "`sizes` sum to a byte less.", on(BITS, keys(BITS, 1, sizes=[36, 36, 35]))),
    ("unit-sizes-40", "GRP-007", "A section of 2^40 bytes.", on(RAW, keys(RAW, 1, zero=0, sizes=[9, 9, 1 << 40]))),
    ("raw-wide", "RAW-002", "A tile has words of two bytes.", on(RAW, unit(RAW, 1, lambda u: u * 2))),
):
    bad(_name, _clause, _why, _patch)
bad("unit-check", "UNI-003", "The groups unit has another checksum.", on(RAW, directory(RAW, flip(8))), CHECKSUM)

# Lists

for _what, _n in (("upper", 320), ("lower", 320), ("zeros", 320)):
    for _name, _clause, _why, _change in (
        ("short", "001", "A list lacks an entry, and is no frame.", fixed(bytes(_n - 1))),
        ("long", "001", "A list has an entry too many, and is no frame.", fixed(bytes(_n + 1))),
        ("frame-short", "002", "A frame of an entry less.", fixed(zstd.compress(bytes(_n - 1)))),
        ("frame-long", "002", "A frame of an entry more.", fixed(zstd.compress(bytes(_n + 1)))),
        ("trailing", "001", "Nine bytes behind the frame of a list.", lambda s: s + bytes(9)),
        ("bomb", "005", "The frame of a list yields 64 MiB.", fixed(zeros(_n)[:6] + zeros(64 << 20)[9:])),
    ):
        bad(f"{_what}-{_name}", f"ZST-{_clause}", _why, on(FRAMED, section(FRAMED, _what, _change)))

# Scales and codes

for _name, _why, _patch in (
    ("none", "No upper bytes: all scales are subnormal.", on(RAW, section(RAW, "upper", fixed(b"")))),
    ("subnormal", "The last scale is subnormal.", on(RAW, section(RAW, "upper", ending(3)))),
    ("infinite", "The last scale is no finite number.", on(RAW, section(RAW, "upper", ending(0x7C)))),
    ("minus", "The last scale is below 0.", on(RAW, section(RAW, "upper", ending(0xA8)))),
    (
        "frame",
        "A scale in a frame is below 0.",
        on(FRAMED, section(FRAMED, "upper", fixed(zstd.compress(bytes([0x28] * 319 + [0xA8]))))),
    ),
):
    bad(f"scale-{_name}", "GRP-008", _why, _patch)
for _name, _patch in (
    ("raw", on(RAW, unit(RAW, 2, lambda u: u[:-1] + b"\x10"))),
    ("bits", on(BITS, keys(BITS, 1, bits=3))),
    ("lanes", on(LANES, keys(LANES, 1, bits=2))),
    ("zstd", on(FRAMED, keys(FRAMED, 1, bits=1))),
):
    bad(f"code-{_name}", "GRP-009", "A code is too large.", _patch)


def large(rows: int, cols: int, tiles: list[bytes]) -> Patch:
    """F32 in tiles of one row, whose digest is not looked at."""
    stated = {"name": "l", "dtype": "F32", "shape": [rows, cols], "axis": 1, "tile": [1, cols], "digest": bytes(16)}
    g = Groups("F32", 4, cols, [0x3C00] * rows)
    chain = [{"id": "bits/1", "bits": 4}, g.stage()]
    return lambda _: archive(Record(TENSOR, stated | {"stages": chain}, [b"".join(g.sections()), *tiles]))


bad("expansion", "TEN-015", "68 MiB in 17 Mi words, from units of size 0.", large(17, 1 << 20, [b""] * 17), LIMIT)
bad("tile-limit", "TEN-013", "A tile of 16 MiB + 4 bytes in words of one byte.", large(1, (4 << 20) + 1, [b""]), LIMIT)

# Index and digests

bad("method", "IDX-011", "The row states the first stage as the method.", on(BITS, row(BITS, method="bits/1")))


def _parts(a: Archive) -> None:
    parts = list(a[BITS].parts or ())
    parts[0], parts[4] = 0, parts[0] + parts[4]
    row(BITS, parts=parts)(a)


bad("parts", "IDX-012", "`parts` count the groups unit with the planes.", on(BITS, _parts), seen="verify")


def _rounded(a: Archive) -> Archive:
    """3 x 1.5009765625 is 4.5 in BF16; the digest is that of the number rounded up."""
    r = grouped("r", [1, 1], [3], Groups("BF16", 2, 1, [0x3E01]), 2)
    r.head["digest"] = zstd.digest(bytes.fromhex("9140"))
    return archive(r)


def _zero(a: Archive) -> Archive:
    """A code that is the zero is +0; the digest is that of -0."""
    r = grouped("z", [1, 1], [3], Groups("BF16", 2, 1, [0x3E01], 3), 2)
    r.head["digest"] = zstd.digest(bytes.fromhex("0080"))
    return archive(r)


for _name, _why, _patch in (
    ("word", "A code differs from what was packed; all checksums are repaired.", on(BITS, unit(BITS, 1, flip(0)))),
    ("unit", "A scale differs from what was packed.", on(LANES, unit(LANES, 1, flip(40, 0x80)))),
    ("exponent", "The exponent differs from what was packed.", on(RAW, keys(RAW, 1, exponent=1))),
    ("rounded", "The digest is that of numbers rounded away from zero.", _rounded),
    ("zero", "The digest is that of a zero below 0.", _zero),
):
    bad(f"digest-{_name}", "DIG-002", _why, _patch, CHECKSUM, seen="verify")
