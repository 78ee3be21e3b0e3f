"""Bad archives of trellis/1, and of the clauses about two stages."""

import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from golden.cases import CHECKSUM, FORMAT, LIMIT, UNSUPPORTED, Patch, case, directory, flip, head, row, unit, zeros
from golden.good import archive, attachment, frame
from golden.good_trellis import trellis_base
from golden.model import DROP, TENSOR, Archive, Record
from golden.trellis import Trellis, integers, lossy
from rac.container import zstd

LANES, RAW, FRAMED = "lanes", "raw", "framed"
"""Records of `trellis_base`. BF16 of 9 x 14 behind lanes/1 and behind raw/1, F32 of 40 x 30 with framed lists."""
LISTS = {"corrections": 0, "rows": 1, "columns": 2, "outliers": 3}


def on(name: str, *patches: Patch) -> Patch:
    """One record of `trellis_base`, changed."""

    def patch(_: Archive) -> Archive:
        a = archive(trellis_base()[name])
        for p in patches:
            p(a)
        return a

    return patch


def second(name: str, **values: Any) -> Patch:
    """Replace keys of the map of trellis/1."""

    def patch(a: Archive) -> None:
        first, old = a[name].head["stages"]
        a[name].head["stages"] = [first, {k: v for k, v in (old | values).items() if v is not DROP}]

    return patch


def stages(name: str, make: Callable[[dict[str, Any], dict[str, Any]], list[Any]]) -> Patch:
    """Replace `stages`, given the two maps."""

    def patch(a: Archive) -> None:
        a[name].head["stages"] = make(*a[name].head["stages"])

    return patch


def front(name: str, values: dict[str, Any]) -> Patch:
    """Replace keys of the map of the first stage."""
    return stages(name, lambda f, t: [f | values, t])


def section(name: str, what: str, change: Callable[[bytes], bytes]) -> Patch:
    """Change one section of the trellis unit."""

    def patch(a: Archive) -> None:
        r = a[name]
        k = 1 if name == LANES else 0
        sizes = r.head["stages"][1]["sizes"]
        ends = [sum(sizes[:i]) for i in range(5)]
        sections = [r.units[k][x:y] for x, y in pairwise(ends)]
        sections[LISTS[what]] = change(sections[LISTS[what]])
        r.units[k] = b"".join(sections)
        second(name, sizes=[len(s) for s in sections])(a)

    return patch


def units(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Patch:
    """Other units."""

    def patch(a: Archive) -> None:
        a[name].units = change(a[name].units)

    return patch


def fixed(data: bytes) -> Callable[[bytes], bytes]:
    """Other bytes, whatever was there."""
    return lambda _: data


def ending(entry: int) -> Callable[[bytes], bytes]:
    """Another last entry of a list."""
    return lambda s: s[:-1] + bytes([entry & 255])


def bad(name: str, clause: str, why: str, patch: Patch, error: str = FORMAT, **more: str) -> None:
    """Register one."""
    case(f"trellis-{name}", error, clause, why, patch, **more)


# Chains of stages

for _name, _why, _make in (
    ("alone", "trellis/1 alone.", lambda f, t: [t]),
    ("first", "trellis/1 in front of raw/1.", lambda f, t: [t, f]),
    ("twice", "trellis/1 twice.", lambda f, t: [f, t, t]),
    ("only-twice", "trellis/1 twice and nothing in front.", lambda f, t: [t, t]),
    ("third", "Two stages in front of trellis/1.", lambda f, t: [f, {"id": "zstd/1"}, t]),
    ("behind", "A stage behind trellis/1.", lambda f, t: [f, t, f]),
    ("zstd", "zstd/1 behind raw/1.", lambda f, t: [f, {"id": "zstd/1"}]),
    ("version", "A version of trellis that is not assigned.", lambda f, t: [f, t | {"id": "trellis/2"}]),
    ("no-id", "The second stage has no `id`.", lambda f, t: [f, {k: v for k, v in t.items() if k != "id"}]),
    ("id-null", "The `id` of the second stage is null.", lambda f, t: [f, t | {"id": None}]),
    ("front", "Behind a stage that is not assigned.", lambda f, t: [{"id": "delta/1"}, t]),
    ("front-none", "Behind a stage without `id`.", lambda f, t: [{}, t]),
):
    bad(f"stages-{_name}", "TEN-009", _why, on(RAW, stages(RAW, _make)), UNSUPPORTED)
bad("stages-int", "TEN-004", "The second stage is a number.", on(RAW, stages(RAW, lambda f, t: [f, 1])))


def _attachment(a: Archive) -> Archive:
    """An attachment of two stages."""
    r = attachment("a", b"abc")
    r.head["stages"].append(Trellis("BF16").stage())
    return archive(r)


bad("attachment", "ATT-004", "An attachment with a second stage.", _attachment, UNSUPPORTED)

# Parameters

for _key in ("states", "zero", "low", "scale", "sizes"):
    bad(f"no-{_key}", "TCQ-001", f"`{_key}` is missing.", on(RAW, second(RAW, **{_key: DROP})))
bad("key", "TCQ-002", "A key that is not assigned.", on(RAW, second(RAW, bits=4)), UNSUPPORTED)
bad("key-x", "TCQ-002", "An x- key.", on(RAW, second(RAW, **{"x-a": 1})), UNSUPPORTED)
WRONG: dict[str, list[Any]] = {
    "states": [0, 2, 3, 12, 2048, -4, True, "16", None, [16]],
    "zero": [256, -1, True, None],
    "low": [256, -1, False, "0"],
    "scale": [None, "1", True, struct.pack("<I", 0x3F800000)],
    "sizes": [[3, 9, 54], [3, 9, 14, 40, 0], [-1, 13, 14, 40], [3, 9, 14, (1 << 40) + 1], 66, [3, True, 22, 40], None],
}
WRONG["gains"] = [0, -1, True, None, "9", [9], (1 << 40) + 1]
for _key, _values in WRONG.items():
    for _n, _value in enumerate(_values):
        bad(f"{_key}-{_n}", "TCQ-003", f"`{_key}` is {_value}.", on(RAW, second(RAW, **{_key: _value})))
for _name, _scale in (
    ("small", 0x217FFFFF),
    ("large", 0x5D800001),
    ("zero", 0),
    ("subnormal", 1),
    ("infinite", 0x7F800000),
    ("nan", 0x7FC00000),
    ("minus", 0xBF800000),
    ("minus-zero", 0x80000000),
    ("negative", -1),
    ("wide", 0x1_3F800000),
):
    bad(f"scale-{_name}", "TCQ-004", f"`scale` is {_scale:#x}.", on(RAW, second(RAW, scale=_scale)))
for _dtype in ("F64", "I16", "U8", "F8_E4M3", "C64"):
    bad(f"dtype-{_dtype}", "TCQ-005", f"The data type is {_dtype}.", on(RAW, head(RAW, dtype=_dtype)))
bad("dtype-F4", "TCQ-005", "The data type is F4.", on(RAW, head(RAW, dtype="F4", shape=[9, 28])))
for _low, _count in ((254, 3), (255, 2), (0, 257), (1, 256)):
    bad(
        f"corrections-{_count}",
        "TCQ-006",
        f"{_count} corrections from word {_low} on.",
        on(RAW, second(RAW, low=_low), section(RAW, "corrections", fixed(bytes(_count)))),
    )


def empty(shape: list[int]) -> Patch:
    """A tensor without elements: the trellis unit, no tile."""

    def patch(a: Archive) -> None:
        r = a[RAW]
        r.head |= {"shape": shape, "tile": [1, min(14, max(1, shape[1]))], "digest": zstd.digest(b"")}
        r.units, r.parts = r.units[:1], None

    return patch


bad("empty", "TCQ-010", "A tensor without elements.", on(RAW, empty([0, 14])))
bad("empty-wide", "TCQ-010", "No elements in 2^40 columns.", on(RAW, empty([0, 1 << 40])))

# Units

for _name, _clause, _why, _patch in (
    ("units-none", "TEN-014", "The trellis unit is missing.", on(RAW, units(RAW, lambda u: u[1:]))),
    ("units-shared", "TEN-014", "The shared unit of lanes/1 is missing.", on(LANES, units(LANES, lambda u: u[1:]))),
    ("units-less", "TEN-014", "A tile is missing.", on(LANES, units(LANES, lambda u: u[:-1]))),
    ("units-more", "TEN-014", "A unit too many.", on(RAW, units(RAW, lambda u: [*u, b""]))),
    ("units-two", "TEN-014", "The trellis unit is there twice.", on(RAW, units(RAW, lambda u: [u[0], *u]))),
    ("units-order", "TEN-016", "The trellis unit first.", on(LANES, units(LANES, lambda u: [u[1], u[0], *u[2:]]))),
    ("units-last", "TEN-016", "The trellis unit last.", on(RAW, units(RAW, lambda u: [*u[1:], u[0]]))),
    ("unit-more", "TEN-016", "A byte behind the sections.", on(RAW, unit(RAW, 0, lambda u: u + b"\0"))),
    ("unit-less", "TEN-016", "The last section lacks a byte.", on(LANES, unit(LANES, 1, lambda u: u[:-1]))),
    ("unit-none", "TEN-016", "The trellis unit is empty.", on(RAW, unit(RAW, 0, lambda u: b""))),
    ("unit-sizes", "TCQ-007", "`sizes` sum to a byte less.", on(RAW, second(RAW, sizes=[3, 9, 13, 40]))),
    ("unit-sizes-more", "TCQ-007", "`sizes` sum to ten bytes more.", on(RAW, second(RAW, sizes=[3, 9, 14, 50]))),
    ("unit-sizes-40", "TCQ-007", "A section of 2^40 bytes.", on(RAW, second(RAW, sizes=[3, 9, 14, 1 << 40]))),
    ("raw-wide", "RAW-002", "A tile has words of two bytes.", on(RAW, unit(RAW, 1, lambda u: u * 2))),
    ("zstd-wide", "ZTD-002", "A frame of words of four bytes.", on(FRAMED, unit(FRAMED, 1, fixed(zeros(4 * 480))))),
):
    bad(_name, _clause, _why, _patch)


def gained(data: bytes, stated: int | None = None) -> Patch:
    """A section of gains in the record behind raw/1, of 9 rows."""
    return on(RAW, unit(RAW, 0, lambda u: u + data), second(RAW, gains=len(data) if stated is None else stated))


for _name, _clause, _why, _patch in (
    ("none", "TCQ-007", "Gains are stated, and the unit ends before them.", gained(b"", 9)),
    ("less", "TCQ-007", "The last gain is missing.", gained(bytes(8), 9)),
    ("40", "TCQ-007", "2^40 bytes of gains.", gained(bytes(9), 1 << 40)),
    ("key", "TEN-016", "Gains that no key states.", on(RAW, unit(RAW, 0, lambda u: u + bytes(9)))),
    ("short", "ZST-001", "The list of gains lacks an entry, and is no frame.", gained(bytes(8))),
    ("long", "ZST-001", "The list of gains has an entry too many, and is no frame.", gained(bytes(10))),
    ("frame-long", "ZST-002", "The frame of gains has an entry too many.", gained(zstd.compress(bytes(10)))),
):
    bad(f"gains-{_name}", _clause, _why, _patch)
bad("unit-check", "UNI-003", "The trellis unit has another checksum.", on(RAW, directory(RAW, flip(8))), CHECKSUM)
for _name, _clause, _why, _wrong in (
    ("front-shift", "LAN-003", "`shift` of lanes/1 as for words of two bytes.", {"shift": 8}),
    ("front-runs", "LAN-007", "A run of lanes/1 as for words of two bytes.", {"runs": [250, 7]}),
):
    bad(_name, _clause, _why, on(LANES, front(LANES, _wrong)))


def padded(u: bytes) -> bytes:
    """A frame of the same content, with so many empty blocks that it is too large for 480 words of one byte."""
    data = zstd.decompress(u, 480)
    return frame(data, [(0, data), *[(0, b"")] * ((2 * 480 + 65536) // 3)])


bad("unit-large", "TEN-016", "A tile of more than two bytes a word and 64 KiB.", on(FRAMED, unit(FRAMED, 1, padded)))


def large(rows: int, cols: int, tiles: list[bytes]) -> Patch:
    """F32 in tiles of one row, whose digest is not looked at."""
    stated = {"name": "l", "dtype": "F32", "shape": [rows, cols], "axis": 1, "tile": [1, cols], "digest": bytes(16)}
    chain = [{"id": "zstd/1"}, Trellis("F32").stage()]
    return lambda _: archive(Record(TENSOR, stated | {"stages": chain}, [b"", *tiles]))


bad(
    "tile-limit",
    "TEN-013",
    "A tile of 16 MiB + 4 bytes in 4 MiB + 1 words of one byte.",
    large(1, (4 << 20) + 1, [zeros((4 << 20) + 1)]),
    LIMIT,
)
bad("expansion", "TEN-015", "68 MiB from units of size 0, in 17 Mi words.", large(17, 1 << 20, [b""] * 17), LIMIT)

# Lists

for _what, _n in (("rows", 40), ("columns", 30)):
    for _entry in (61, -61, 127, -127, *([-128] if _what == "rows" else [])):
        _about = f"An entry of `{_what}` is {_entry}"
        bad(f"{_what}-{_entry}", "TCQ-008", _about + ".", on(RAW, section(RAW, _what, ending(_entry))))
        _patch = section(FRAMED, _what, fixed(zstd.compress(bytes(_n - 1) + bytes([_entry & 255]))))
        bad(f"{_what}-frame-{_entry}", "TCQ-008", _about + ", in a frame.", on(FRAMED, _patch))
    for _name, _clause, _why, _change in (
        ("short", "001", "A list lacks an entry, and is no frame.", fixed(bytes(_n - 1))),
        ("long", "001", "A list has an entry too many, and is no frame.", fixed(bytes(_n + 1))),
        ("frame-short", "002", "A frame of an entry less.", fixed(zstd.compress(bytes(_n - 1)))),
        ("frame-long", "002", "A frame of an entry more.", fixed(zstd.compress(bytes(_n + 1)))),
        ("trailing", "001", "Nine bytes behind the frame of a list.", lambda s: s + bytes(9)),
        (
            "huge",
            "002",
            "The frame of a list states 2^32 - 1 bytes.",
            fixed(zeros(_n)[:5] + b"\xff" * 4 + zeros(_n)[9:]),
        ),
        ("bomb", "005", "The frame of a list yields 64 MiB.", fixed(zeros(_n)[:9] + zeros(64 << 20)[9:])),
    ):
        bad(f"{_what}-{_name}", f"ZST-{_clause}", _why, on(FRAMED, section(FRAMED, _what, _change)))
bad("lists-swapped", "ZST-001", "Rows and columns have changed places.", on(RAW, second(RAW, sizes=[3, 14, 9, 40])))

# Outliers of 10 bytes in the record behind raw/1: (1, 2), (1, 5), (4, 0), (8, 13)


def place(i: int, y: int, x: int) -> Callable[[bytes], bytes]:
    """Move outlier `i`."""
    return lambda s: s[: 10 * i] + struct.pack("<II", y, x) + s[10 * i + 8 :]


def widened(s: bytes) -> bytes:
    """Elements of four bytes."""
    return b"".join(s[i : i + 10] + bytes(2) for i in range(0, len(s), 10))


for _name, _why, _change in (
    ("size", "The outliers lack a byte.", lambda s: s[:-1]),
    ("size-more", "Two bytes behind the outliers.", lambda s: s + bytes(2)),
    ("word", "Outliers with elements of four bytes.", widened),
    ("row", "An outlier in row 9 of 9.", place(3, 9, 0)),
    ("column", "An outlier in column 14 of 14.", place(1, 1, 14)),
    ("flat", "An outlier in column 16 of 14 of the first row.", place(0, 0, 16)),
    ("row-max", "An outlier in row 2^32 - 1.", place(3, (1 << 32) - 1, 0)),
    ("column-max", "An outlier in column 2^32 - 1.", place(3, 8, (1 << 32) - 1)),
    ("twice", "Two outliers at one place.", place(1, 1, 2)),
    ("same", "An outlier twice.", lambda s: s[:20] + s[10:]),
    ("rows", "Outliers in descending order of rows.", lambda s: s[:10] + s[20:30] + s[10:20] + s[30:]),
    ("columns", "Outliers of a row in descending order of columns.", lambda s: s[10:20] + s[:10] + s[20:]),
    ("by-column", "Outliers in ascending order of (column, row).", lambda s: s[20:30] + s[:20] + s[30:]),
):
    bad(f"outlier-{_name}", "TCQ-009", _why, on(RAW, section(RAW, "outliers", _change)))

# Index and digests

bad("method", "IDX-011", "The row states the first stage as the method.", on(LANES, row(LANES, method="lanes/1")))


def _parts(a: Archive) -> None:
    parts = list(a[RAW].parts or ())
    parts[0], parts[4] = 0, parts[0] + parts[4]
    row(RAW, parts=parts)(a)


def _zero(a: Archive) -> Archive:
    """A word of magnitude 0 in state 1 is -0; the digest is that of +0."""
    r = lossy("z", [2, 1], [1, 0], Trellis("BF16", 4, 0, 0, corrections=[-32]))
    r.head["digest"] = zstd.digest(bytes.fromhex("2040 0000"))
    return archive(r)


BYTES = zstd.digest(bytes(integers(250, 9 * 14)))
bad("parts", "IDX-012", "`parts` count the trellis unit with the planes.", on(RAW, _parts), seen="verify")
for _name, _why, _patch in (
    ("word", "A word differs from what was packed; all checksums are repaired.", on(RAW, unit(RAW, 1, flip(0)))),
    ("unit", "A correction differs from what was packed.", on(LANES, unit(LANES, 1, flip(1)))),
    ("bytes", "The digest is that of the words of one byte.", on(RAW, head(RAW, digest=BYTES))),
    ("zero", "A zero in an odd state is negative; the digest is that of a positive one.", _zero),
):
    bad(f"digest-{_name}", "DIG-002", _why, _patch, CHECKSUM, seen="verify")
