"""The good archives of trellis/1."""

from golden.good import archive, good, tensor
from golden.lanes import Lanes
from golden.model import Archive
from golden.numbers import Numbers, specials
from golden.trellis import DEAD, WALKS, Trellis, integers, lossy
from rac.container import zstd

DTYPES = ("F32", "F16", "BF16")


def exponents(seed: int, n: int, spread: int = 7) -> list[int]:
    """Entries of a list, of both signs."""
    g = Numbers(seed)
    return [g.below(2 * spread + 1) - spread for _ in range(n)]


def fronts(seed: int, rows: int, cols: int, zero: int = 128) -> list[str | Lanes]:
    """Every stage that may stand in front, lanes/1 with classes and escapes."""
    g = Numbers(seed)
    rc, cc = [g.below(2) for _ in range(rows)], [g.below(3) for _ in range(cols)]
    single = Lanes(8, 3, runs=[zero - 3, 7], escapes=[0], row_class=rc, col_class=cc, class_map=[0, 1, 2, 2, 0, 3])
    pairs = Lanes(8, 2, 1, per=2, shift=2, runs=[zero // 4 - 2, 5], escapes=[0], row_class=rc, class_map=[1, 0])
    signed = Lanes(8, 4, per=1, sign=1, shift=1, runs=[0, 2, 61, 3], escapes=[0], col_class=cc)
    return ["raw/1", "zstd/1", single, pairs, signed]


@good("example-trellis", "The tensor of stages/trellis.md section 8, trellis unit and elements byte for byte.")
def _() -> Archive:
    words = [10, 10, 11, 10, 9, 10, 10, 10]
    elements = bytes.fromhex("a03e0000983f0000c03f0000803f0000")
    t = Trellis("BF16", 4, 10, 9, 0x3F000000, [0, 8, -8], [0, 0, 4, 0], [0, DEAD], outliers={(3, 0): 0x3F80})
    r = lossy("t", [4, 2], words, t)
    r.units = [bytes.fromhex("0008f8 00000400 0080 03000000 00000000 803f"), bytes(words)]
    r.head["digest"] = zstd.digest(elements)
    return archive(r)


@good("trellis-states", "Every number of states and every data type; each tile of a column starts in state 0.")
def _() -> Archive:
    records = []
    for i, states in enumerate(WALKS):
        for j, dtype in enumerate(DTYPES):
            rows, cols, zero = 70 + i, 5, 128 - i * 5 - j
            front = fronts(i, rows, cols, zero)[(i + j) % 5]
            t = Trellis(
                dtype,
                states,
                zero,
                zero - 2,
                0x3C23D70A + i * 0x123456,
                [3, -9, 7 * j, 25, -31],
                exponents(i, rows),
                exponents(100 + i, cols),
            )
            words = integers(10 * i + j, rows * cols, zero)
            records.append(lossy(f"{states}/{dtype}", [rows, cols], words, t, front, tile=(33, 3)))
    return archive(*records)


@good("trellis-fronts", "Behind raw/1, zstd/1 and lanes/1, with classes, escapes, pairs, raw bits and packed planes.")
def _() -> Archive:
    records = []
    for dtype in DTYPES:
        words = integers(200, 23 * 20)
        for i, front in enumerate(fronts(201, 23, 20)):
            for tile in ((23, 20), (7, 20), (9, 6)) if dtype == "F16" else ((10, 11),):
                t = Trellis(
                    dtype, 64, low=126, scale=0x3E4CCCCD, corrections=[5, -5, 9, 1, -1], cols=exponents(203, 20)
                )
                records.append(lossy(f"{dtype}/{i}/{tile[0]}", [23, 20], words, t, front, tile=tile))
    words = [i * 37 % 256 for i in range(256)]
    everything = Trellis("F32", 8, 77, corrections=[i * 91 % 256 - 128 for i in range(256)])
    records.append(lossy("every-word", [16, 16], words, everything, Lanes(8, 2, runs=[0, 256])))
    records.append(tensor("lossless", "BF16", [2, 2], [1, 2, 3, 4]))
    return archive(*records)


@good("trellis-lists", "Lists of rows and columns empty, plain and framed; every entry that is allowed; dead columns.")
def _() -> Archive:
    words = [128 + i // 3 % 5 - i // 40 % 3 for i in range(121 * 122)]
    every = [*range(-60, 61)]
    records = []
    for i, rows in enumerate(("", "plain", "rows")):
        for j, cols in enumerate(("", "plain", "cols")):
            t = Trellis(
                DTYPES[(i + j) % 3],
                16,
                corrections=[1],
                low=255,
                rows=[-5, 7, 1, -1, -60] * 24 + [60] if rows else None,
                cols=[4, 3, -3, -4, DEAD, -2] * 20 + [0, DEAD] if cols else None,
                framed=f"{rows} {cols}",
            )
            records.append(lossy(f"{rows or 'none'}/{cols or 'none'}", [121, 122], words, t, "zstd/1", tile=(50, 122)))
    for dtype in ("F32", "BF16"):
        t = Trellis(dtype, 4, rows=every, cols=[*every, DEAD])
        records.append(lossy(f"every/{dtype}", [121, 122], words, t, "zstd/1", tile=(121, 40)))
    t = Trellis("F16", 32, rows=exponents(211, 7), cols=[DEAD] * 5, outliers={(3, 2): 0x4200})
    records.append(lossy("all-dead", [7, 5], integers(212, 35), t))
    t = Trellis("F16", 1, rows=[3], cols=[-7])
    records.append(lossy("one", [1, 1], [130], t))
    return archive(*records)


@good("trellis-sizes", "Units of no bytes, 256 corrections, corrections of the first and of the last word alone.")
def _() -> Archive:
    words = [i * 7 % 256 for i in range(18 * 17)]
    records = []
    for i, dtype in enumerate(DTYPES):
        for states in (1, 128):
            all_256 = [(i + 3) * k % 256 - 128 for k in range(256)]
            for name, low, corrections, zero in (
                ("none", 0, [], 0),
                ("none-255", 255, [], 255),
                ("all", 0, all_256, 100),
                ("first", 0, [-128], 1),
                ("last", 255, [127], 254),
            ):
                t = Trellis(dtype, states, zero, low, 0x3F99999A, corrections)
                records.append(lossy(f"{dtype}/{states}/{name}", [18, 17], words, t))
    return archive(*records)


@good("trellis-rounding", "Ties, zeros of both signs, subnormal and infinite F16, the smallest and the largest scales.")
def _() -> Archive:
    records = []
    for dtype in DTYPES:
        for step in (37, 91, 151):  # 1/64 times integers of up to 16 bits, ties of BF16 and F16 among them
            t = Trellis(dtype, 4, 100, corrections=[i * step % 256 - 128 for i in range(256)])
            records.append(lossy(f"ties/{dtype}/{step}", [16, 16], [*range(256)], t))
        # 1.5 times an odd mantissa lies between two binary32 numbers.
        for scale in (0x3F800001, 0x3F800003, 0x3FAAAAAB, 0x3FFFFFFF):
            t = Trellis(dtype, 4, 10, 10, scale, [64], rows=exponents(220, 9), cols=[0, 1, -1, 2])
            records.append(lossy(f"halves/{dtype}/{scale:x}", [9, 4], [10, 11, 12, 13] * 9, t))
        # rec(10) = 0 in every state, in live and dead columns.
        for low, corrections in ((10, [-32]), (9, [96, -32])):
            t = Trellis(dtype, 8, 10, low, 0x3E000000, corrections, cols=[0, DEAD, 1, DEAD, -60])
            words = [Numbers(i).below(3) + 9 for i in range(20 * 5)]
            records.append(lossy(f"zeros/{dtype}/{low}", [20, 5], words, t, tile=(7, 5)))
        for scale in (0x21800000, 0x21800001, 0x5D7FFFFF, 0x5D800000):
            t = Trellis(dtype, 256, rows=[60, -60, 0, 7] * 5, cols=[60, -60, 0], scale=scale)
            records.append(lossy(f"scale/{dtype}/{scale:x}", [20, 3], integers(221, 60, spread=40), t))
    # F16 by its exponents: k + correction / 64 in units of 2^e, at both ends.
    for e in (-28, -26, -25, -24, -23, -20, -16, -14, 8, 9, 10, 11):
        t = Trellis("F16", 1, 128, 192, (127 + e) << 23, [i * 5 % 256 - 128 for i in range(64)])
        records.append(lossy(f"F16/{e}", [16, 16], [*range(256)], t))
    for c in (60, 61, 62, 63):  # 512 (127 + c / 64): 65520, for c = 62, is the first that becomes infinite
        t = Trellis("F16", 1, 128, 0, (127 + 9) << 23, [64 - c, *[0] * 254, c])
        records.append(lossy(f"F16/overflow/{c}", [1, 3], [0, 255, 128], t))
    return archive(*records)


@good(
    "trellis-outliers",
    "Outliers of any bits in every data type, also in dead columns, at the edges of tiles, all over.",
)
def _() -> Archive:
    records = []
    for dtype in DTYPES:
        special = specials(dtype)
        rows, cols = 13, 11
        cols_list = [DEAD if x % 4 == 2 else x - 5 for x in range(cols)]
        places = [(i * 31 % (rows * cols)) for i in range(len(special))]
        some = {(p // cols, p % cols): w for p, w in zip(places, special, strict=True)}
        corners = {(0, 0): special[1], (0, 10): special[2], (12, 0): special[3], (12, 10): special[-1]}
        edges = {(y, x): special[(y + x) % len(special)] for y in (4, 5) for x in range(cols)}
        whole = {(y, x): special[(y * cols + x) % len(special)] for y in range(rows) for x in range(cols)}
        for name, outliers in (("some", some), ("corners", corners), ("edges", edges), ("all", whole)):
            t = Trellis(dtype, 16, rows=exponents(230, rows), cols=cols_list, outliers=outliers)
            words = integers(231, rows * cols)
            front = "zstd/1" if name == "all" else "raw/1"
            records.append(lossy(f"{dtype}/{name}", [rows, cols], words, t, front, tile=(5, 4)))
    return archive(*records)


@good("trellis-gains", "Gains of rows: every entry, plain, framed and all 0, in every data type and beside outliers.")
def _() -> Archive:
    records = []
    every = [*range(-128, 128)]
    for i, dtype in enumerate(DTYPES):
        for rows in (None, exponents(240 + i, 256, 60)):
            t = Trellis(dtype, 8, 99 + i, 97, 0x3EAAAAAB, [7, 0, -7], rows, exponents(243, 3), gains=every)
            records.append(lossy(f"every/{dtype}/{rows is None}", [256, 3], integers(244, 768, 99 + i), t, "zstd/1"))
        outliers = {(y, 4): w for y, w in zip((0, 7, 22), specials(dtype), strict=False)}
        gains = exponents(245 + i, 23, 40)
        for j, front in enumerate(fronts(248, 23, 20)):
            t = Trellis(dtype, 64, scale=0x3E4CCCCD, cols=exponents(249, 20), outliers=outliers, gains=gains)
            records.append(lossy(f"{dtype}/{j}", [23, 20], integers(250 + j, 460), t, front, tile=(9, 6)))
        t = Trellis(dtype, 1, rows=[3] * 40, framed="rows gains", gains=[i - 1] * 39 + [0])
        records.append(lossy(f"framed/{dtype}", [40, 7], integers(256, 280), t))
        records.append(lossy(f"none/{dtype}", [9, 2], integers(257, 18), Trellis(dtype, 4, gains=[0] * 9)))
    return archive(*records)


@good("trellis-shapes", "Every axis, no dimensions, single rows and columns, tiles of one word; aliases.")
def _() -> Archive:
    words = integers(240, 60)
    records = [
        lossy("scalar", [], [131], Trellis("F16", 8)),
        lossy("row", [1, 60], words, Trellis("BF16", 8, cols=exponents(241, 60)), tile=(1, 7)),
        lossy("column", [60, 1], words, Trellis("BF16", 8, rows=exponents(242, 60)), tile=(7, 1)),
        lossy("ones", [4, 15], words, Trellis("F32", 256), "zstd/1", tile=(1, 1)),
        lossy("tied", [60], words, Trellis("F16", 4), more={"aliases": [["tied.1", True], ["equal", False]]}),
    ]
    for axis in range(4):
        front = fronts(243, 1, 1)[0] if axis % 2 else Lanes(8, 2, runs=[125, 7], escapes=[0])
        records.append(lossy(f"axis-{axis}", [3, 4, 5], words, Trellis(DTYPES[axis % 3], 16), front, axis=axis))
    return archive(*records)


def trellis_base() -> Archive:
    """A small archive, which the bad ones are made of."""
    words = integers(250, 9 * 14)
    rows, cols = exponents(251, 9), exponents(252, 14)
    cols[3] = DEAD
    outliers = {(1, 2): 0x7FC1, (1, 5): 0x3F80, (4, 0): 0xFF80, (8, 13): 0}
    t = Trellis("BF16", 16, low=126, scale=0x3D000000, corrections=[2, -3, 4], rows=rows, cols=cols, outliers=outliers)
    coded = Lanes(8, 2, runs=[125, 7], escapes=[0], row_class=[i % 2 for i in range(9)], class_map=[1, 0])
    wide = integers(253, 40 * 30)
    framed = Trellis(
        "F32",
        64,
        120,
        rows=[i // 8 for i in range(40)],
        cols=[-(i // 6) for i in range(30)],
        framed="rows cols",
        outliers={(7, 7): 0x7F800001, (30, 2): 5},
    )
    return archive(
        lossy("lanes", [9, 14], words, t, coded, tile=(5, 14)),
        lossy("raw", [9, 14], words, t, "raw/1", tile=(5, 14)),
        lossy("framed", [40, 30], wide, framed, "zstd/1", tile=(16, 30)),
    )


good("trellis-base", "Three tensors under trellis/1; its bad archives are these with one thing changed.")(trellis_base)
