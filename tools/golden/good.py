"""The good archives."""

from collections.abc import Callable
from math import prod
from typing import Any

from golden.lanes import Lanes, encode, up16
from golden.model import ATTACHMENT, TENSOR, Archive, Record
from golden.numbers import EXPONENT, Numbers, specials, weights
from rac.container import zstd
from rac.registry import DTYPES

GOOD: dict[str, tuple[Callable[[], Archive], str, tuple[str, ...]]] = {}
"""File name to (maker, one sentence, clauses that only a good archive can show)."""

Make = Callable[[], Archive]


def good(name: str, about: str, *clauses: str) -> Callable[[Make], Make]:
    """Register a maker."""

    def add(make: Make) -> Make:
        GOOD[name + ".rac"] = (make, about, tuple(f"RAC-{c}" for c in clauses))
        return make

    return add


def dense(dtype: str, words: list[int]) -> bytes:
    """The dense bytes of a tensor."""
    size = DTYPES[dtype].word
    return b"".join(w.to_bytes(size, "little") for w in words)


def frame(data: bytes, blocks: list[tuple[int, bytes]], window: int | None = None, checksum: bool = False) -> bytes:
    """A Zstandard frame of content size len(data) by hand; blocks are (type, bytes), `window` the descriptor byte."""
    out = b"\x28\xb5\x2f\xfd" + bytes([0x80 | (0x20 if window is None else 0) | (4 if checksum else 0)])
    out += (b"" if window is None else bytes([window])) + len(data).to_bytes(4, "little")
    at = 0
    for i, (kind, block) in enumerate(blocks):
        size = block[0] if kind == 1 else len(block)  # an RLE block is (1, bytes([count, value]))
        at += size
        last = i == len(blocks) - 1
        out += (size << 3 | kind << 1 | last).to_bytes(3, "little") + (block[1:] if kind == 1 else block)
    return out


def tensor(
    name: str,
    dtype: str,
    shape: list[int],
    words: list[int],
    stage: str | Lanes = "raw/1",
    *,
    axis: int | None = None,
    tile: tuple[int, int] | None = None,
    more: dict[str, Any] | None = None,
) -> Record:
    """A tensor record; `more` are further keys of its head."""
    more = more or {}
    d = DTYPES[dtype]
    axis = max(0, len(shape) - 1) if axis is None else axis
    rows = prod(shape[:axis])
    cols = prod(shape[axis:]) * d.bits // (8 * d.word)
    if len(words) != rows * cols:
        raise ValueError(f"{name}: {len(words)} words for {rows} x {cols}")
    tr, tc = tile or (max(1, rows), max(1, cols))
    head: dict[str, Any] = {
        "name": name,
        "dtype": dtype,
        "shape": shape,
        "axis": axis,
        "tile": [tr, tc],
        "digest": zstd.digest(dense(dtype, words)),
    }
    if isinstance(stage, Lanes):
        coded = encode(stage, words, rows, cols, tr, tc)
        return Record(TENSOR, head | {"stages": [coded.stage]} | more, coded.units, parts=coded.parts)
    units = []
    for r0 in range(0, rows, tr) if cols else ():
        for c0 in range(0, cols, tc):
            piece = [words[y * cols + x] for y in range(r0, min(rows, r0 + tr)) for x in range(c0, min(cols, c0 + tc))]
            data = dense(dtype, piece)
            if stage == "zstd/1":
                data = zstd.compress(b"".join(data[b :: d.word] for b in range(d.word)))
            units.append(data)
    return Record(TENSOR, head | {"stages": [{"id": stage}]} | more, units)


def attachment(name: str, data: bytes, stage: str = "raw/1", more: dict[str, Any] | None = None) -> Record:
    """An attachment record."""
    head = {"name": name, "size": len(data), "stages": [{"id": stage}], "digest": zstd.digest(data)}
    return Record(ATTACHMENT, head | (more or {}), [zstd.compress(data) if stage == "zstd/1" else data])


def archive(*records: Record, **header: Any) -> Archive:
    """An archive with `features` and more header keys."""
    return Archive({"features": []} | header, list(records))


def tops(p: Lanes, words: list[int]) -> set[int]:
    """Tops of all words."""
    size = p.width - p.zero - p.sign
    return {(w >> p.zero & ((1 << size) - 1)) >> p.shift for w in words}


def fit(p: Lanes, words: list[int], most: int = 8) -> Lanes:
    """Set runs and escapes: the first `most` tops have symbols of their own, in as few runs as there are."""
    found = sorted(tops(p, words))
    runs: list[int] = []
    for t in found[:most]:
        if runs and runs[-2] + runs[-1] == t:
            runs[-1] += 1
        else:
            runs += [t, 1]
    escapes: list[int] = []
    for t in found[most:]:
        if not escapes or t >= escapes[-1] + 256:
            escapes.append(t)
    if len(found) == 1 and not escapes:
        escapes = [0]
    p.runs, p.escapes = runs, escapes
    return p


@good("example", "The worked example of container.md section 19, byte for byte.")
def _() -> Archive:
    a = archive(
        tensor("a", "U8", [3], [0, 1, 2]),
        metadata={},
        provenance={"level": "default", "lossless": True, "source": "memory", "tool": "rac-codec 0.1.0"},
    )
    a.index_unit = lambda body: b"\x28\xb5\x2f\xfd\x20\x90" + (len(body) << 3 | 1).to_bytes(3, "little") + body
    return a


@good("example-lanes", "The tiles of stages/lanes.md sections 13.2 and 13.3, units byte for byte.")
def _() -> Archive:
    words = [0, 1, 6, 3, 8, 9, 6, 11, 48, 1]
    first = "00 10 03 00 20 40 04 03 80 05 00 40 60 78 08 12 03 ff"
    second = (
        "00 78 a3 f1 f8 fc 20 8f c7 e3 f1 f8 fc 7e 3f 08 21 e8 7a 1e 80 3f 30 8a 11 42 28 47"
        "08 a1 14 22 84 70 8a 11 42 28 47 04 30 43 04 30"
    )
    tail = "00" * 8 + "02" + "00" * 15 + "399103" + "00" * 13
    lead = "01000000 01000100" + "00" * 8
    records = []
    for name, per, tables, body in (
        ("single", 1, first, "000080ac 00006003"),
        ("pairs", 2, second, "00308570 00f0fb08"),
    ):
        stage = {
            "id": "lanes/1",
            "lanes": 2,
            "packed": 0,
            "per": per,
            "zero": 0,
            "sign": 0,
            "shift": 2,
            "runs": [0, 3],
            "escapes": [10],
            "tables": 2,
            "order": -2,
            "rows": 2,
            "cols": 1,
            "sizes": [len(bytes.fromhex(tables)), 2, 0],
        }
        r = tensor(name, "U8", [2, 5], words)
        r.head["stages"] = [stage]
        r.units = [bytes.fromhex(tables + "0100 0001"), bytes.fromhex(lead + body + tail)]
        r.parts = (len(r.units[0]), 8, 8, 1, 3, sum(len(up16(u)) for u in r.units) - len(r.units[0]) - 20)
        records.append(r)
    return archive(*records)


FNUZ = ("F8_E4M3FNUZ", "F8_E5M2FNUZ")
FIRST = [d for d in DTYPES.values() if d.name not in FNUZ]
"""The data types in files that were there before the others."""


@good("fnuz", "The 8-bit floats without negative zero under raw/1, zstd/1 and lanes/1: every byte, as it was.")
def _() -> Archive:
    records = []
    for i, dtype in enumerate(FNUZ):
        records.append(tensor(f"{dtype} raw", dtype, [16, 16], list(range(256)), tile=(5, 16)))
        words = weights(60 + i, dtype, 256)
        records.append(tensor(f"{dtype} zstd", dtype, [16, 16], words, "zstd/1", tile=(9, 7)))
        records.append(tensor(f"{dtype} lanes", dtype, [16, 16], words, fit(Lanes(8, 2, shift=i), words, 10)))
    return archive(*records)


@good("empty", "No records at all.")
def _() -> Archive:
    return archive()


@good(
    "raw-dtypes", "Every data type under raw/1 in several tiles, with NaN payloads, both zeros, infinities, denormals."
)
def _() -> Archive:
    records = []
    for d in FIRST:
        words = specials(d.name)
        words += weights(1, d.name, -len(words) % 2)
        shape = [2, len(words) // 2] if d.name != "F4" else [2, len(words)]
        if d.name == "C64":
            shape = [1, len(words) // 2]
        records.append(tensor(d.name, d.name, shape, words, tile=(1, 3)))
    return archive(*records)


@good("zstd-dtypes", "Every data type under zstd/1 in several tiles with smaller ones at the edges.")
def _() -> Archive:
    records = []
    for d in FIRST:
        words = specials(d.name)[:6] + weights(2, d.name, 7 * 10 - 6)
        shape = {"C64": [7, 5], "F4": [7, 20]}.get(d.name, [7, 10])
        records.append(tensor(d.name, d.name, shape, words, "zstd/1", tile=(4, 6)))
    return archive(*records)


@good(
    "zstd-frames",
    "Frames in unusual form: stored, RLE and several blocks, a window of 2^27, Dictionary_ID 0, a frame checksum.",
)
def _() -> Archive:
    data = bytes(range(200)) * 2
    words = list(data)
    t = [tensor(n, "U8", [400], words) for n in ("stored", "blocks", "window", "rle", "empty-block", "id-0")]
    frames = [
        frame(data, [(0, data)]),
        frame(data, [(0, data[:13]), (0, data[13:399]), (0, data[399:])]),
        frame(data, [(0, data)], window=17 << 3),
        frame(bytes(200), [(1, b"\xc8\x07")]),
        frame(data, [(0, data[:200]), (0, b""), (0, data[200:]), (0, b"")]),
        b"\x28\xb5\x2f\xfd\xa1\0" + frame(data, [(0, data)])[5:],
    ]
    for r, f in zip(t, frames, strict=True):
        r.head["stages"], r.units = [{"id": "zstd/1"}], [f]
    t[3].head |= {"shape": [200], "tile": [1, 200], "digest": zstd.digest(b"\x07" * 200)}
    checked = attachment("checked", b"abc" * 9, "zstd/1")
    checked.units = [CHECKED]
    return archive(*t, checked)


CHECKED = bytes.fromhex("28b52ffd241b4d0000186162630100826e08e2aa308e")
"""b"abc" * 9 in a frame with a checksum."""


@good("lanes-dtypes", "Every data type under lanes/1, one base symbol per coded symbol, words as in trained weights.")
def _() -> Archive:
    records = []
    for i, d in enumerate(FIRST):
        words = weights(3 + i, d.name, 12 * 14)
        bits = 8 * d.word
        if d.name in EXPONENT:
            p = Lanes(bits, 2, sign=1, shift=EXPONENT[d.name][0] - i % 3)
        else:
            p = Lanes(bits, 2, shift=i % 3)
        shape = {"C64": [12, 7], "F4": [12, 28]}.get(d.name, [12, 14])
        records.append(tensor(d.name, d.name, shape, words, fit(p, words, 10)))
    return archive(*records)


def special_words(dtype: str, seed: int, n: int) -> list[int]:
    """Weights with the special patterns among them."""
    out = weights(seed, dtype, n)
    for i, w in enumerate(specials(dtype)):
        out[(i * 7 + 3) % n] = w
    return out


@good("lanes-specials", "NaN payloads, both zeros, infinities and denormals through escapes, singly and in pairs.")
def _() -> Archive:
    records = []
    for dtype in ("BF16", "F16", "F32", "F64"):
        words = special_words(dtype, 30, 143)
        for per, shift in ((1, EXPONENT[dtype][0]), (2, EXPONENT[dtype][0]), (1, EXPONENT[dtype][0] - 2)):
            p = Lanes(8 * DTYPES[dtype].word, 3, per=per, sign=1, shift=shift)
            fit(p, words, 4 if per == 2 else 20)
            records.append(tensor(f"{dtype}/{per}/{shift}", dtype, [11, 13], words, p))
    return archive(*records)


@good("lanes-classes", "Row and column classes plain and as frames, several tables, tiles that lack some classes.")
def _() -> Archive:
    g = Numbers(40)
    rows, cols = 23, 37
    rc, cc = [g.below(3) for _ in range(rows)], [g.below(4) for _ in range(cols)]
    words = [weights(100 + 41 * rc[i // cols] + cc[i % cols] + 7 * i, "BF16", 1)[0] for i in range(rows * cols)]

    def make(name: str, tile: tuple[int, int], **more: Any) -> Record:
        p = fit(Lanes(16, 2, sign=1, shift=7, **more), words, 6 if more.get("per") == 2 else 12)
        return tensor(name, "BF16", [rows, cols], words, p, tile=tile)

    shared = [0, 1, 2, 1, 1, 0, 3, 2, 4, 0, 2, 2]
    return archive(
        make("rows", (23, 37), row_class=rc),
        make("cols", (8, 10), col_class=cc, per=2),
        make("both", (5, 37), row_class=rc, col_class=cc, class_map=shared),
        make("both-pairs", (6, 7), row_class=rc, col_class=cc, class_map=shared, per=2),
        make(
            "frames",
            (23, 5),
            row_class=[i // 8 for i in range(rows)],
            col_class=[i // 10 for i in range(cols)],
            class_map=shared,
            per=2,
            small_classes=True,
        ),
        make("unused", (9, 9), row_class=rc, col_class=[0] * cols, cols=2, class_map=[5, 0, 3, 1, 0, 2]),
        make("one", (1, 1), row_class=rc, per=2),
    )


@good(
    "lanes-pairs",
    "Pairs with odd segments; the filler is a plain symbol, and an escape that takes no byte.",
    "LAN-018",
    "LAN-019",
)
def _() -> Archive:
    words = weights(50, "BF16", 15 * 9)
    records = []
    for filler in (0, 3, 5):
        p = fit(Lanes(16, 4, per=2, sign=1, shift=7, filler=filler, row_class=[i % 3 for i in range(15)]), words, 5)
        records.append(tensor(f"filler-{filler}", "BF16", [15, 9], words, p, tile=(5, 9)))
    p = Lanes(8, 1, per=2, escapes=[0, 40], filler=1)
    records.append(tensor("escapes-only", "U8", [3, 5], weights(51, "U8", 15), p))
    wide = [i * 37 % 16 for i in range(301)]
    records.append(tensor("sixteen", "U8", [7, 43], wide, Lanes(8, 8, per=2, runs=[0, 16], order=-3)))
    return archive(*records)


@good("lanes-planes", "Raw values of every number of bits that matters, odd numbers of elements, packed and not.")
def _() -> Archive:
    records = []
    for dtype, width, raws in (
        ("U8", 8, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("U16", 16, (8, 9, 12, 15)),
        ("U32", 32, (16, 20, 21, 28, 31)),
        ("U64", 64, (32, 33, 48, 52, 62, 63)),
    ):
        for raw in raws:
            for packed in (0, 1):
                g = Numbers(1000 * packed + raw)
                sign = raw % 2 if raw < 63 else 1
                shift = raw - sign
                low = 0xFF00FF00FF00FF00 if packed else (1 << 64) - 1
                limit = min(1 << (width - raw), 8)
                n = 3 * 11 if not packed else 3 * 43
                words = []
                for _ in range(n):
                    w = (g.small() % limit) << shift | g.word() & low & ((1 << shift) - 1)
                    words.append(w | (g.below(2) << (width - 1) if sign else 0))
                p = Lanes(width, 2, packed, sign=sign, shift=shift, runs=[0, limit], order=-1)
                records.append(tensor(f"{raw}/{packed}", dtype, [3, n // 3], words, p, tile=(2, n // 3)))
    return archive(*records)


@good("lanes-zero", "Words whose low bits are all zero: F32 that holds BF16, F64 that holds F32, U16 multiples of 256.")
def _() -> Archive:
    records = []
    for dtype, width, zero, sign, shift in (
        ("F32", 32, 16, 1, 7),
        ("F32", 32, 16, 1, 5),
        ("F64", 64, 29, 1, 23),
        ("U16", 16, 8, 0, 0),
        ("U16", 16, 15, 0, 0),
    ):
        words = [w >> zero << zero for w in weights(60 + zero, dtype, 90)]
        if dtype == "U16":
            words = [Numbers(i).small() % (8 if zero == 8 else 2) << zero for i in range(90)]
        for per in (1, 2):
            p = fit(Lanes(width, 2, 1, per, zero, sign, shift), words, 7)
            if zero == 15:
                p.runs, p.escapes = [0, 2], []
            records.append(tensor(f"{dtype}/{zero}/{shift}/{per}", dtype, [9, 10], words, p))
    return archive(*records)


@good("lanes-many", "1, 3, 64, 100 and 1024 lanes, some of which have no symbols or no words.", "LAN-025")
def _() -> Archive:
    words = weights(70, "BF16", 40 * 30)
    records = []
    for lanes in (1, 3, 64, 100, 1024):
        for per in (1, 2):
            p = fit(Lanes(16, lanes, per=per, sign=1, shift=7), words, 9)
            records.append(tensor(f"{lanes}/{per}", "BF16", [40, 30], words, p, tile=(37, 30)))
    return archive(*records)


@good("lanes-one", "Data of one symbol, so that no lane has a word; tensors of one element and of one row or column.")
def _() -> Archive:
    same = [0x3F80] * 60
    one = [0xC0FE]
    wide = weights(80, "BF16", 17)
    records = []
    for per in (1, 2):
        p = fit(Lanes(16, 2, per=per, sign=1, shift=7), same)
        records.append(tensor(f"same/{per}", "BF16", [6, 10], same, p))
        records.append(tensor(f"element/{per}", "BF16", [1], one, fit(Lanes(16, 1, per=per, sign=1, shift=7), one)))
        records.append(tensor(f"scalar/{per}", "BF16", [], one, fit(Lanes(16, 4, 1, per, 1, 1, 6), one)))
        records.append(
            tensor(
                f"row/{per}", "BF16", [1, 17], wide, fit(Lanes(16, 2, per=per, sign=1, shift=7), wide, 4), tile=(1, 5)
            )
        )
        records.append(
            tensor(
                f"column/{per}",
                "BF16",
                [17, 1],
                wide,
                fit(Lanes(16, 2, per=per, sign=1, shift=7), wide, 4),
                tile=(3, 1),
            )
        )
    return archive(*records)


@good(
    "lanes-alphabets",
    "Smallest and largest alphabets, many runs, escapes unsorted, equal and overlapping, tops of more than 16 bits.",
)
def _() -> Archive:
    g = Numbers(90)
    byte = [g.below(256) for _ in range(4000)]
    small = [g.below(3) * g.below(2) for _ in range(99)]
    wide = [g.below(65536) if g.below(3) else g.below(4) for _ in range(200)]
    steps = [g.below(20) * 5 for _ in range(200)]
    return archive(
        tensor("256", "U8", [40, 100], byte, Lanes(8, 2, runs=[0, 256])),
        tensor("128-and-escape", "U8", [40, 100], byte, Lanes(8, 2, runs=[0, 128], escapes=[128])),
        tensor("escape-only", "U8", [40, 100], byte, Lanes(8, 1, escapes=[0, 255])),
        tensor("two", "U8", [9, 11], [v & 1 for v in small], Lanes(8, 1, runs=[0, 2])),
        tensor("run-and-escape", "U8", [9, 11], small, Lanes(8, 3, runs=[0, 1], escapes=[1])),
        tensor("top-32", "U32", [10, 20], wide, Lanes(32, 2, escapes=[*range(0, 65536, 256)])),
        tensor("top-64", "U64", [10, 20], wide, Lanes(64, 2, escapes=[65280, 65024, *range(0, 65024, 256)])),
        tensor("runs", "U8", [10, 20], steps, Lanes(8, 2, runs=[v for i in range(20) for v in (i * 5, 1)])),
        tensor("equal-escapes", "U8", [10, 20], steps, Lanes(8, 2, runs=[10, 3], escapes=[60, 3, 3, 0])),
    )


@good("lanes-tables", "256 tables, 4096 class pairs, every order of the table code, tables without elements.")
def _() -> Archive:
    g = Numbers(95)
    bits = [g.below(2) for _ in range(64 * 64)]
    many = Lanes(
        8,
        2,
        runs=[0, 2],
        row_class=[i * 7 % 64 for i in range(64)],
        col_class=[i * 5 % 64 for i in range(64)],
        class_map=[(i * 31 + i // 64) % 256 for i in range(4096)],
    )
    records = [tensor("4096", "U8", [64, 64], bits, many)]
    words = [min(15, g.small()) for _ in range(600)]
    for order in range(-8, 9):
        for per in (1, 2) if order in (-8, 8) else (1,):
            p = Lanes(8, 2, per=per, runs=[0, 16], order=order)
            records.append(tensor(f"order{order:+d}/{per}", "U8", [20, 30], words, p))
    p = Lanes(8, 1, runs=[0, 16], row_class=[0] * 20, rows=3, class_map=[2, 0, 1])
    records.append(tensor("two-unused", "U8", [20, 30], words, p))
    return archive(*records)


@good("lanes-limit", "Tops of more than 16 bits: a run and an escape that end at 65535, the largest top.")
def _() -> Archive:
    run = [v for i in range(45) for v in ((0, 65535, i % 5)[i % 3],)]
    escaped = [65535 - i * 7 % 256 if i % 2 else i % 4 for i in range(45)]
    return archive(
        tensor("run", "U32", [9, 5], run, Lanes(32, 2, runs=[0, 5, 65535, 1])),
        tensor("escape", "U32", [9, 5], escaped, Lanes(32, 2, runs=[0, 4], escapes=[65280])),
        tensor("top-17", "U32", [9, 5], [v << 15 for v in run], Lanes(32, 1, shift=15, runs=[0, 5], escapes=[65535])),
    )


@good(
    "lanes-sparse",
    "1000 tiles of one word and 4096 class pairs: a reader that visits all pairs for each is slow.",
    "SEC-010",
)
def _() -> Archive:
    n = 1000
    p = Lanes(8, 1, runs=[0, 2], row_class=[i * 37 % 64 for i in range(n)], col_class=[63], cols=64)
    p.rows, p.class_map, p.small_classes = 64, [(i * 31 + i // 64) % 256 for i in range(4096)], False
    return archive(tensor("t", "U8", [n, 1], [i % 2 for i in range(n)], p, axis=1, tile=(1, 1)))


@good("lanes-large", "Some 100 KB in tiles of several segments each.")
def _() -> Archive:
    g = Numbers(99)
    rows, cols = 96, 200
    rc = [g.below(2) for _ in range(rows)]
    words = weights(98, "BF16", rows * cols)
    p = fit(Lanes(16, 8, per=2, sign=1, shift=7, row_class=rc, class_map=[1, 0]), words, 7)
    f32 = weights(97, "F32", 60 * 100)
    q = fit(Lanes(32, 8, 1, sign=1, shift=21), f32, 30)
    return archive(
        tensor("bf16", "BF16", [4, 24, 200], words, p, axis=2, tile=(50, 130)),
        tensor("f32", "F32", [60, 4, 25], f32, q, axis=1, tile=(25, 64)),
    )


@good("shapes", "0 dimensions, 64 dimensions, dimensions of 0, F4, every axis, the largest empty shape.")
def _() -> Archive:
    w = weights(110, "I16", 60)
    records = [
        tensor("scalar", "I16", [], w[:1]),
        tensor("rank-64", "I16", [1] * 32 + [5] + [1] * 31, w[:5], "zstd/1", axis=33),
        tensor("zero", "I16", [0], []),
        tensor("zero-rows", "F32", [0, 7], [], "zstd/1"),
        tensor("zero-cols", "F32", [7, 0], [], axis=1),
        tensor("zero-mid", "C64", [3, 0, 2], [], axis=0),
        tensor("zero-f4", "F4", [3, 0], [], axis=1),
        tensor("zero-rows-f4", "F4", [0, 6], [], axis=0),
        tensor("zero-large", "U8", [1 << 59, 0], [], axis=1, tile=(1, 1)),
        tensor("scalar-axis", "U64", [], [(1 << 64) - 1], "zstd/1"),
        tensor("f4", "F4", [3, 5, 4], [v & 255 for v in w[:30]], axis=1, tile=(2, 7)),
    ]
    for axis in range(4):
        records.append(tensor(f"axis-{axis}", "I16", [3, 4, 5], w, "zstd/1", axis=axis))
    return archive(*records)


@good(
    "names",
    "Unicode, empty, long and path-like names; aliases tied and equal; the content digest sorts by UTF-8 bytes.",
)
def _() -> Archive:
    return archive(
        tensor("\U00010000", "U8", [2], [1, 2]),
        tensor("\uffff", "U8", [2], [2, 2]),
        tensor("", "U8", [2], [3, 2]),
        tensor("a" * 300, "U8", [2], [4, 2], more={"aliases": [["b" * 70000, True]]}),
        tensor("../../etc/passwd", "U8", [2], [5, 2]),
        tensor("nul\0 and\nline", "U8", [2], [6, 2]),
        tensor(
            "e\u0301",
            "U8",
            [2],
            [7, 2],
            more={"aliases": [["\u00e9", False], ["\u4e2d\u6587", True], ["\U0001f980", False]]},
        ),
        attachment("\uffff", b"same name as a tensor"),
        tensor(
            "tied", "BF16", [4], [1, 2, 3, 4], more={"aliases": [["tied.1", True], ["tied.2", True], ["equal", False]]}
        ),
    )


@good("names-bom", "Names that begin with U+FEFF, which is a character like any other, beside the same without it.")
def _() -> Archive:
    more = {"aliases": [["\ufeff\ufeff", True], ["alias", False]], "x-\ufeff": "\ufeff"}
    return archive(
        tensor("t", "U8", [2], [1, 2]),
        tensor("\ufefft", "U8", [2], [2, 2], more=more),
        tensor("\ufeff", "U8", [2], [3, 2]),
        attachment("\ufeffconfig.json", b"\xef\xbb\xbf{}"),
        attachment("config.json", b"{}"),
        metadata={"\ufeffformat": "\ufeffpt", "format": "pt"},
    )


@good("attachments", "Attachments raw, compressed and empty, and no tensor.")
def _() -> Archive:
    text = ("{" + ", ".join(f'"key{i}": {i * i}' for i in range(80)) + "}").encode()
    return archive(
        attachment("config.json", text, "zstd/1"),
        attachment("config.raw", text),
        attachment("empty", b""),
        attachment("empty.zst", b"", "zstd/1"),
        attachment("sub/\u00e4.bin", bytes(range(256))),
        attachment("x", b"x", more={"x-note": [1, {"deep": None}]}),
    )


VALUES: dict[str, Any] = {
    "array16": list(range(16)),
    "bin": bytes(300),
    "deep": [[[[[[]]]]]],
    "false": False,
    "map": {str(i): i for i in range(20)},
    "n1": -1,
    "n32": -32,
    "n33": -33,
    "n128": -128,
    "n129": -129,
    "n32769": -32769,
    "n2147483649": -2147483649,
    "nmin": -(1 << 63),
    "null": None,
    "p127": 127,
    "p128": 128,
    "p256": 256,
    "p65536": 65536,
    "p2^32": 1 << 32,
    "pmax": (1 << 64) - 1,
    "s31": "s" * 31,
    "s32": "s" * 32,
    "s256": "\u00e9" * 128,
    "true": True,
}


@good("metadata", "Metadata, provenance of any content, x- keys wherever they may be, `extra`, values of every form.")
def _() -> Archive:
    t = tensor("t", "U8", [3], [9, 8, 7], more={"extra": VALUES, "x-": 1, "x-private": VALUES})
    return archive(
        t,
        attachment("a", b"abc", more={"x-size": "3"}),
        metadata={"": "", "format": "pt", "\u00fc": "line\nline"},
        provenance=VALUES,
        **{"x-header": VALUES, "shard": [1, 1]},
    )


@good("defaults", "Optional keys present with their default values.")
def _() -> Archive:
    t = tensor("t", "U8", [3], [9, 8, 7], more={"aliases": [], "extra": {}, "needs": [], "uses": []})
    return archive(t, metadata={}, provenance={}, shard=[1, 1])


@good(
    "ancillary",
    "Records of unknown types that may be skipped, with heads and payloads that mean nothing here.",
    "REC-010",
)
def _() -> Archive:
    return archive(
        Record(40000, {}, payload=b"", flags=1),
        tensor("t", "U8", [3], [9, 8, 7]),
        Record(5, {"name": 5, "units": b"odd"}, payload=b"\xff" * 100, flags=1),
        Record(0, {"name": "t", "stages": [1]}, payload=b"\xff" * 64, flags=1),
        attachment("a", b"abc"),
        Record(65535, {"aliases": None, "shape": "no"}, payload=b"z", flags=1),
    )


@good("minor", "A later minor version is read.", "PRE-009")
def _() -> Archive:
    a = archive(tensor("t", "U8", [3], [9, 8, 7]))
    a.minor = 65535
    return a


@good("order", "Tensors and attachments in any order.")
def _() -> Archive:
    return archive(
        attachment("z", b"1"),
        tensor("b", "U8", [1], [1]),
        attachment("a", b"2"),
        tensor("a", "U8", [1], [2]),
        tensor("B", "U8", [0], []),
        attachment("b", b"3"),
    )


def _shard(k: int) -> Make:
    def make() -> Archive:
        t = [
            tensor("first", "BF16", [4], [1, 2, 3, 4]),
            tensor("second", "BF16", [4], [5, 2, 3, 4], more={"aliases": [["third", True]]}),
        ]
        a = [attachment("config.json", b"{}")] if k == 1 else []
        return archive(*a, t[k - 1], metadata={"shard": str(k)} if k == 1 else {}, shard=[k, 2])

    return make


for _k in (1, 2):
    good(f"set-{_k:05d}-of-00002", f"Shard {_k} of a set of two.")(_shard(_k))


def base() -> Archive:
    """A small archive with one of everything, which the bad ones are made of."""
    g = Numbers(120)
    words = special_words("BF16", 123, 9 * 14)
    p = fit(Lanes(16, 2, per=1, sign=1, shift=7, row_class=[i % 2 for i in range(9)], class_map=[1, 0]), words, 6)
    q = fit(Lanes(32, 3, 1, 2, 0, 1, 20, col_class=[i // 5 for i in range(11)]), weights(122, "F32", 33), 4)
    low = [w & 0xFFF00000 | 0x000F0000 for w in weights(122, "F32", 33)]
    return archive(
        attachment("config.json", b'{"layers": 1}'),
        tensor("raw", "I32", [2, 3], [g.below(1 << 32) for _ in range(6)], tile=(2, 2)),
        tensor("zstd", "I16", [5, 8], [i // 3 for i in range(40)], "zstd/1", tile=(3, 8)),
        attachment("tokens.txt", b"the quick brown fox " * 20, "zstd/1"),
        tensor("lanes", "BF16", [9, 14], words, p, tile=(5, 14), more={"aliases": [["tied", True], ["equal", False]]}),
        tensor("pairs", "F32", [3, 11], low, fit(q, low, 4)),
        metadata={"format": "pt"},
        provenance={"tool": "make_golden"},
    )


good("base", "One of everything; the bad archives are this one with one thing changed.")(base)
