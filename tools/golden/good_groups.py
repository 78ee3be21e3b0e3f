"""The good archives of bits/1 and groups/1."""

from dataclasses import replace

from golden.good import archive, good, tensor
from golden.groups import Front, Groups, codes, grouped, in_bits, scales
from golden.lanes import Lanes
from golden.model import OBJECT, Archive, Record
from golden.products import Matrix, product
from golden.trellis import Trellis, integers, lossy
from rac.container import zstd

DTYPES = ("F32", "F16", "BF16")
EXAMPLE = [1, 6, 3, 0, 5, 7, 2, 4, 1, 6]
PLANES = "392d09" + "00" * 13 + "b202" + "00" * 14


@good("example-bits", "The tile of stages/bits.md section 5, byte for byte.")
def _() -> Archive:
    r = in_bits(tensor("a", "U8", [2, 5], EXAMPLE), 3)
    r.units = [bytes.fromhex(PLANES)]
    return archive(r)


@good("example-groups", "The tensor of stages/groups.md section 6, groups unit and elements byte for byte.")
def _() -> Archive:
    g = Groups("BF16", 3, 3, [0x3800, 0x4000, 0x3400, 0x3E01], [4, 3, 4, 0], -1)
    r = grouped("t", [2, 5], EXAMPLE, g, 3)
    r.units = [bytes.fromhex("3840343e 00000001 04030400"), bytes.fromhex(PLANES)]
    r.head["digest"] = zstd.digest(bytes.fromhex("40bf 003f 80be 40c0 0040 c03e 80be 0000 403f 9040"))
    return archive(r)


@good("bits-widths", "Every number of bits, in tiles of many sizes, of every data type of one byte, and no elements.")
def _() -> Archive:
    records = []
    for bits in range(1, 9):
        for i, (rows, cols, tile) in enumerate(((1, 1, (1, 1)), (3, 11, (2, 4)), (16, 16, (16, 16)), (9, 31, (4, 31)))):
            dtype = ("U8", "I8", "F8_E4M3", "F8_E5M2")[(bits + i) % 4]
            words = codes(300 + 10 * bits + i, rows * cols, bits)
            records.append(in_bits(tensor(f"{bits}/{i}", dtype, [rows, cols], words, tile=tile), bits))
    records.append(in_bits(tensor("bool", "BOOL", [77], codes(390, 77, 1)), 1))
    records.append(in_bits(tensor("f4", "F4", [4, 6], codes(391, 12, 7)), 7))
    records.append(in_bits(tensor("e8m0", "F8_E8M0", [2, 3, 5], codes(392, 30, 8), axis=1), 8))
    records.append(in_bits(tensor("scalar", "U8", [], [5]), 5))
    records.append(in_bits(tensor("empty", "U8", [0, 4], [], tile=(1, 4)), 4))
    return archive(*records)


@good("bits-trellis", "trellis/1 behind bits/1.")
def _() -> Archive:
    records = []
    for i, dtype in enumerate(DTYPES):
        t = Trellis(dtype, 16, zero=8, low=7, scale=0x3D000000, corrections=[2, -3], rows=[0, 1, -1] * 3)
        records.append(in_bits(lossy(dtype, [9, 14], codes(400 + i, 126, 4), t, tile=(5, 14)), 4, first=1))
    return archive(*records)


@good(
    "groups-fronts", "Behind every coder, every number of bits, groups of one column to a row, tiles that cut groups."
)
def _() -> Archive:
    records = []
    classes = [i % 2 for i in range(10)]
    for bits in range(1, 9):
        coded = Lanes(8, 2, runs=[0, 1 << bits], escapes=[0], row_class=classes)
        if bits == 8:
            coded = Lanes(8, 3, shift=4, sign=1, runs=[0, 8], row_class=classes)
        fronts: list[Front] = ["raw/1", "zstd/1", coded, bits]
        for i, front in enumerate(fronts):
            group = (1, 3, 7, 8, 22, 23)[(bits + i) % 6]
            n = 10 * -(-23 // group)
            zeros = 1 << bits - 1 if i % 2 else codes(410 + bits, n, 8 if i else bits)
            g = Groups(DTYPES[(bits + i) % 3], bits, group, scales(420 + i, n), zeros, (0, -3, 2)[i % 3])
            words = codes(430 + 10 * bits + i, 230, bits)
            records.append(grouped(f"{bits}/{i}", [10, 23], words, g, front, tile=((10, 23), (4, 9), (1, 23))[i % 3]))
    return archive(*records)


@good("groups-lists", "Lists of scales and zeros empty, plain and framed; zeros of every value.")
def _() -> Archive:
    records: list[Record] = []
    for i, framed in enumerate(("", "upper", "lower", "zeros", "upper lower zeros", "none")):
        n = 40 * 6
        words = codes(450 + i, 40 * 32, 4)
        for zeros in (0, 255, [k // 20 for k in range(n)], [k % 16 + 240 * (k > 200) for k in range(n)]):
            if isinstance(zeros, int) and "zeros" in framed:
                continue
            listed = [0x2400 + 256 * (k // 100) if framed == "none" else 0x2A11 + k // 60 for k in range(n)]
            g = Groups("BF16", 4, 6, listed, zeros, framed=framed)
            records.append(grouped(f"{i}/{len(records)}", [40, 32], words, g, "zstd/1"))
    every = Groups("F32", 8, 1, [0x3C00] * 256, [*range(256)])
    records.append(grouped("zeros", [1, 256], [*range(255, -1, -1)], every))
    return archive(*records)


@good("groups-rounding", "Ties, subnormal and infinite F16, the smallest and the largest scales and exponents.")
def _() -> Archive:
    records = []
    extreme = [0x0400, 0x0401, 0x7BFF, 0x3C01, 0x3BFF, 0x3FFF, 0x0FFF, 0x5555]
    for dtype in DTYPES:
        for exponent in (-60, -59, -11, -10, -9, -1, 0, 1, 59, 60):
            words = [i * 37 % 256 for i in range(8 * 64)]
            g = Groups(dtype, 8, 64, extreme, [0, 255, 128, 100, 7, 250, 127, 1], exponent)
            records.append(grouped(f"{dtype}/{exponent}", [8, 64], words, g))
    return archive(*records)


@good("groups-shapes", "Every axis, no dimensions, single rows and columns, tiles of one word; aliases.")
def _() -> Archive:
    words = codes(470, 60, 3)
    records = [
        grouped("scalar", [], [5], Groups("F16", 3, 1, [0x3555], 2), 3),
        grouped("row", [1, 60], words, Groups("BF16", 3, 7, scales(471, 9), 4), 3, tile=(1, 8)),
        grouped("column", [60, 1], words, Groups("BF16", 3, 1, scales(472, 60), codes(473, 60, 3)), 3, tile=(7, 1)),
        grouped("ones", [4, 15], words, Groups("F32", 3, 4, scales(474, 16), 3), 3, tile=(1, 1)),
        grouped(
            "tied", [60], words, Groups("F16", 3, 60, [0x2C00]), 3, more={"aliases": [["tied.1", True], ["eq", False]]}
        ),
    ]
    for axis in range(4):
        rows, cols = ((1, 60), (3, 20), (12, 5), (60, 1))[axis]
        group = (16, 20, 2, 1)[axis]
        g = Groups(DTYPES[axis % 3], 3, group, scales(480 + axis, rows * -(-cols // group)), 4)
        records.append(grouped(f"axis-{axis}", [3, 4, 5], words, g, 3 if axis % 2 else "raw/1", axis=axis))
    return archive(*records)


@good("groups-objects", "Objects under groups/1 and behind bits/1, which lowrank/1 uses.")
def _() -> Archive:
    a, b = codes(490, 9 * 2, 4), codes(491, 2 * 14, 3)
    one, two = Groups("F32", 4, 2, scales(492, 9), 8), Groups("F32", 3, 5, scales(493, 6), codes(494, 6, 3))
    left = Matrix(replace(grouped("left", [9, 2], a, one, 4), type=OBJECT), 9, 2, one.elements(a, 2))
    right = Matrix(replace(grouped("right", [2, 14], b, two), type=OBJECT), 2, 14, two.elements(b, 14))
    r = product("t", [9, 14], "BF16", integers(495, 126), Trellis("F32", 16, scale=0x3D000000), [left, right])
    return archive(left.record, right.record, r)


def groups_base() -> Archive:
    """A small archive, which the bad ones are made of."""
    zeros = codes(501, 36, 4)
    plain = Groups("BF16", 4, 4, scales(500, 36), zeros)
    coded = Lanes(8, 2, runs=[0, 16], escapes=[0], row_class=[i % 2 for i in range(9)], class_map=[1, 0])
    listed = [0x2800 + 16 * (k // 32) for k in range(40 * 8)]
    framed = Groups("F32", 3, 4, listed, [k // 64 for k in range(40 * 8)], -2, framed="upper lower zeros")
    return archive(
        grouped("lanes", [9, 14], codes(502, 126, 4), plain, coded, tile=(5, 14)),
        grouped("bits", [9, 14], codes(503, 126, 4), plain, 4, tile=(5, 14)),
        grouped("raw", [9, 14], codes(504, 126, 4), Groups("F16", 4, 14, scales(505, 9), 8), "raw/1", tile=(5, 14)),
        grouped("framed", [40, 30], codes(506, 1200, 3), framed, "zstd/1", tile=(16, 30)),
        in_bits(tensor("alone", "U8", [9, 14], codes(507, 126, 3), tile=(5, 14)), 3),
    )


good("groups-base", "Tensors under groups/1 and bits/1; their bad archives are these with one thing changed.")(
    groups_base
)
