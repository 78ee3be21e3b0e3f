"""Each C kernel against its twin in numpy."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest

import rac
from rac import native
from rac.container import zstd
from rac.encode.code import classes as cl
from rac.encode.code import fitted, lanes
from rac.encode.code.tiles import Tiles
from rac.encode.pack import pack_source
from rac.encode.sources import from_arrays
from rac.entropy import ans, tables
from rac.entropy.ans import Models
from rac.grid import Grid, up16
from rac.native import library, prototypes
from rac.native.lanes import decode_side_by_side
from rac.native.library import CPUS
from rac.stages.lanes import layout as ll
from rac.stages.lanes.parameters import Lanes
from support import kernels


@pytest.fixture
def both():
    """Calls a function with the kernels of each instruction set, which must agree, and without: both results."""

    def call(function):
        results = []
        for cpu in kernels.here():
            with kernels.using(cpu):
                results.append(function())
        for other in results[1:]:
            assert_same(results[0], other)
        with native.using(None):
            slow = function()
        return results[-1], slow

    assert native.cpus()[0] == "generic"
    return call


def assert_same(a, b):
    """Arrays, numbers, None, bytes, or tuples of them, equal to the byte."""
    if isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def words(seed, word, *shape):
    rng = np.random.default_rng(seed)
    out = np.frombuffer(rng.bytes(word * int(np.prod(shape))), f"<u{word}").reshape(shape)
    return out >> np.array(rng.integers(0, 8 * word), out.dtype)


@pytest.mark.parametrize("word", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 63, 1000])
def test_scan(both, word, n):
    data = words(n, word, n)
    bits = 8 * word
    for signed in (0, 1):
        shift, mask = max(0, bits - signed - 16), (1 << (bits - signed)) - 1

        def run(shift=shift, mask=mask):
            hist = np.full(65536, 3, np.uint32)
            return native.scan(data, mask, shift, hist), hist

        (a, hist_a), (b, hist_b) = both(run)
        assert a == b == int(np.bitwise_or.reduce(data, initial=0))
        assert (hist_a == hist_b).all()
        assert int(hist_a.sum()) == 3 * 65536 + n


@pytest.mark.parametrize("word", [1, 2, 4, 8])
def test_symbols(both, word):
    rng = np.random.default_rng(word)
    lut = rng.integers(0, 256, 65536).astype(np.uint8)
    data = words(5, word, 37, 41)
    for zero, sign, shift in ((0, 0, 0), (0, 1, 1), (2, 1, 3), (1, 0, 4)):
        shift = max(shift, 8 * word - zero - sign - 16)
        fast, slow = both(lambda z=zero, s=sign, f=shift: native.symbols(data, z, s, f, lut))
        assert (fast == slow).all()
        v = data.astype(object)
        tops = ((v >> zero) % (1 << (8 * word - zero - sign))) >> shift
        assert (fast == lut[tops.astype(np.int64)]).all()


@pytest.mark.parametrize("keys", ["none", "rows", "cols", "both"])
@pytest.mark.parametrize(("size", "cols"), [(9, 20), (9, 100), (256, 600)])  # the last in strips of columns
def test_histogram(both, keys, size, cols):
    rng = np.random.default_rng(0)
    sym = rng.integers(0, size, (33, cols)).astype(np.uint8)
    row = rng.integers(0, 5, 33).astype(np.int32) * 3 if keys in ("rows", "both") else None
    col = rng.integers(0, 3, cols).astype(np.int32) if keys in ("cols", "both") else None
    fast, slow = both(lambda: native.histogram(sym, row, col, 15, size))
    assert (fast.dtype, fast.shape) == (np.uint32, (15, size))
    assert (fast == slow).all()
    assert int(fast.sum()) == sym.size
    if keys == "both":
        assert fast[row[4] + col[7], sym[4, 7]] > 0


@pytest.mark.parametrize(("size", "cols", "rows"), [(9, 20, 40), (16, 150, 600), (3, 64, 1), (40, 70, 33)])
def test_column_histogram(both, size, cols, rows):
    rng = np.random.default_rng(size)
    sym = rng.integers(0, size, (rows, cols + 5)).astype(np.uint8)[:, 2 : cols + 2]
    classes = rng.integers(0, 3, rows).astype(np.uint8)
    for of, k in ((classes, 4), (None, 1)):
        fast, slow = both(lambda of=of, k=k: native.column_histogram(sym, of, k, size))
        assert (fast.dtype, fast.shape) == (np.uint32, (cols, k, size))
        assert (fast == slow).all()
        assert (fast.sum(axis=(1, 2)) == rows).all()


def frequencies(rng, tables, symbols):
    """Tables (T, S) that sum to 4096, some with frequencies of 0, 1 and 4095."""
    out = np.zeros((tables, symbols), np.uint16)
    for k, row in enumerate(out):
        used = rng.choice(symbols, max(2, symbols // (k + 1)), replace=False)
        share = rng.dirichlet(np.full(len(used), 0.3))
        row[used] = 1 + np.floor(share * (4096 - len(used)))
        row[used[share.argmax()]] += 4096 - int(row.sum())
    out[-1] = 0
    out[-1, [0, symbols - 1]] = 4095, 1
    return out


@pytest.mark.parametrize("lanes", [1, 3, 8, 16, 32, 40, 1000])
@pytest.mark.parametrize("sizes", [[700, 1, 64, 33, 9000], [5]])
def test_encode_lanes_is_constriction(lanes, sizes):
    """The kernel's words are those of constriction, lane by lane, and all decoders read them."""
    rng = np.random.default_rng(lanes)
    freq = frequencies(rng, len(sizes), 200)
    segments = np.array([[n, t] for t, n in enumerate(sizes)], np.int64)
    symbols = np.concatenate([rng.choice(200, n, p=freq[t] / 4096) for n, t in segments]).astype(np.uint8)
    same = np.tile(np.arange(256, dtype=np.uint8), (len(freq), 1))
    model = native.symbol_model(freq, same)
    words, counts = native.encode_lanes(symbols, lanes, segments, model)
    for cpu in kernels.here():
        with kernels.using(cpu):
            assert_same((words, counts), native.encode_lanes(symbols, lanes, segments, model))
    models, starts = Models(freq), np.cumsum(segments[:, 0]) - segments[:, 0]
    streams = []
    for lane in range(lanes):
        mine = [symbols[s + lane : s + n : lanes] for s, (n, _) in zip(starts, segments, strict=True)]
        places = [models.index[t][m] for m, (_, t) in zip(mine, segments, strict=True)]
        streams.append(
            models.encode(
                np.concatenate(places).astype(np.int32),
                [(len(m), int(t)) for m, (_, t) in zip(mine, segments, strict=True)],
            )
        )
    assert counts.tolist() == [len(s) for s in streams]
    assert words.tolist() == ans.merge(streams, freq, segments).tolist()
    assert [s.tolist() for s in ans.split(words, counts, freq, segments)] == [s.tolist() for s in streams]
    luts = native.lookup(freq, np.arange(200, dtype=np.uint8))
    assert (native.ans_decode(luts, words.copy(), counts, segments, len(symbols)) == symbols).all()
    out = np.empty_like(symbols)
    assert not decode_side_by_side(luts, words, counts, segments, out)
    assert (out == symbols).all()
    for at in range(len(words))[-1:]:  # the last, where there is any
        words[at] ^= 1 << 31
        assert decode_side_by_side(luts, words, counts, segments, out)


def test_symbols_that_count_as_others():
    freq = np.array([[4000, 96]], np.uint16)
    same = np.zeros((1, 256), np.uint8)
    same[0, 1] = same[0, 7] = 1
    a = native.encode_lanes(np.array([0, 1, 7, 0], np.uint8), 2, np.array([[4, 0]]), native.symbol_model(freq, same))
    b = native.encode_lanes(np.array([0, 1, 1, 0], np.uint8), 2, np.array([[4, 0]]), native.symbol_model(freq, same))
    assert a[0].tolist() == b[0].tolist() and a[1].tolist() == b[1].tolist()


@pytest.mark.parametrize("word", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 129])
def test_planes(both, word, n):
    data = words(n, word, n)
    bits = 8 * word
    for zero, sign, shift in (
        (0, True, bits - 2),
        (0, False, bits - 1),
        (1, True, bits // 2),
        (0, True, 0),
        (3, False, 1),
    ):
        p = Lanes(1, 1, zero, sign, shift, (0, 2), (), 1, 0, 1, 1, (0, 0, 0))
        sizes, total = [], 0
        for (b, low), size in zip(p.planes(), p.plane_sizes(n), strict=True):
            sizes.append((b, low, total))
            total += up16(size)
        fast, slow = both(lambda args=(data, zero, sign, shift, sizes, total): native.planes(*args))
        assert fast.tobytes() == slow.tobytes()
        views = [memoryview(fast.tobytes())[a : a + k] for (*_, a), k in zip(sizes, p.plane_sizes(n), strict=True)]
        v = data.astype(np.uint64) >> np.uint64(zero)
        expected = v & np.uint64((1 << shift) - 1)
        if sign:
            expected |= v >> np.uint64(bits - zero - 1) << np.uint64(shift)
        assert (ll.unpack_planes(views, n, p.planes()) == expected).all()


def tiles_of(word, per, lanes, shape, classes):
    """`Tiles` of a matrix with escapes and classes of rows ("r") and columns ("c"); its words, their base symbols."""
    rng, bits, signed, used = np.random.default_rng(lanes), 8 * word, word > 1, 14 if per == 2 else 40
    shift, escape = (max(1, bits - 9), 60) if signed else (2, 61)
    tops = np.minimum(rng.geometric(0.4, shape) + 19, 19 + used)
    tops = np.where(rng.random(shape) < 0.02, rng.integers(escape, 190 if signed else 64, shape), tops).astype(
        np.uint64
    )
    raw = rng.integers(0, 1 << min(shift, 30), shape).astype(np.uint64)
    sign = rng.integers(0, 1 + signed, shape).astype(np.uint64) << np.uint64(bits - 1)
    words = (tops << np.uint64(shift) | raw | sign).astype(f"<u{word}")
    lut = np.zeros(65536, np.uint8)
    lut[20 : 20 + used], lut[escape : escape + 256] = np.arange(used), used
    kr, kc = 3 if "r" in classes else 1, 4 if "c" in classes else 1
    rows, cols = (
        rng.integers(0, k, n).astype(np.uint8) if k > 1 else None for k, n in zip((kr, kc), shape, strict=True)
    )
    table = rng.integers(0, 5, (kr, kc)).astype(np.uint8)
    p = Lanes(lanes, per, 0, signed, shift, (20, used), (escape,), 5, 0, kr, kc, (0, 0, 0), packed=word >= 4)
    tiles = Tiles(p, Grid(*shape, word, -(-shape[0] // 2), -(-shape[1] // 3)), lut, rows, cols, table)
    return tiles, words, lut[tops]


@pytest.mark.parametrize("classes", ["", "r", "c", "rc"])
@pytest.mark.parametrize("lanes", [1, 2, 8, 16, 20, 32, 40])
@pytest.mark.parametrize(("word", "per"), [(1, 1), (2, 2), (2, 1), (4, 2), (8, 1)])
def test_tiles(both, word, per, lanes, classes):
    """Counts and units of tiles are those of numpy and constriction."""
    tiles, data, base = tiles_of(word, per, lanes, (41, 151 if lanes % 16 else 500), classes)
    fast, slow = both(lambda: tiles.count(base))
    assert (fast == slow).all()
    assert int(fast.sum()) >= data.size // per
    rare = (slow > 0) & (slow < 2) & (np.arange(tiles.p.symbols) < tiles.p.first_escaping) if per == 2 else None
    tiles.use(np.stack([tables.normalise(1 + c) for c in slow]), rare)
    fast, slow = both(lambda: tuple(tiles.units(data, range(2))[0]))
    assert_same(fast, slow)
    assert len(fast) == 6
    assert sum(int(unit[:4].view("<u4")[0]) for unit in fast) > 0  # escapes


def test_tiles_with_frequencies_at_their_limits(both):
    """Frequencies of 1 and 4095, lanes whose states are largest."""
    rng = np.random.default_rng(0)
    data = np.where(rng.random((30, 4000)) < 0.0005, rng.integers(0, 4, (30, 4000)), 1).astype(np.uint8)
    p = Lanes(32, 1, 0, False, 0, (0, 4), (), 1, 0, 1, 1, (0, 0, 0))
    lut = np.arange(65536).astype(np.uint8)
    tiles = Tiles(p, Grid(30, 4000, 1, 30, 4000), lut, None, None, np.zeros((1, 1), np.uint8))
    tiles.use(np.array([[1, 4093, 1, 1]], np.uint16), None)
    fast, slow = both(lambda: tuple(tiles.units(data, range(1))[0]))
    assert_same(fast, slow)


def test_sum_classes(both):
    rng = np.random.default_rng(0)
    hist, classes = rng.integers(0, 1 << 32, (50, 2, 9), np.uint32), rng.integers(0, 4, 50).astype(np.uint8)
    fast, slow = both(lambda: cl._sum(hist, classes, 6))
    assert (fast == slow).all()
    assert all((fast[k] == hist[classes == k].sum(0, dtype=np.int64)).all() for k in range(6))


def test_log2(both):
    n = np.concatenate([np.arange(70_000), 1 << np.arange(53), (1 << np.arange(1, 53)) - 1])
    fast, slow = both(lambda: cl.log2(n))
    assert (fast == slow).all()


def test_code_length(both):
    rng = np.random.default_rng(0)
    for shape in ((4, 9), (3, 2, 16), (1, 1), (2, 256)):
        counts = (rng.pareto(0.4, shape).clip(0, 1e9)).astype(np.int64) * (rng.random(shape) < 0.8)
        for weight in (1, 7):
            fast, slow = both(lambda c=counts, w=weight: cl.code_length(c, w))
            assert fast.shape == shape[:-1]
            assert (fast == slow).all()


@pytest.mark.parametrize("seed", range(10))
def test_join(both, seed):
    rng = np.random.default_rng(seed)
    k, g, s = (int(rng.integers(1, n)) for n in (17, 4, 20))
    agg = (rng.pareto(0.6, (k, g, s)) * 20).clip(0, 1e8).astype(np.int64)
    agg[rng.random(k) < 0.2] = 0
    members = rng.integers(0, 1000, k)
    for m, weight in ((None, 1), (members, 1), (members, 12)):
        fast, slow = both(lambda m=m, w=weight: cl.join(agg.copy(), m, w))
        assert fast.tolist() == slow.tolist()
        assert set(fast.tolist()) == set(range(int(fast.max()) + 1))


@pytest.mark.parametrize(
    ("n", "g", "s", "k"), [(300, 1, 15, 8), (70, 5, 9, 6), (40, 3, 100, 16), (9, 2, 4, 9), (20, 1, 3, 1)]
)
def test_cluster(both, n, g, s, k):
    """Classes of vectors, some empty, some equal, some of large counts."""
    rng = np.random.default_rng(n)
    share = rng.dirichlet(np.full(s, 0.3), (n, g)) * (rng.random((n, 1, 1)) < 0.9)
    hist = (share * rng.choice([10, 1000, 1 << 28], (n, 1, 1))).astype(np.uint32)
    hist[5] = hist[3]
    for rounds in (0, 1, 5):
        fast, slow = both(lambda r=rounds: cl.cluster(lambda a, b: hist[a:b], n, g * s, k, r))
        assert_same(fast, slow)
        assert int(fast[1].sum()) == int(hist.sum(dtype=np.int64))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("shape", "n", "most"),
    [((200, 150), 9, (8, 6)), ((17, 600), 16, (16, 8)), ((90, 130), 40, (8, 1)), ((9, 9), 4, (8, 6))],
)
def test_classify(both, shape, n, most, again):
    """Classes of rows and columns that differ, counts and tables of their pairs: in one call, or step by step."""
    rng = np.random.default_rng(shape[0])
    scale = rng.integers(0, 4, (shape[0], 1)) + rng.integers(0, 3, (1, shape[1]))
    sym = np.minimum(rng.geometric(0.5, shape) + scale - 1, n - 1).astype(np.uint8)
    for same in (np.zeros_like(sym), sym):
        base = object.__new__(lanes.Base)
        base.all, base._view = same, types.SimpleNamespace(grid=Grid(*shape, 1, *shape))

        def run(base=base):
            found = cl.classify(base.all, n, 3, 2, (*most, again))
            return found or lanes._classes(base, shape, n, (3, 2), (*most, again))

        fast, slow = both(run)
        for a, b in zip(fast, slow, strict=True):
            assert (a is None) == (b is None)
            assert a is None or np.array_equal(a, b)
        assert int(fast[2].sum()) == sym.size
    assert len(fast[2]) > (sym.size > 8192)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("per", [1, 2])
def test_fit(both, per, seed):
    """Tables of counts, some of one symbol, of none, of all alike, and of many that are rare."""
    rng = np.random.default_rng(seed)
    k, escapes = int(rng.integers(1, 15)), (3,) if seed % 4 else (900,)
    p = Lanes(2, per, 0, True, 0, (20, k), escapes, 5, 0, 5, 1, (0, 0, 0))
    counts = (rng.pareto(0.3, (5, p.symbols)) * 3).clip(0, 1 << 36).astype(np.int64)
    counts[1], counts[2], counts[2, 0], counts[3] = 0, 0, 7, 5
    given = counts.copy()
    fast, slow = both(lambda: dataclasses.astuple(fitted.fit(counts, p)))
    assert (counts == given).all()
    assert (fast[1] is None) == (slow[1] is None)
    assert fast[1] is None or np.array_equal(fast[1], slow[1])
    assert_same((fast[0], *fast[2:4]), (slow[0], *slow[2:4]))
    assert fast[4:] == slow[4:]
    assert (fast[0].sum(1) == 4096).all()


@pytest.mark.parametrize("spread", [1, 4, 40])
def test_scan_of_many(both, spread):
    """Counts of whole pieces of 3840 words, whose tops lie close together, far apart, or at 0."""
    rng = np.random.default_rng(spread)
    for size in (2, 4):
        tops = np.clip(120 + rng.normal(0, spread, 9000), 0, 255).astype(f"<u{size}") * (rng.random(9000) < 0.9)
        data = tops.astype(f"<u{size}") << np.array(8 * size - 9, f"<u{size}")

        def run(data=data, size=size):
            hist = np.zeros(256, np.uint32)
            return native.scan(data, (1 << (8 * size - 1)) - 1, 8 * size - 9, hist), hist

        (a, hist_a), (b, hist_b) = both(run)
        assert (a, hist_a.tolist()) == (b, hist_b.tolist())
        assert hist_a.tolist() == np.bincount(tops.astype(int), minlength=256).tolist()


def run(code, **env):
    """What Python says to `code` in another process; the environment without what chooses kernels."""
    base = {k: v for k, v in os.environ.items() if k not in ("RAC_NO_NATIVE", "RAC_CPU")}
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=base | env)


def test_which_kernel():
    assert native.kernel().startswith("C")
    code = "from rac import native; print(native.kernel())"
    cases = [
        ({}, CPUS[native.cpus()[-1]]),
        ({"RAC_NO_NATIVE": "1"}, "numba"),
        ({"RAC_CPU": ""}, CPUS[native.cpus()[-1]]),
    ]
    for env, expected in [*cases, *(({"RAC_CPU": cpu}, CPUS[cpu]) for cpu in native.cpus())]:
        done = run(code, **env)
        assert (done.stdout.strip(), done.stderr) == (expected, "")
    assert "avx2" in native.cpus() or platform.machine() != "x86_64"


def test_an_instruction_set_that_is_not_there_is_an_error():
    for cpu in ("sse9", *(cpu for cpu in CPUS if cpu not in native.cpus())):
        done = run("from rac import native; native.kernel()", RAC_CPU=cpu)
        assert done.returncode == 1
        assert f"UnsupportedError: RAC_CPU is {cpu!r}" in done.stderr.splitlines()[-1]
        with pytest.raises(rac.UnsupportedError, match=cpu), native.using(cpu):
            pass


def test_a_library_of_another_layout_is_refused(monkeypatch):
    path = library._load("generic").path
    fields = [(name, kind) for name, kind in prototypes.TileJob._fields_ if name != "size"]
    other = type("TileJob", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(prototypes, "STRUCTURES", (*prototypes.STRUCTURES[:3], other, *prototypes.STRUCTURES[4:]))
    with pytest.raises(rac.RacError, match=r"not of this version of rac \(TileJob\)"):
        library.Library(path)
    monkeypatch.undo()
    monkeypatch.setattr(prototypes, "VERSION", 1)
    with pytest.raises(rac.RacError, match=r"not of this version of rac \(version\)"):
        library.Library(path)
    monkeypatch.undo()
    assert library.Library(path).rac_cpu() >= 0


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 8, 16, 32, 40, 64])
@pytest.mark.parametrize("dtype", ["u1", ml_dtypes.bfloat16, "f2", "f4", "f8"])
def test_tiles_under_each_instruction_set(lanes, dtype, tmp_path):
    """Every instruction set packs to the same bytes, and reads back what was packed."""
    rng = np.random.default_rng(lanes)
    scale = np.exp2(rng.integers(-3, 3, (70, 1))) * np.exp2(rng.integers(-3, 3, 330))  # classes of rows and columns
    array = rng.standard_normal((70, 330)) * scale
    array.flat[::977] = 0  # escapes
    dense = (array * 3 + 128).clip(0, 255).astype("u1") if dtype == "u1" else array.astype(np.dtype(dtype))
    files = set()
    for cpu in kernels.here():
        with kernels.using(cpu):
            pack_source(from_arrays({"a": dense}), tmp_path / "a.rac", level="max", lanes=lanes, force=True)
            files.add((tmp_path / "a.rac").read_bytes())
            assert rac.load_file(tmp_path / "a.rac", threads=1)["a"].tobytes() == dense.tobytes()
    assert len(files) == 1


@pytest.mark.parametrize("cpu", native.cpus())
def test_checksums_of_units_are_those_of_xxhash(cpu):
    with native.using(cpu):
        for n in (*range(242), 255, 256, 257, 512, 1023, 1024, 1025, 1088, 1089, 4096, 10_001):
            data = np.random.default_rng(n).integers(0, 256, n, np.uint8)
            assert library.library().rac_xxh3(data, n) == zstd.xxh3(data.data), n


@pytest.mark.parametrize("cpu", native.cpus())
def test_of_a_run_of_tiles_the_first_damaged_one_is_named(cpu, tmp_path):
    """Whichever tiles are decoded together."""
    w = np.random.default_rng(0).standard_normal((4096, 192)).astype(ml_dtypes.bfloat16)
    rac.save_file({"a": w[:999], "w": w}, tmp_path / "w.rac", level="fast")
    data = (tmp_path / "w.rac").read_bytes()
    with rac.open(data) as f, native.using(cpu):
        _, t = f._parsed("w")
        assert t.tiles >= 4 and t.chain.method == "lanes/1"
        for i in (0, 3, t.tiles - 1):
            at = t.record.payload + t.units[t.first + i].offset + 7
            bad = bytearray(data)
            bad[at] ^= 1
            with pytest.raises(rac.ChecksumError, match="checksum does not match") as e:
                rac.load(bytes(bad))
            assert e.value.unit == f"'w' unit {t.first + i}"
