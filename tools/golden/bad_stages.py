"""Bad archives of the stages: raw/1, zstd/1, Zstandard frames, lanes/1."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from golden.cases import (
    CHECKSUM,
    FORMAT,
    LANES,
    PAIRS,
    RAW,
    UNSUPPORTED,
    ZSTD,
    Patch,
    both,
    case,
    flip,
    head,
    keep,
    only,
    set_bytes,
    stage,
    unit,
)
from golden.good import archive, dense, frame, tensor
from golden.lanes import Lanes, table_code
from golden.model import DROP, Archive
from rac.container import zstd

# raw/1 and zstd/1

keep(RAW, ZSTD)

case("raw-key", UNSUPPORTED, "RAW-001", "raw/1 with a parameter.", stage(RAW, level=1))
case("raw-key-x", UNSUPPORTED, "RAW-001", "raw/1 with an x- key.", stage(RAW, **{"x-a": 1}))
case("raw-short", FORMAT, "RAW-002", "A raw unit lacks a byte.", unit(RAW, 0, lambda u: u[:-1]))
case("raw-long", FORMAT, "RAW-002", "A raw unit has a byte too many.", unit(RAW, 1, lambda u: u + b"\0"))
case("raw-nothing", FORMAT, "RAW-002", "A raw unit is empty.", unit(RAW, 0, lambda u: b""))
case("zstd-key", UNSUPPORTED, "ZTD-001", "zstd/1 with a parameter.", stage(ZSTD, level=1))
case(
    "zstd-rows",
    FORMAT,
    "ZTD-002",
    "The frame holds the bytes of a smaller tile.",
    unit(ZSTD, 0, lambda u: zstd.compress(bytes(32))),
)
DATA = bytes(range(48))


def framed(make: Callable[[bytes], bytes]) -> Patch:
    """A tensor of 48 bytes under zstd/1 whose frame `make` gives."""
    r = tensor("z", "U8", [6, 8], list(DATA), "zstd/1")
    r.units = [make(DATA)]
    return only(r)


def stored(d: bytes) -> bytes:
    """A stored frame."""
    return frame(d, [(0, d)])


SKIP = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
for _name, _clause, _why, _make in (
    ("empty", "001", "No bytes.", lambda d: b""),
    ("magic", "001", "Another magic number.", lambda d: b"\x27" + stored(d)[1:]),
    ("skippable", "001", "A skippable frame alone.", lambda d: SKIP),
    ("skippable-first", "001", "A skippable frame first.", lambda d: SKIP + stored(d)),
    ("skippable-last", "001", "A skippable frame behind.", lambda d: stored(d) + SKIP),
    ("trailing", "001", "A byte behind the frame.", lambda d: stored(d) + b"\0"),
    ("two", "001", "Two frames that together have the size.", lambda d: stored(d[:20]) + stored(d[20:])),
    ("twice", "001", "The frame twice.", lambda d: stored(d) * 2),
    ("empty-second", "001", "An empty frame behind.", lambda d: stored(d) + frame(b"", [(0, b"")])),
    ("reserved", "001", "The reserved bit of the frame header is set.", lambda d: flip(4, 8)(stored(d))),
    ("cut", "001", "The frame lacks its last byte.", lambda d: stored(d)[:-1]),
    ("cut-header", "001", "Only the magic number.", lambda d: stored(d)[:4]),
    ("cut-block", "001", "No block.", lambda d: stored(d)[:9]),
    ("no-last", "001", "No block is the last one.", lambda d: flip(9)(stored(d))),
    ("no-size", "002", "The content size is not stated.", lambda d: b"\x28\xb5\x2f\xfd\0\x58" + stored(d)[9:]),
    ("size-more", "002", "States a byte more.", lambda d: set_bytes(5, b"\x31")(stored(d))),
    (
        "size-huge",
        "002",
        "States 2^63 bytes.",
        lambda d: b"\x28\xb5\x2f\xfd\xe0" + (1 << 63).to_bytes(8, "little") + stored(d)[9:],
    ),
    ("size-max", "002", "States 2^64 - 1 bytes.", lambda d: b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + stored(d)[9:]),
    ("size-4g", "002", "States 2^32 - 1 bytes.", lambda d: set_bytes(5, b"\xff" * 4)(stored(d))),
    ("size-zero", "002", "States no bytes.", lambda d: set_bytes(5, bytes(4))(stored(d))),
    ("window", "003", "A window of 2^27 + 2^24.", lambda d: frame(d, [(0, d)], window=17 << 3 | 1)),
    ("window-max", "003", "The largest window, 3.75 TiB.", lambda d: frame(d, [(0, d)], window=255)),
    ("dictionary", "004", "Needs the dictionary 1.", lambda d: b"\x28\xb5\x2f\xfd\xa1\x01" + stored(d)[5:]),
    ("less", "005", "The blocks yield less than the frame states.", lambda d: frame(d, [(0, d[:40])])),
    ("more", "005", "The blocks yield more than the frame states.", lambda d: frame(d, [(0, d + b"abc")])),
    (
        "rle-more",
        "005",
        "A block repeats a byte 2^17 times.",
        lambda d: frame(d, [(0, d[:47]), (0, b"")])[:-3] + (1 << 20 | 3).to_bytes(3, "little") + b"\0",
    ),
    ("block-3", "005", "A block of the reserved type.", lambda d: flip(9, 6)(stored(d))),
    ("block-bits", "005", "A compressed block that is not one.", lambda d: flip(9, 4)(stored(d))),
):
    case(f"frame-{_name}", FORMAT, f"ZST-{_clause}", _why, framed(_make))

# lanes/1

keep(LANES)

for _key in (
    "cols",
    "escapes",
    "lanes",
    "order",
    "packed",
    "per",
    "rows",
    "runs",
    "shift",
    "sign",
    "sizes",
    "tables",
    "zero",
):
    case(f"lanes-no-{_key}", FORMAT, "LAN-001", f"`{_key}` is missing.", stage(LANES, **{_key: DROP}))
case("lanes-key", UNSUPPORTED, "LAN-002", "A key that is not assigned.", stage(LANES, scale=1))
case("lanes-key-x", UNSUPPORTED, "LAN-002", "An x- key.", stage(LANES, **{"x-a": 1}))
WRONG: dict[str, list[Any]] = {
    "lanes": [0, 1025, True, "1", None],
    "packed": [2, -1, True, False],
    "per": [0, 3, True],
    "zero": [16, -1],
    "sign": [2, True],
    "shift": [16, -1],
    "tables": [0, 257],
    "order": [-9, 9, None],
    "rows": [0, 257],
    "cols": [0, 257, True],
    "runs": [None, {}, ["0", 3]],
    "escapes": [5, [None], [True]],
    "sizes": [[1, 2], [1, 2, 3, 4], [-1, 0, 0], [(1 << 40) + 1, 0, 0], 3, [1, True, 0]],
}
for _key, _values in WRONG.items():
    for _n, _value in enumerate(_values):
        case(f"lanes-{_key}-{_n}", FORMAT, "LAN-003", f"`{_key}` is {_value}.", stage(LANES, **{_key: _value}))
case("lanes-no-top", FORMAT, "LAN-004", "zero, sign and shift leave no top.", stage(LANES, zero=8))
case("lanes-pairs-4160", FORMAT, "LAN-005", "65 x 64 class pairs.", stage(LANES, rows=65, cols=64))


def empty_lanes(a: Archive) -> Archive:
    """lanes/1 for a tensor without elements: one shared unit, no tile."""
    r = a[LANES]
    r.head |= {"shape": [0, 14], "tile": [1, 14], "digest": zstd.digest(b"")}
    r.units, r.parts = r.units[:1], None
    return a


case("lanes-empty", FORMAT, "LAN-006", "A tensor without elements.", empty_lanes)
for _name, _runs in (
    ("odd", [0, 3, 5]),
    ("count-0", [0, 0, 3, 3]),
    ("count-257", [0, 257]),
    ("overlap", [0, 3, 2, 3]),
    ("descending", [9, 3, 2, 3]),
    ("beyond", [250, 7]),
    ("start", [256, 1]),
    ("negative", [-1, 3]),
):
    case(
        f"lanes-runs-{_name}", FORMAT, "LAN-007", f"`runs` are {_runs} below a limit of 256.", stage(LANES, runs=_runs)
    )


def wide(a: Archive) -> None:
    """Words of 32 bits without raw bits, in the place of the base."""
    a.records = [tensor("wide", "U32", [3], [1, 2, 3], Lanes(32, 1, runs=[0, 4], escapes=[9]))]


for _name, _clause, _why, _changed, _words in (
    ("runs-65536", "LAN-007", "A top has 32 bits, a run ends at 65536.", {"runs": [0, 2, 65535, 2]}, [1, 65535, 65536]),
    (
        "runs-start-65536",
        "LAN-007",
        "A top has 32 bits, a run starts at 65536.",
        {"runs": [0, 3, 65536, 1]},
        [1, 2, 65536],
    ),
    ("escape-65536", "LAN-008", "A top has 32 bits, and an escape is 65536.", {"escapes": [65536]}, [1, 2, 3]),
):  # with the digest of what a reader without the limit makes of it
    _digest = head("wide", digest=zstd.digest(dense("U32", _words)))
    case(f"lanes-{_name}", FORMAT, _clause, _why, both(wide, stage("wide", **_changed), _digest))
case("lanes-escape-limit", FORMAT, "LAN-008", "An escape at the limit.", stage(LANES, escapes=[256]))
case("lanes-escape-negative", FORMAT, "LAN-008", "An escape of -1.", stage(LANES, escapes=[-1]))
case("lanes-base-0", FORMAT, "LAN-009", "No base symbols.", stage(LANES, runs=[], escapes=[]))
case("lanes-base-1", FORMAT, "LAN-009", "One base symbol.", stage(LANES, runs=[0, 1], escapes=[]))
case("lanes-base-257", FORMAT, "LAN-009", "257 base symbols.", stage(LANES, runs=[0, 256], escapes=[0]))
case("lanes-base-17", FORMAT, "LAN-009", "17 base symbols in pairs.", stage(PAIRS, runs=[0, 17], escapes=[]), on=PAIRS)


def shared(i: str, section: int, change: Callable[[bytes], bytes], keep_size: bool = False) -> Patch:
    """Change one section of the shared unit: tables, rows, columns or class map."""

    def patch(a: Archive) -> None:
        r = a[i]
        sizes = r.head["stages"][0]["sizes"]
        ends = [0, sizes[0], sum(sizes[:2]), sum(sizes), len(r.units[0])]
        sections = [r.units[0][x:y] for x, y in pairwise(ends)]
        sections[section] = change(sections[section])
        r.units[0] = b"".join(sections)
        if not keep_size:
            r.head["stages"][0]["sizes"] = [len(s) for s in sections[:3]]

    return patch


def frequencies(make: Callable[[int], list[int]], bits: Callable[[bytes], bytes] = bytes) -> Patch:
    """Two equal tables of the symbols of the lanes record."""

    def patch(a: Archive) -> None:
        s = a[LANES].head["stages"][0]
        n = sum(s["runs"][1::2]) + len(s["escapes"])
        shared(LANES, 0, lambda _: bits(table_code([make(n)] * 2, s["order"])))(a)

    return patch


case("shared-sizes", FORMAT, "LAN-010", "`sizes` and the shared unit differ.", stage(LANES, sizes=[9, 9, 0]))
case("shared-map", FORMAT, "LAN-010", "The class map has an entry too many.", shared(LANES, 3, lambda s: s + b"\0"))
case("map-table", FORMAT, "LAN-011", "The class map names table 2 of 2.", shared(LANES, 3, lambda s: b"\2" + s[1:]))
case("map-255", FORMAT, "LAN-011", "The class map names table 255.", shared(LANES, 3, lambda s: s[:-1] + b"\xff"))
case("tables-empty", FORMAT, "LAN-012", "No table bits.", shared(LANES, 0, lambda s: b""))
case("tables-cut", FORMAT, "LAN-012", "The tables run past their section.", shared(LANES, 0, lambda s: s[:-1]))
case("tables-zeros", FORMAT, "LAN-012", "A code of zeros only.", shared(LANES, 0, lambda s: bytes(len(s))))
case("tables-q14", FORMAT, "LAN-012", "A code with 14 zeros in front.", shared(LANES, 0, lambda s: b"\x00\x03" + s[2:]))
case(
    "tables-sum-less", FORMAT, "LAN-013", "Frequencies sum to 4095.", frequencies(lambda n: [4000, 95] + [0] * (n - 2))
)
case(
    "tables-sum-more", FORMAT, "LAN-013", "Frequencies sum to 4097.", frequencies(lambda n: [4000, 97] + [0] * (n - 2))
)
case(
    "tables-sum-8192",
    FORMAT,
    "LAN-013",
    "Frequencies sum to 8192.",
    frequencies(lambda n: [4000, 4000, 192] + [0] * (n - 3)),
)
case("tables-4096", FORMAT, "LAN-013", "A frequency of 4096.", frequencies(lambda n: [4096] + [0] * (n - 1)))
case(
    "tables-negative", FORMAT, "LAN-013", "A negative frequency.", frequencies(lambda n: [4095, 5, -4] + [0] * (n - 3))
)
case("tables-more", FORMAT, "LAN-014", "A zero byte behind the tables.", shared(LANES, 0, lambda s: s + b"\0"))
case(
    "tables-bits",
    FORMAT,
    "LAN-014",
    "A one behind the last table.",
    shared(LANES, 0, lambda s: s[:-1] + bytes([s[-1] | 1])),
)
case(
    "tables-one-more",
    FORMAT,
    "LAN-014",
    "A table more than `tables`.",
    lambda a: both(stage(LANES, tables=1), shared(LANES, 3, lambda s: bytes(len(s))))(a),
)
case(
    "classes-one", FORMAT, "LAN-015", "Column classes where there is one class.", shared(LANES, 2, lambda s: bytes(14))
)
case(
    "classes-short", FORMAT, "LAN-016", "A row class less than rows, and no frame.", shared(LANES, 1, lambda s: s[:-1])
)
case("classes-none", FORMAT, "LAN-016", "No row classes where there are two.", shared(LANES, 1, lambda s: b""))
case(
    "classes-frame",
    FORMAT,
    "LAN-016",
    "A frame of a row class more.",
    shared(LANES, 1, lambda s: zstd.compress(s + b"\0")),
)
case("classes-2", FORMAT, "LAN-017", "Row class 2 of 2.", shared(LANES, 1, lambda s: s[:-1] + b"\2"))
case(
    "classes-frame-2",
    FORMAT,
    "LAN-017",
    "Column class 3 of 3 in a frame.",
    shared(PAIRS, 2, lambda s: zstd.compress(s[:-1] + b"\3")),
    on=PAIRS,
)


@dataclass
class Parts:
    """A tile unit in its parts, and back."""

    escape_count: int
    sizes: list[int]
    counts: list[int]
    words: list[int]
    escapes: bytes
    planes: list[bytes]
    pads: dict[int, bytes]
    """Padding by place: 0 directory, 1 words, 2 escapes, 3... planes."""
    tail: bytes = b""

    @classmethod
    def cut(cls, unit: bytes, stage: dict[str, Any], n: int) -> "Parts":
        """The parts of a tile of `n` elements."""
        raw, lanes = stage["shift"] + stage["sign"], stage["lanes"]
        plain = [-(-n * b // 8) for b in (32, 16, 8, 4, 2, 1) if raw & b]
        k = len(plain) * stage["packed"]
        numbers = [int.from_bytes(unit[i : i + 4], "little") for i in range(0, 4 + 4 * k, 4)]
        counts = [int.from_bytes(unit[i : i + 2], "little") for i in range(4 + 4 * k, 4 + 4 * k + 2 * lanes, 2)]
        at = up(4 + 4 * k + 2 * lanes)
        words = [int.from_bytes(unit[i : i + 4], "little") for i in range(at, at + 4 * sum(counts), 4)]
        at += up(4 * sum(counts))
        escapes = unit[at : at + numbers[0]]
        at += up(numbers[0])
        planes = []
        for size in numbers[1:] or plain:
            planes.append(unit[at : at + size])
            at += up(size)
        return cls(numbers[0], numbers[1:], counts, words, escapes, planes, {})

    def join(self) -> bytes:
        """The unit."""
        directory = self.escape_count.to_bytes(4, "little")
        directory += b"".join(s.to_bytes(4, "little") for s in self.sizes)
        directory += b"".join(c.to_bytes(2, "little") for c in self.counts)
        words = b"".join(w.to_bytes(4, "little") for w in self.words)
        pieces = [directory, words, self.escapes, *self.planes]
        return b"".join(p + self.pads.get(i, bytes(-len(p) % 16)) for i, p in enumerate(pieces)) + self.tail


def up(n: int) -> int:
    """`n` rounded up to 16."""
    return n + -n % 16


def tile(i: str, k: int, change: Callable[[Parts], Any]) -> Patch:
    """Change the parts of tile unit `k` of record `i`."""

    def patch(a: Archive) -> None:
        r = a[i]
        tr, tc = r.head["tile"]
        h = min(tr, r.head["shape"][0] - (k - 1) * tr)
        parts = Parts.cut(r.units[k], r.head["stages"][0], h * tc)
        if parts.join() != r.units[k]:
            raise ValueError("the tile was not understood")
        change(parts)
        r.units[k] = parts.join()

    return patch


def pad_of(place: int, size: Callable[[Parts], int]) -> Callable[[Parts], None]:
    """Put a one at the end of the padding behind a part."""

    def change(p: Parts) -> None:
        n = -size(p) % 16
        if not n:
            raise ValueError("there is no padding to spoil")
        p.pads[place] = bytes(n - 1) + b"\1"

    return change


def set_word(p: Parts, i: int, w: int) -> None:
    """Replace a word."""
    p.words[i] = w


case("tile-empty-unit", FORMAT, "LAN-020", "The unit of a tile is empty.", unit(LANES, 1, lambda u: b""))
case("tile-short", FORMAT, "LAN-020", "The unit lacks its last 16 bytes.", unit(LANES, 1, lambda u: u[:-16]))
case("tile-more", FORMAT, "LAN-020", "16 zero bytes behind the planes.", unit(LANES, 1, lambda u: u + bytes(16)))
case("tile-unpadded", FORMAT, "LAN-020", "The unit lacks the last byte of padding.", unit(LANES, 1, lambda u: u[:-1]))
case(
    "tile-counts",
    FORMAT,
    "LAN-020",
    "A lane states 65535 words.",
    tile(LANES, 1, lambda p: p.counts.__setitem__(0, 65535)),
)
case(
    "tile-escapes-4g",
    FORMAT,
    "LAN-020",
    "States 2^32 - 1 escape bytes.",
    tile(LANES, 1, lambda p: setattr(p, "escape_count", (1 << 32) - 1)),
)
case("tile-directory", FORMAT, "LAN-020", "Ends inside the directory.", unit(LANES, 1, lambda u: u[:5]))
case(
    "tile-packed-directory",
    FORMAT,
    "LAN-020",
    "Ends inside the sizes of the planes.",
    unit(PAIRS, 1, lambda u: u[:9]),
    on=PAIRS,
)
case(
    "tile-padding-directory",
    FORMAT,
    "LAN-021",
    "The padding of the directory is not zero.",
    tile(LANES, 1, pad_of(0, lambda p: 4 + 2 * len(p.counts))),
)
case(
    "tile-padding-words",
    FORMAT,
    "LAN-021",
    "The padding of the words is not zero.",
    tile(LANES, 1, pad_of(1, lambda p: 4 * len(p.words))),
)
case(
    "tile-padding-escapes",
    FORMAT,
    "LAN-021",
    "The padding of the escapes is not zero.",
    tile(LANES, 1, pad_of(2, lambda p: len(p.escapes))),
)
case(
    "tile-padding-plane",
    FORMAT,
    "LAN-021",
    "The padding of a plane is not zero.",
    tile(LANES, 1, pad_of(3, lambda p: len(p.planes[0]))),
)
case(
    "tile-padding-packed",
    FORMAT,
    "LAN-021",
    "The padding of a packed plane is not zero.",
    tile(PAIRS, 1, pad_of(3, lambda p: len(p.planes[0]))),
    on=PAIRS,
)
case(
    "plane-bits",
    FORMAT,
    "LAN-022",
    "The last bit behind a plane of 1 bit is set.",
    tile(PAIRS, 1, lambda p: p.planes.__setitem__(2, flip(-1, 128)(p.planes[2]))),
    on=PAIRS,
)
case(
    "plane-bits-4",
    FORMAT,
    "LAN-022",
    "A bit behind a plane of 4 bits is set.",
    tile(PAIRS, 1, lambda p: _plain_plane(p, 1, 17, 16)),
    on=PAIRS,
)


def _plain_plane(p: Parts, k: int, size: int, mask: int) -> None:
    plane = zstd.decompress(p.planes[k], size) if len(p.planes[k]) < size else p.planes[k]
    p.planes[k], p.sizes[k] = flip(-1, mask)(plane), size


case("lane-zero", FORMAT, "LAN-023", "A lane begins with a zero word.", tile(LANES, 1, lambda p: set_word(p, 0, 0)))
case(
    "lane-zero-second",
    FORMAT,
    "LAN-023",
    "The second lane begins with a zero word.",
    tile(LANES, 1, lambda p: set_word(p, min(2, p.counts[0]), 0)),
)
case(
    "lane-state",
    CHECKSUM,
    "LAN-024",
    "The last word is another: the state of its lane does not end at 0.",
    tile(LANES, 1, lambda p: set_word(p, -1, p.words[-1] ^ 1)),
)


def _word_less(p: Parts) -> None:
    p.counts[1] -= 1
    p.words.pop()


def _word_more(p: Parts) -> None:
    p.counts[1] += 1
    p.words.append(1)


def _words_moved(p: Parts) -> None:
    p.counts[0] -= 1
    p.counts[1] += 1


def _words_swapped(p: Parts) -> None:
    p.words[0], p.words[2] = p.words[2], p.words[0]


case(
    "lane-less",
    CHECKSUM,
    "LAN-024",
    "The last word is missing, and the count of a lane says so.",
    tile(LANES, 1, _word_less),
)
case("lane-more", CHECKSUM, "LAN-024", "A lane has a word too many.", tile(LANES, 1, _word_more))
case("lane-moved", CHECKSUM, "LAN-024", "A word went from one lane to the next.", tile(LANES, 1, _words_moved))
case(
    "lane-swapped", CHECKSUM, "LAN-024", "The first words of two lanes changed places.", tile(LANES, 1, _words_swapped)
)
case(
    "lane-pairs",
    CHECKSUM,
    "LAN-024",
    "A state does not end at 0, in pairs.",
    tile(PAIRS, 1, lambda p: set_word(p, -1, p.words[-1] ^ 1)),
    on=PAIRS,
)


def idle(a: Archive) -> Archive:
    """One element in two lanes; the second gets a word."""
    r = tensor("one", "U8", [1], [1], Lanes(8, 2, runs=[0, 2], tables=[[2048, 2048]]))
    out = archive(r)
    parts = Parts.cut(r.units[1], r.head["stages"][0], 1)
    parts.counts[1] = 1
    parts.words.append(1)
    r.units[1] = parts.join()
    return out


case("lane-idle", CHECKSUM, "LAN-025", "A lane without symbols has a word.", idle)
case(
    "escape-limit",
    FORMAT,
    "LAN-026",
    "An escape leads to a top of 256 or more.",
    tile(LANES, 1, lambda p: setattr(p, "escapes", b"\xff" * len(p.escapes))),
)


def _escapes(p: Parts, n: int) -> None:
    p.escape_count += n
    p.escapes = (p.escapes + bytes(max(n, 0)))[: p.escape_count]


case("escapes-more", FORMAT, "LAN-027", "An escape byte too many.", tile(LANES, 1, lambda p: _escapes(p, 1)))
case("escapes-less", FORMAT, "LAN-027", "An escape byte too few.", tile(LANES, 1, lambda p: _escapes(p, -1)))
case("escapes-none", FORMAT, "LAN-027", "No escape bytes.", tile(LANES, 1, lambda p: _escapes(p, -len(p.escapes))))
case(
    "plane-size",
    FORMAT,
    "LAN-028",
    "A stored plane is larger than the plane.",
    tile(PAIRS, 1, lambda p: (p.sizes.__setitem__(0, 67), p.planes.__setitem__(0, bytes(67)))),
    on=PAIRS,
)
case(
    "plane-size-4g",
    FORMAT,
    "LAN-028",
    "A stored plane of 2^32 - 1 bytes.",
    tile(PAIRS, 1, lambda p: p.sizes.__setitem__(0, (1 << 32) - 1)),
    on=PAIRS,
)
case(
    "plane-frame",
    FORMAT,
    "ZST-001",
    "A plane smaller than its plain size is no frame.",
    tile(PAIRS, 1, lambda p: p.planes.__setitem__(0, bytes(len(p.planes[0])))),
    on=PAIRS,
)
case(
    "plane-frame-size",
    FORMAT,
    "ZST-002",
    "The frame of a plane holds another size.",
    tile(PAIRS, 1, lambda p: (p.planes.__setitem__(0, f := zstd.compress(bytes(65))), p.sizes.__setitem__(0, len(f)))),
    on=PAIRS,
)
case(
    "plane-frame-trailing",
    FORMAT,
    "ZST-001",
    "A byte follows the frame of a plane.",
    tile(PAIRS, 1, lambda p: (p.planes.__setitem__(0, p.planes[0] + b"\0"), p.sizes.__setitem__(0, len(p.planes[0])))),
    on=PAIRS,
)
