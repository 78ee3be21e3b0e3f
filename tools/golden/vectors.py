"""Units and what they decode to, stage by stage, as JSON (format_spec/manifest.md, "Vectors")."""

import json
from typing import Any

from golden.good import dense
from golden.groups import Groups, codes, planes, scales
from golden.lanes import Lanes, encode
from golden.numbers import weights
from golden.products import basis, lowrank, word
from golden.trellis import DEAD, Trellis, integers, number

Case = dict[str, Any]


def bits_cases() -> list[Case]:
    """Every number of bits."""
    out = []
    for b in range(1, 9):
        words = codes(800 + b, 3 * 7, b)
        out.append(
            {"stage": {"id": "bits/1", "bits": b}, "tile": [3, 7], "unit": planes(words, b), "words": bytes(words)}
        )
    return out


def lanes_case(dtype: str, rows: int, cols: int, tile: tuple[int, int], words: list[int], p: Lanes) -> Case:
    """One tensor."""
    coded = encode(p, words, rows, cols, *tile)
    boxes = [
        [r, min(rows, r + tile[0]), c, min(cols, c + tile[1])]
        for r in range(0, rows, tile[0])
        for c in range(0, cols, tile[1])
    ]
    tiles = [
        {"box": box, "unit": unit, "sequence": [[y - box[0], x - box[2]] for y, x in sequence], "symbols": symbols}
        for box, unit, (sequence, symbols) in zip(boxes, coded.units[1:], coded.steps, strict=True)
    ]
    stated = {"stage": coded.stage, "word": p.width // 8, "matrix": [rows, cols], "shared": coded.units[0]}
    return stated | {"words": dense(dtype, words), "tiles": tiles}


def lanes_cases() -> list[Case]:
    """Classes, escapes, pairs with a filler, packed planes, zero bits; two tiles where there is room."""
    byte = [0, 1, 6, 3, 8, 9, 6, 11, 48, 1]
    single = Lanes(8, 2, shift=2, runs=[0, 3], escapes=[10], row_class=[1, 0], class_map=[0, 1])
    wide = [w & 0xFFFF0000 for w in weights(810, "F32", 24)]
    tops = sorted({w >> 23 & 255 for w in wide})
    pairs = Lanes(32, 3, 1, 2, 16, 1, 7, runs=[v for t in tops[:4] for v in (t, 1)], escapes=[0], filler=2)
    pairs.row_class, pairs.col_class, pairs.class_map = [0, 1, 0, 2], [0, 1, 1, 0, 1, 0], [1, 0, 0, 2, 1, 1]
    return [
        lanes_case("U8", 2, 5, (2, 5), byte, single),
        lanes_case("F32", 4, 6, (4, 4), wide, pairs),
        lanes_case("U8", 1, 1, (1, 1), [1], Lanes(8, 2, runs=[0, 2], tables=[[2048, 2048]])),
    ]


def trellis_cases() -> list[Case]:
    """No trellis and two, scales, corrections, a dead column, outliers, a second row of tiles."""
    out = []
    for i, (dtype, states) in enumerate((("F32", 1), ("BF16", 4), ("F16", 256), ("BF16", 1024))):
        t = Trellis(dtype, states, low=126, corrections=[9, -9, 64], outliers={(4, 1): 0x7C01})
        t.rows, t.cols = [i - 4, 0, 3, 60, -60], [0, 5, DEAD, -7]
        words = integers(820 + i, 20)
        stated = {"stage": t.stage(), "dtype": dtype, "matrix": [5, 4], "tile": [3, 4], "unit": b"".join(t.sections())}
        elements = dense(dtype, t.elements(words, 5, 4, 3, 4))
        out.append(stated | {"words": bytes(words), "elements": elements})
    return out


def groups_cases() -> list[Case]:
    """A zero for all and a list of them, a group that ends early, an exponent."""
    out = []
    kinds: list[tuple[str, list[int] | int]] = [
        ("F32", 8),
        ("BF16", [3, 200, 0, 7, 8, 9]),
        ("F16", [0, 15, 1, 2, 3, 4]),
    ]
    for i, (dtype, zeros) in enumerate(kinds):
        g = Groups(dtype, 4, 3, scales(830 + i, 6), zeros, exponent=4 * i - 4)
        words = codes(835 + i, 15, 4)
        stated = {"stage": g.stage(), "dtype": dtype, "matrix": [3, 5], "tile": [2, 5], "unit": b"".join(g.sections())}
        out.append(stated | {"words": bytes(words), "elements": dense(dtype, g.elements(words, 5))})
    return out


def product_cases(low: bool) -> list[Case]:
    """Sums whose order can be seen, a zero that meets an infinity, subnormal results."""
    special = [0x7F800000, 0, 0x80000000, 0x00000001, 0x33800000, 0x3F800001]
    v = special + weights(840 + low, "F32", 6)
    shapes = [[3, 2], [2, 4]] if low else [[4, 4]]
    objects = []
    for i, (rows, cols) in enumerate(shapes):
        words = [*weights(845 + i, "F32", rows * cols - 4), 0x33800000, 0xFF800000, 0x00400000, 0x3F800000]
        objects.append((rows, cols, words))

    def table(rows: int, cols: int, words: list[int]) -> list[list[float]]:
        return [[number(w) for w in words[i * cols : (i + 1) * cols]] for i in range(rows)]

    found = (lowrank if low else basis)(table(3, 4, v), *(table(*o) for o in objects))
    return [
        {
            "dtype": dtype,
            "matrix": [3, 4],
            "v": dense("F32", v),
            "objects": [{"shape": [r, c], "elements": dense("F32", words)} for r, c, words in objects],
            "elements": dense(dtype, [word(x, dtype) for row in found for x in row]),
        }
        for dtype in ("F32", "F16", "BF16")
    ]


def online_cases() -> list[Case]:
    """A block of 4 with signs, a step, a matrix. T of these is exact."""
    plus = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
    signs = (-1, 1, 1, 1)  # of seed 1, stages/online.md section 7
    cases: list[Case] = [
        {
            "online": {"id": "hadamard/1", "inner": 1, "seed": 1, "size": 4},
            "columns": 4,
            "object": None,
            "t": [[v * s / 2 for v, s in zip(row, signs, strict=True)] for row in plus],
        },
        {
            "online": {"id": "hadamard/1", "inner": 2, "seed": None, "size": 4},
            "columns": 8,
            "object": None,
            "t": [[plus[i // 2][j // 2] / 2 if i % 2 == j % 2 else 0.0 for j in range(8)] for i in range(8)],
        },
    ]
    m = [number(w) for w in weights(850, "F32", 4)]
    cases.append(
        {
            "online": {"id": "matrix/1", "inner": 1, "object": "m"},
            "columns": 4,
            "object": {"shape": [2, 2], "elements": dense("F32", weights(850, "F32", 4))},
            "t": [[m[i % 2 * 2 + j % 2] if i // 2 == j // 2 else 0.0 for j in range(4)] for i in range(4)],
        }
    )
    return cases


VECTORS = {
    "basis": lambda: product_cases(False),
    "bits": bits_cases,
    "groups": groups_cases,
    "lanes": lanes_cases,
    "lowrank": lambda: product_cases(True),
    "online": online_cases,
    "trellis": trellis_cases,
}


def vectors() -> dict[str, bytes]:
    """Every file by its name."""
    out = {}
    for name, cases in VECTORS.items():
        lines = [json.dumps(case, default=bytes.hex, separators=(", ", ": ")) for case in cases()]
        about = f"Units and what they decode to; format_spec/manifest.md has the keys, stages/{name}.md the stage."
        out[f"{name}.json"] = (f'{{"about": "{about}", "cases": [\n' + ",\n".join(lines) + "\n]}\n").encode()
    return out
