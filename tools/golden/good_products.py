"""The good archives of objects, lowrank/1 and basis/1."""

from typing import Any

from golden.good import archive, attachment, fit, frame, good, tensor
from golden.good_trellis import DTYPES, exponents, fronts
from golden.lanes import Lanes
from golden.model import Archive
from golden.numbers import Numbers, specials, weights
from golden.products import Matrix, plain, product, quantised
from golden.trellis import DEAD, Trellis, integers
from rac.container import zstd


def bits(*values: str) -> list[int]:
    """F32 words."""
    return [int(v, 16) for v in values]


def small(seed: int, n: int) -> list[int]:
    """F32 words of about 1 / 8."""
    return weights(seed, "F32", n)


def trellis(seed: int, height: int, width: int, states: int = 16, **more: Any) -> Trellis:
    """F32, scales of rows and columns."""
    lists = {"rows": exponents(seed, height), "cols": exponents(seed + 1, width)}
    return Trellis("F32", states, low=126, scale=0x3C800000, corrections=[3, -2, 5], **(lists | more))


INTEGERS = Trellis("F32", 1, 10)
"""V is the words less 10."""


@good("example-lowrank", "The tensor of stages/lowrank.md section 6, units and elements byte for byte.")
def _() -> Archive:
    a = plain("a", 2, 2, bits("33800000", "33800000", "3f000000", "c0400000"))
    b = plain("b", 2, 2, bits("3f800000", "3e800000", "3f800000", "3fc00000"))
    r = product("t", [2, 2], "F32", [11, 10, 9, 12], INTEGERS, [a, b])
    r.units = [b"", bytes.fromhex("0b0a090c")]
    r.head["digest"] = zstd.digest(bytes.fromhex("0000803f 0000e033 000060c0 000018c0"))
    return archive(a.record, b.record, r)


@good("example-walk", "The archive of walkthrough.md: lanes/1 in two tiles, an alias, an object and its user.")
def _() -> Archive:
    p = Lanes(8, 2, shift=2, runs=[0, 3], escapes=[10], row_class=[1, 0], class_map=[0, 1])
    coded = tensor("l", "U8", [2, 5], [0, 1, 6, 3, 8, 9, 6, 11, 48, 1], p, tile=(1, 5), more={"aliases": [["k", True]]})
    u = plain("u", 2, 2, bits("3f400000", "3f000000", "3f000000", "3a000000"))
    out = archive(coded, u.record, product("t", [2, 2], "BF16", [11, 8, 13, 10], INTEGERS, [u]))
    out.index_unit = lambda body: frame(body, [(0, body)])
    return out


@good("example-basis", "The tensor of stages/basis.md section 6, units and elements byte for byte.")
def _() -> Archive:
    u = plain("u", 2, 2, bits("3f400000", "3f000000", "3f000000", "3a000000"))
    r = product("t", [2, 2], "BF16", [11, 8, 13, 10], INTEGERS, [u])
    r.units = [b"", bytes.fromhex("0b080d0a")]
    r.head["digest"] = zstd.digest(bytes.fromhex("80be 003f 1040 c03f"))
    return archive(u.record, r)


def coder(seed: int, rows: int, cols: int, i: int) -> str | Lanes:
    """One of the stages that may stand in front; without classes where there are few rows or columns."""
    if min(rows, cols) < 9:
        return ("raw/1", "zstd/1", Lanes(8, 2, runs=[125, 7], escapes=[0]))[i % 3]
    return fronts(seed, rows, cols)[i % 5]


def thin(seed: int, name: str, rows: int, cols: int, kind: int) -> Matrix:
    """An object, coded in one of five ways."""
    tile = (max(1, rows // 2), max(1, cols - 1))
    if kind < 3:
        words = small(seed, rows * cols)
        stage: str | Lanes = ("raw/1", "zstd/1", fit(Lanes(32, 3, 1, sign=1, shift=21), words, 30))[kind]
        return plain(name, rows, cols, words, stage, tile=tile)
    front = coder(seed, rows, cols, 2 if kind == 3 else 0)
    t = trellis(seed, rows, cols, 64, outliers={(0, 0): 0x3E000001})
    return quantised(name, rows, cols, integers(seed, rows * cols), t, front, tile=tile)


@good("lowrank", "F32, F16, BF16; ranks 1 to the most; tiles of several rows and columns; objects under every coder.")
def _() -> Archive:
    records = []
    for i, (rows, cols, r) in enumerate(((23, 37, 1), (20, 13, 13), (9, 14, 9), (31, 70, 5), (1, 40, 1), (40, 1, 1))):
        a = thin(10 * i + 300, f"{i}/a", rows, r, i % 5)
        b = thin(10 * i + 301, f"{i}/b", r, cols, (i + 3) % 5)
        records += [a.record, b.record]
        for j, dtype in enumerate(DTYPES):
            seed = 310 + 10 * i + j
            t = trellis(seed, rows, cols, outliers={(0, 0): 0x40490FDB, (rows - 1, cols - 1): 0x80000000})
            front = coder(seed, rows, cols, i + 2 * j)
            tile = ((rows + 1) // 2, (cols + 2) // 3)
            words = integers(seed, rows * cols)
            records.append(product(f"{i}/{dtype}", [rows, cols], dtype, words, t, [a, b], front, tile=tile))
    return archive(*records)


@good("basis", "F32, F16, BF16; several tensors share a basis; tiles of several rows and columns; bases coded and raw.")
def _() -> Archive:
    records = []
    for i, cols in enumerate((1, 5, 17, 38, 70)):
        u = thin(400 + i, f"u{cols}", cols, cols, (i + 2) % 5)
        records.append(u.record)
        for j, dtype in enumerate(DTYPES):
            rows, seed = 11 - i - j, 410 + 10 * i + j
            columns = [DEAD if x % 5 == 3 else x % 7 for x in range(cols)]
            t = trellis(seed, rows, cols, cols=columns, outliers={(rows - 1, cols // 2): 0xBF000001})
            front = coder(seed, rows, cols, i + 2 * j)
            tile = ((rows + 1) // 2, (cols + 2) // 3)
            words = integers(seed, rows * cols)
            records.append(product(f"{cols}/{dtype}", [rows, cols], dtype, words, t, [u], front, tile=tile))
    return archive(*records)


@good("products-special", "Infinities, NaNs of any payload, zeros, subnormals and overflow in V and in objects.")
def _() -> Archive:
    special = specials("F32")  # 18: zeros, infinities, NaNs, subnormals, the largest and the smallest
    n = len(special)
    g = Numbers(440)
    mixed = [special[g.below(n)] if g.below(3) else small(441 + i, 1)[0] for i in range(n * n)]
    large = [0x7F7FFFFF, 0xFF7FFFFF, 0x7F000000, 0x5F800000, 0xDF800000, 0x00000001, 0x80000001, 0x00800000, 0x3F800000]
    a, b = plain("a", n, 4, mixed[: 4 * n]), plain("b", 4, n, mixed[4 * n : 8 * n], "zstd/1")
    c, d = plain("c", n, 1, special), plain("d", 1, 9, large)
    u, w = plain("u", n, n, mixed), plain("w", 9, 9, [large[(i + i // 9) % 9] for i in range(81)])
    records = [m.record for m in (a, b, c, d, u, w)]
    for dtype in DTYPES:
        places = [(p // n, p % n) for p in range(0, n * n, 7)]
        some = {p: special[i % n] for i, p in enumerate(places)}
        t = trellis(442, n, n, outliers=some)
        words = integers(443, n * n)
        records.append(product(f"{dtype}/lowrank", [n, n], dtype, words, t, [a, b], tile=(7, 11)))
        records.append(product(f"{dtype}/basis", [n, n], dtype, words, t, [u], tile=(7, 11)))
        plain_t = trellis(444, n, 9)
        records.append(product(f"{dtype}/rank-1", [n, 9], dtype, words[: 9 * n], plain_t, [c, d]))
        records.append(product(f"{dtype}/large", [n, 9], dtype, words[: 9 * n], plain_t, [w]))
        whole = {(y, x): special[(y * 9 + x) % n] for y in range(4) for x in range(9)}
        all_out = Trellis("F32", 4, cols=[DEAD] * 9, outliers=whole)
        records.append(product(f"{dtype}/outliers", [4, 9], dtype, words[:36], all_out, [w]))
    return archive(*records)


@good(
    "basis-zeros", "V of zeros and a basis of infinities and NaNs: 0 times infinity is a NaN that no reader may skip."
)
def _() -> Archive:
    inf, ninf, nan, one = 0x7F800000, 0xFF800000, 0x7FC00001, 0x3F800000
    u = plain("u", 4, 4, [inf, one, one, 0, one, one, one, 0, one, ninf, one, 0, one, one, nan, 0])
    zeros = Trellis("F32", 1, 10, cols=[DEAD, 0, DEAD, 0])
    records = [product(d, [3, 4], d, [10, 10, 11, 10, 10, 11, 10, 9, 12, 10, 10, 10], zeros, [u]) for d in DTYPES]
    return archive(u.record, *records)


@good(
    "products-rounding",
    "Terms that are lost one by one, ties, numbers that become subnormal, 0 or infinite; the order.",
)
def _() -> Archive:
    records = []
    one = plain("one", 1, 1, bits("3f800000"))
    records.append(one.record)
    steps = [0x33800000, 0x34000000, 0x33800001, 0x337FFFFF, 0xB3800000, 0xB3000000, 0xB3000001, 0x33800000]
    rows = plain("rows", 9, 8, [steps[(i * 3 + i // 8) % 8] for i in range(72)])
    cols = plain("cols", 8, 9, [0x3F800000 + (i * 0x123457 & 0x7FFFFF) for i in range(72)])
    records += [rows.record, cols.record]
    for dtype in DTYPES:
        words = [9 + i % 4 for i in range(81)]
        records.append(product(f"{dtype}/lost", [9, 9], dtype, words, INTEGERS, [rows, cols], tile=(4, 9)))
    # V alone decides: one term that is V x 1. Mantissas around ties of BF16 (16 bits are cut) and F16 (13 bits).
    tails = [0x8000, 0x7FFF, 0x8001, 0x18000, 0x17FFF, 0x1000, 0x0FFF, 0x1001, 0x3000, 0x2FFF, 0x3001, 0]
    tops = [0x3F80, 0x7F7F, 0x7F7E, 0x0000, 0x0001, 0x007F, 0x0080, 0x477F, 0x3880, 0x3300, 0x3380, 0x3280, 0x387F]
    values = [(top << 16) + tail | sign << 31 for top in tops for tail in tails for sign in (0, 1)]
    values = [v for v in values if v & 0x7FFFFFFF < 0x7F800000]
    outliers = {(i, 0): v for i, v in enumerate(values)}
    for dtype in DTYPES:
        t = Trellis("F32", 4, outliers=outliers)
        records.append(product(f"{dtype}/ties", [len(values), 1], dtype, [128] * len(values), t, [one]))
    return archive(*records)


@good("objects", "Unused objects, names that others have too, x- keys, any order, axes, aliases; one object for all.")
def _() -> Archive:
    s = plain("s", 6, 6, small(450, 36), more={"x-note": {"from": ["here"]}})
    row, column = plain("", 1, 12, small(451, 12)), plain("1", 1, 1, small(452, 1), "zstd/1")
    tall = plain("tall", 12, 1, small(453, 12))
    words, t = integers(454, 36), trellis(455, 6, 6)
    twelve = integers(456, 12)
    return archive(
        plain("unused", 2, 3, [0x7F800001] * 6).record,
        s.record,
        product("s", [6, 6], "BF16", words, t, [s], coder(457, 6, 6, 2)),
        attachment("s", b"abc"),
        row.record,
        product(
            "both", [6, 6], "F16", words, t, [s, s], "zstd/1", more={"aliases": [["tied", True], ["equal", False]]}
        ),
        tensor("lossless", "BF16", [2, 2], [1, 2, 3, 4]),
        column.record,
        tall.record,
        product("axis-0", [3, 4], "F32", twelve, trellis(458, 1, 12), [column, row], axis=0, tile=(1, 5)),
        product("axis-1", [2, 3, 2], "F32", twelve, trellis(459, 2, 6), [s], axis=1, more={"extra": {"shard": "m"}}),
        product("axis-2", [3, 4], "BF16", twelve, trellis(460, 12, 1), [tall, column], axis=2, tile=(5, 1)),
        quantised("last", 5, 7, integers(461, 35), trellis(462, 5, 7), "zstd/1").record,
    )


def products_base() -> Archive:
    """A small archive, which the bad ones are made of."""
    a = plain("a", 9, 2, small(470, 18), "zstd/1", tile=(5, 2))
    coded = Lanes(8, 2, runs=[125, 7], escapes=[0])
    b = quantised("b", 2, 14, integers(471, 28), trellis(472, 2, 14), coded, tile=(2, 9))
    u = plain("u", 14, 14, small(473, 196), tile=(9, 14))
    front = Lanes(8, 2, runs=[125, 7], escapes=[0], row_class=[i % 2 for i in range(9)], class_map=[1, 0])
    words = integers(474, 126)
    low = trellis(475, 9, 14, outliers={(1, 2): 0x7FC12345, (4, 0): 0x3F800001, (8, 13): 0x80000000})
    return archive(
        a.record,
        b.record,
        product("low", [9, 14], "BF16", words, low, [a, b], front, tile=(5, 14)),
        u.record,
        product("turned", [9, 14], "F16", words, trellis(476, 9, 14, outliers={(3, 3): 0xC2280000}), [u], tile=(4, 9)),
    )


good(
    "products-base", "Three objects, and two tensors that use them; the bad archives are these with one thing changed."
)(products_base)
