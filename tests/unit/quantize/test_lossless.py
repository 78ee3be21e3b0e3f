"""lanes/1 without the coder: grid, parameters, pairs, order, planes, tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rac.errors import FormatError, UnsupportedError
from rac.grid import Grid, dense_size
from rac.grid import matrix as words_matrix
from rac.stages.base import Context
from rac.stages.lanes import layout as ll
from rac.stages.lanes.parameters import Lanes

SPEC = Lanes(2, 1, 0, False, 2, (0, 3), (10,), 2, -2, 2, 1, (18, 2, 0))
"""Worked example 13.2 of format_spec/stages/lanes.md."""
UNIT = bytes.fromhex(
    "01000000 01000100 00000000 00000000 000080ac 00006003 00000000 00000000"
    "02000000 00000000 00000000 00000000 39910300 00000000 00000000 00000000"
)


def test_grid():
    grid = Grid(5, 7, 2, 2, 3)
    assert (grid.down, grid.across) == (3, 3)
    assert [grid.box(i) for i in (0, 2, 4, 8)] == [(0, 2, 0, 3), (0, 2, 6, 7), (2, 4, 3, 6), (4, 5, 6, 7)]
    assert (Grid(0, 7, 2, 1, 3).down, Grid(0, 7, 2, 1, 3).across) == (0, 0)


@pytest.mark.parametrize(
    ("dtype", "shape", "axis", "matrix", "size"),
    [
        ("F32", (2, 3, 4), 1, (2, 12), 96),
        ("F32", (), 0, (1, 1), 4),
        ("C64", (3, 4), 1, (3, 8), 96),
        ("F4", (3, 4), 1, (3, 2), 6),
        ("F4", (3, 4), 0, (1, 6), 6),
        ("U8", (0, 5), 1, (0, 5), 0),
        ("U8", (5, 0), 1, (5, 0), 0),
        ("I64", (6,), 1, (6, 1), 48),
    ],
)
def test_matrix(dtype, shape, axis, matrix, size):
    assert words_matrix(dtype, shape, axis) == matrix
    assert dense_size(dtype, shape) == size


def test_f4_is_never_cut():
    for shape in ((), (3,), (2, 5)):
        with pytest.raises(FormatError):
            dense_size("F4", shape)
    with pytest.raises(FormatError):
        words_matrix("F4", (3, 4), 2)


def test_pairs_are_numbered_as_in_the_text():
    p = replace(SPEC, per=2)
    assert (p.first_escape, p.base, p.symbols, p.first_escaping) == (3, 4, 16, 9)
    assert [tuple(ab) for ab in p.pairs().tolist()] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (1, 1),
        (2, 1),
        (0, 2),
        (1, 2),
        (2, 2),
        (3, 0),
        (3, 1),
        (3, 2),
        (0, 3),
        (1, 3),
        (2, 3),
        (3, 3),
    ]
    assert SPEC.pairs().tolist() == [[0], [1], [2], [3]]
    assert p.steps(np.array([0, 1, 2, 5])).tolist() == [0, 1, 1, 3]


def test_values():
    p = replace(SPEC, runs=(0, 1, 5, 3), escapes=(0, 40))
    assert p.values()[:7].tolist() == [0, 5, 6, 7, 0, 0, 0]
    assert (p.first_escape, p.base) == (4, 6)


@pytest.mark.parametrize(
    ("sign", "shift", "planes"),
    [
        (False, 0, []),
        (True, 0, [(1, 0)]),
        (False, 20, [(16, 0), (4, 16)]),
        (True, 22, [(16, 0), (4, 16), (2, 20), (1, 22)]),
        (True, 62, [(32, 0), (16, 32), (8, 48), (4, 56), (2, 60), (1, 62)]),
    ],
)
def test_planes(sign, shift, planes):
    assert replace(SPEC, sign=sign, shift=shift).planes() == planes


def head(**change):
    return SPEC.to_head() | change


def test_head_round_trip():
    assert Lanes.from_head(head(), Context("U8", 1, 1, 1)) == SPEC
    assert Lanes.from_head(head(packed=1), Context("U8", 1, 1, 1)) == replace(SPEC, packed=True)


@pytest.mark.parametrize(
    "change",
    [
        *({k: None} for k in ("lanes", "per", "zero", "sign", "shift", "runs", "escapes", "tables", "order", "sizes")),
        {"lanes": 0},
        {"lanes": 1025},
        {"lanes": True},
        {"per": 0},
        {"per": 3},
        {"zero": -1},
        {"zero": 8},
        {"sign": 2},
        {"shift": 8},
        {"shift": 7, "zero": 1},
        {"sign": 1, "shift": 7},
        {"tables": 0},
        {"tables": 257},
        {"order": -9},
        {"order": 9},
        {"rows": 0},
        {"rows": 257},
        {"rows": 256, "cols": 17},
        {"packed": 2},
        {"packed": True},
        {"runs": [0]},
        {"runs": [0, 0]},
        {"runs": [0, 257]},
        {"runs": [0, 3, 2, 1]},
        {"runs": [5, 1, 0, 1]},
        {"runs": [62, 3]},
        {"runs": [64, 1]},
        {"runs": [-1, 3]},
        {"runs": [True, 3]},
        {"runs": [], "escapes": []},
        {"runs": [0, 1], "escapes": []},
        {"runs": []},
        {"escapes": [64]},
        {"escapes": [-1]},
        {"escapes": [True]},
        {"per": 2, "runs": [0, 16]},
        {"sizes": [1, 2]},
        {"sizes": [1, 2, 3, 4]},
        {"sizes": [-1, 0, 0]},
        {"sizes": [(1 << 40) + 1, 0, 0]},
    ],
)
def test_heads_that_are_refused(change):
    with pytest.raises(FormatError):
        Lanes.from_head(head(**change), Context("U8", 1, 1, 1))


def test_keys_of_the_head():
    for key in SPEC.to_head().keys() - {"id"}:
        with pytest.raises(FormatError, match="incomplete"):
            Lanes.from_head({k: v for k, v in head().items() if k != key}, Context("U8", 1, 1, 1))
    for key in ("later", "x-note"):
        with pytest.raises(UnsupportedError, match="unknown"):
            Lanes.from_head(head(**{key: 1}), Context("U8", 1, 1, 1))
    assert Lanes.from_head(head(runs=[0, 1, 1, 1], escapes=[63, 63, 0]), Context("U8", 1, 1, 1)).base == 5
    assert Lanes.from_head(head(runs=[], escapes=[0, 1]), Context("U8", 1, 1, 1)).base == 2


def literal_order(rows, cols, table):
    """The loop of stages/lanes.md, section 8."""
    out = []
    for t in range(int(table.max()) + 1):
        for i in range(table.shape[0]):
            for j in range(table.shape[1]):
                if table[i, j] == t:
                    out += [(y, x) for y in range(len(rows)) if rows[y] == i for x in range(len(cols)) if cols[x] == j]
    return out


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("per", [1, 2])
def test_order(seed, per):
    from rac.encode.code.tiles import gather

    rng = np.random.default_rng(seed)
    h, w, kr, kc, tables = (int(rng.integers(1, n)) for n in (12, 12, 5, 4, 6))
    rows, cols = rng.integers(0, kr, h).astype(np.uint8), rng.integers(0, kc, w).astype(np.uint8)
    table = rng.integers(0, tables, (kr, kc)).astype(np.uint8)
    p = replace(SPEC, per=per, tables=tables, rows=kr, cols=kc)
    order = ll.order(p, rows, cols, h, w, table)
    expected = literal_order(rows if kr > 1 else rows * 0, cols if kc > 1 else cols * 0, table)
    place = np.arange(h * w, dtype=np.uint32).reshape(h, w)
    assert gather(order, place).tolist() == [y * w + x for y, x in expected]
    of = [int(table[rows[y] if kr > 1 else 0, cols[x] if kc > 1 else 0]) for y, x in expected]
    counts = [(t, of.count(t)) for t in sorted(set(of))]
    assert order.sizes.tolist() == [n for _, n in counts]
    assert order.segments.tolist() == [[-(-n // per), t] for t, n in counts]


@pytest.mark.parametrize("lanes", [1, 2, 5, 32])
def test_lane_steps(lanes):
    segments = np.array([[7, 0], [1, 1], [64, 3], [5, 2]])
    steps = ll.lane_steps_all(segments, lanes)
    assert steps.shape == (lanes, 4)
    for lane in range(lanes):
        expected = [sum(i % lanes == lane for i in range(n)) for n in segments[:, 0]]
        assert steps[lane].tolist() == expected
    assert steps.sum(0).tolist() == segments[:, 0].tolist()


def test_tile_of_the_text():
    unit = np.frombuffer(UNIT, np.uint8)
    tile = ll.parse_tile(unit, 10, SPEC)
    assert tile.counts.tolist() == [1, 1]
    assert tile.words.tolist() == [0xAC800000, 0x03600000]
    assert tile.escapes.tolist() == [2]
    assert tile.planes == [48]
    plane = memoryview(UNIT)[48:51]
    raw = ll.unpack_planes([plane], 10, SPEC.planes())
    assert raw.tolist() == [1, 2, 3, 0, 1, 0, 1, 2, 3, 0]
    assert ll.join(np.array([2, 1, 2, 12, 0, 0, 0, 1, 0, 2]), raw, SPEC, 1).tolist() == [9, 6, 11, 48, 1, 0, 1, 6, 3, 8]
    assert ll.build_tile(tile.words, tile.counts, b"\2", [bytes(plane)], SPEC).tobytes() == UNIT
    assert SPEC.parts([UNIT[: SPEC.directory]], [len(UNIT)], np.array([10])) == (8, 8, 1, 3)


def test_tiles_that_are_refused():
    def bad(match, at=None, value=1, size=64):
        unit = np.frombuffer(UNIT.ljust(size, b"\0")[:size], np.uint8).copy()
        if at is not None:
            unit[at] = value
        with pytest.raises(FormatError, match=match):
            ll.parse_tile(unit, 10, SPEC)

    bad("directory", size=0)
    bad("directory", size=15)
    for size in (16, 63, 65, 80):
        bad("fill the unit", size=size)
    bad("fill the unit", 0, 17)  # escapes
    bad("fill the unit", 3, 255)
    bad("fill the unit", 4, 5)  # words of lane 0
    bad("fill the unit", 7, 255)
    for at in (8, 15, 24, 31, 33, 47, 51, 63):
        bad("padding", at)
    bad("zero word", slice(16, 20), 0)
    bad("zero word", slice(20, 24), 0)
    with pytest.raises(FormatError, match="non-zero bits"):
        ll.unpack_planes([memoryview(b"\x39\x91\x13")], 10, SPEC.planes())


def test_packed_planes():
    from rac.container import zstd

    p = replace(SPEC, packed=True, shift=24, zero=0)
    planes = [bytes(2000), np.random.default_rng(0).bytes(1000)]
    stored = [zstd.compress(planes[0]), planes[1]]
    unit = np.frombuffer(ll.build_tile(np.zeros(0, np.uint32), np.zeros(2), b"", stored, p), np.uint8)
    assert p.plane_sizes(1000) == [2000, 1000]
    plain = ll.plain_tile(unit, 1000, p)
    tile = ll.parse_tile(plain, 1000, p)
    assert [plain[a : a + n].tobytes() for a, n in zip(tile.planes, (2000, 1000), strict=True)] == planes
    as_it_is = np.frombuffer(ll.build_tile(np.zeros(0, np.uint32), np.zeros(2), b"", planes, p), np.uint8)
    assert ll.plain_tile(as_it_is, 1000, p) is as_it_is
    first = unit[: p.directory].tobytes()
    assert p.parts([first], [len(unit)], np.array([1000])) == (16, 0, 0, len(stored[0]) + 1000)
    for at, value, match in (
        (4, 255, "fill the unit"),
        (6, 1, "larger than the plane"),
        (9, 0, "fill the unit|padding"),
    ):
        broken = unit.copy()
        broken[at] = value
        with pytest.raises(FormatError, match=match):
            ll.parse_tile(ll.plain_tile(broken, 1000, p), 1000, p)
    for size in (0, 10, 16, len(unit) - 16):
        with pytest.raises(FormatError):
            ll.parse_tile(ll.plain_tile(unit[:size], 1000, p), 1000, p)
    broken = unit.copy()
    broken[16 + len(stored[0])] = 1
    with pytest.raises(FormatError, match="padding"):
        ll.plain_tile(broken, 1000, p)


@pytest.mark.parametrize("word", [1, 2, 4, 8])
def test_join_is_the_inverse_of_the_cut(word):
    rng = np.random.default_rng(word)
    bits = 8 * word
    words = np.frombuffer(rng.bytes(word * 200), f"<u{word}")
    for _ in range(20):
        zero, sign = int(rng.integers(0, bits - 2)), bool(rng.integers(0, 2))
        shift = int(rng.integers(max(0, bits - zero - sign - 16), bits - zero - sign))
        p = replace(SPEC, zero=zero, sign=sign, shift=shift)
        cut = words >> np.uint64(zero).astype(words.dtype) << np.uint64(zero).astype(words.dtype)
        v = (cut >> np.array(zero, words.dtype)).astype(np.uint64)
        raw = v & np.uint64((1 << shift) - 1)
        magnitude = v & np.uint64((1 << (bits - zero - sign)) - 1)
        if sign:
            raw |= v >> np.uint64(bits - zero - 1) << np.uint64(shift)
        assert (ll.join(magnitude >> np.uint64(shift), raw, p, word) == cut).all()
