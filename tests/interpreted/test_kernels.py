"""The GPU kernels under triton's interpreter, bit for bit against the decoder of the CPU.

Many tensors go through one decoder, as the interpreter takes the same time for one lane and for 32.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rac.container.access import BytesAccess
from rac.decode import archive as ar
from rac.decode import random as ld
from rac.decode.gpu import Gpu
from rac.decoder import Decoder
from rac.encode.code import plan as analyse
from rac.encode.code.table import ENCODERS
from rac.encode.pack import pack_source
from rac.encode.sources import from_arrays
from rac.entropy import tables
from rac.errors import ChecksumError, FormatError
from rac.gpu import decoder as gpu
from rac.gpu import layout
from rac.grid import up16
from rac.methods.grouped import pack_grouped
from rac.registry import RECORD_ATTACHMENT
from rac.stages import trellis
from rac.stages.groups import values
from rac.stages.lanes import layout as ll
from rac.stages.lanes.parameters import Lanes
from support import grids, products, tiles

GOLDEN = Path(__file__).parents[2] / "format_spec" / "golden" / "good"
ROWS, TILES = 100, 6
"""A tensor with longer lanes, or more tiles, is for those who ask for slow tests: a row takes milliseconds."""


def is_short(t):
    """Whether the interpreter is done with a tensor in a second or two."""
    steps = (
        t.grid.tr * t.grid.tc // (t.chain.coder.lanes * t.chain.coder.per) if isinstance(t.chain.coder, Lanes) else 0
    )
    return steps <= ROWS and t.tiles <= TILES


def decoded(archives, wanted, ring=1 << 28):
    """(name, words of the GPU decoder, words of the CPU's) of tensors and objects; one decoder for all."""
    decoder, found = gpu.DeviceDecoder("cpu", ring), []
    for a in archives:
        for e in a.index.entries:
            if e.type == RECORD_ATTACHMENT or e.dtype == "" or 0 in e.shape:
                continue
            t = ld.parse(a, a.record(e))
            if not wanted(t):
                continue
            (units,) = ld.read_units(a, t, [(0, len(t.units))])
            out = decoder.add(t, [u.data for u in units[: t.first]], units[t.first :], ld.objects(a, t))
            found.append((f"{a.access.name}: {e.name}", out, a, e))
    decoder.flush()
    for name, out, a, e in found:
        words = next(ld.load(a, [e], 1))[1]
        yield name, out.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), words.tobytes()


def wrong(archives, wanted=lambda _: True, **options):
    """Number of tensors, and names of those that differ."""
    got = list(decoded(archives, wanted, **options))
    return len(got), [name for name, a, b in got if a != b]


OF = {
    "lanes": (r"lanes", 100),
    "trellis": (r"trellis", 130),
    "groups": (r"groups", 70),
    "bits": (r"bits", 30),
    "product": (r"lowrank|basis|products|objects", 80),
    "online": (r"online", 50),
    "others": (r"(?!lanes|trellis|groups|bits|lowrank|basis|products|objects|online)", 60),
}
"""The golden files that a kernel, or a stage, has to itself, and tensors that there are of them at least."""


def golden(pattern=""):
    """Golden files, those whose name begins with a pattern."""
    paths = [p for p in sorted(GOLDEN.glob("*.rac")) if re.match(pattern, p.name)]
    return [ar.RacFile(BytesAccess(p.read_bytes(), p.name), threads=1).archives[0] for p in paths]


@pytest.mark.parametrize("of", OF)
def test_golden_files(of):
    pattern, least = OF[of]
    n, bad = wrong(golden(pattern), is_short)
    assert n > least
    assert not bad


def grouped(i, bits, group, dtype, rows, cols, zeros):
    """A matrix on a grid of groups, of a data type."""
    rng = np.random.default_rng(i)
    given = grids.nearest(rng.standard_normal((rows, cols)).astype(np.float32), bits, group)
    if not zeros:
        given = replace(given, zeros=np.full_like(given.zeros, 1 << bits - 1))
    return given, torch.from_numpy(values(given)).to(dtype)


@pytest.mark.parametrize("entropy", [True, False])
def test_groups(tmp_path, monkeypatch, entropy):
    """Groups that end within tiles, rows and programs; tiles that begin within a group; a zero for all, or for each."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    cases = [
        (bits, group, types[i % 3], rows, cols, not i % 2)
        for i, (bits, group, rows, cols) in enumerate(
            [
                (4, 128, 9, 384),
                (3, 7, 13, 50),
                (8, 9, 6, 160),
                (2, 300, 10, 300),
                (5, 64, 66, 64),
                (1, 32, 6, 64),
                (6, 5, 7, 64),
            ]
        )
    ]
    made = {f"{i}": grouped(i, *case) for i, case in enumerate(cases)}
    dense = {name: w for name, (_, w) in made.items()}
    given = {name: g for name, (g, _) in made.items()}
    tiles.cut(monkeypatch, ((1, 500), (2, 1500), (3, 1 << 62)))
    pack_grouped(from_arrays(dense, {}), given, tmp_path / "m.rac", entropy)
    seen, launch = set(), gpu.launch

    def seeing(launches, memories):
        seen.update((o["PAIRS"], o["SAME"]) for each in launches if "SAME" in (o := dict(each.call.options)))
        launch(launches, memories)

    monkeypatch.setattr(gpu, "launch", seeing)
    with ar.RacFile(tmp_path / "m.rac", threads=1) as f:
        assert {f.archives[0].record(e).head["stages"][1]["id"] for e in f.archives[0].index.entries} == {"groups/1"}
        grid = [ld.parse(f.archives[0], f.archives[0].record(e)).grid for e in f.archives[0].index.entries]
        assert any(g.across > 1 for g in grid)
        assert wrong(f.archives) == (len(cases), [])
    assert seen == {(a, b) for a in (True, False) for b in (True, False)}


@pytest.mark.parametrize("coder", ["bits", "lanes", "raw", "zstd"])
def test_codes_that_are_too_large(coder):
    a = ar.RacFile(BytesAccess((GOLDEN.parent / "bad" / f"groups-code-{coder}.rac").read_bytes(), "g")).archives[0]
    decoder = gpu.DeviceDecoder("cpu")
    for e in a.index.entries:
        t = ld.parse(a, a.record(e))
        (units,) = ld.read_units(a, t, [(0, len(t.units))])
        decoder.add(t, [u.data for u in units[: t.first]], units[t.first :])
    with pytest.raises(FormatError, match="larger than groups/1 allows"):
        decoder.flush()


@pytest.mark.slow
def test_long_golden_tensors():
    n, bad = wrong(golden(), lambda t: not is_short(t))
    assert n > 5
    assert not bad


KINDS = ("normal", "rows", "columns", "both", "constant", "two", "wild")


def array(kind, dtype, rows, cols, seed):
    """Words of a float type that look like weights, so that they go into lanes."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((rows, cols)).astype(np.float32)
    if kind in ("rows", "both"):
        v *= np.exp2(rng.integers(-6, 6, (rows, 1)))
    if kind in ("columns", "both"):
        v *= np.exp2(rng.integers(-4, 4, cols))
    if kind == "constant":
        v[:] = 0.5
    if kind == "two":
        v = np.where(v < 0, -1.0, 2.0).astype(np.float32)
    if kind == "wild":  # tops that are rare enough to escape
        v.flat[:: max(1, v.size // 5)] *= 1e5
    return v.astype(dtype)


@given(st.data())
@settings(
    deadline=None, max_examples=3, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
def test_tiles_of_any_shape(data):
    """Ragged lanes, one symbol, escapes, odd sizes, classes, planes of every width; an archive of many per example."""
    import ml_dtypes

    arrays = {}
    for i in range(12):
        dtype = data.draw(st.sampled_from(["f8", "f4", "f2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, "c8"]))
        kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(0, 1 << 32))
        rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(20, 90))
        name = f"{i} {kind}"
        arrays[name] = array(kind, np.dtype("f4") if dtype == "c8" else dtype, rows, 2 * cols, seed)
        arrays[name] = arrays[name].view("c8") if dtype == "c8" else arrays[name]
    lanes = data.draw(st.sampled_from([5, 16, 32, 33, 64]))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        most = data.draw(st.sampled_from([1 << 11, 1 << 20]))
        tiles.cut(patch, ((1, most), (2, 2 * most), (3, 1 << 62)))
        path = os.path.join(folder, "m.rac")
        pack_source(from_arrays(arrays, {}), path, level=data.draw(st.sampled_from(["default", "max"])), lanes=lanes)
        with ar.RacFile(path, threads=1) as f:
            n, bad = wrong(f.archives, ring=data.draw(st.sampled_from([1, 1 << 28])))
            assert n
            assert not bad


def test_stages_behind_the_trellis(tmp_path):
    maker = products.Maker(tmp_path / "m.rac")
    maker.object("u", products.quantised(products.words(1, 37, 37), 1, 3, 64))
    maker.object("a", products.exact(products.normal(2, 45, 3)))
    maker.object("b", products.exact(products.normal(3, 3, 37)))
    for dtype, states in (("BF16", 512), ("F16", 1), ("F32", 1024)):
        for uses in (["u"], ["a", "b"]):
            m = products.quantised(products.words(states, 45, 37), states, 4, states)
            maker.tensor(f"{dtype} {len(uses)}", dtype, m, uses)
    maker.finish()
    with ar.RacFile(tmp_path / "m.rac", threads=1) as f:
        assert wrong(f.archives) == (9, [])


def codes(kind, rows, cols, seed):
    """Words of a trellis: a normal law; three of them; or rows of other widths, and some words that are rare."""
    rng = np.random.default_rng(seed)
    v = rng.normal(0, 1.7, (rows, cols))
    if kind == "three":
        return (128 + np.sign(v) * (np.abs(v) > 1)).astype(np.uint8)
    if kind == "classes":
        v *= np.exp2(rng.integers(-1, 3, (rows, 1)))
    words = (128 + np.rint(v)).clip(0, 255)
    rare = rng.choice(words.size, words.size // 150, replace=False)
    words.flat[rare] = rng.integers(0, 256, len(rare))
    return words.astype(np.uint8)


def test_every_form_of_lanes_and_trellis(tmp_path, monkeypatch):
    """Tables in shared memory (32 lanes and more, two of 16) and not (fewer); few and many codes; escapes in quick
    rounds and in rows that are checked; numbers stored one by one and in pairs; programs of one and of many warps."""
    monkeypatch.delitem(ENCODERS, "zstd/1")  # lanes, whatever zstd would take
    maker, noted = products.Maker(tmp_path / "m.rac"), 0
    lanes = {2: 2, 3: 4, 8: 8, 11: 16, 16: 16, 32: 32, 40: 64}
    kinds = (("normal", "BF16", 64), ("three", "F16", 75), ("classes", "F32", 66))
    cases = [(n, 40, *kind) for n in lanes for kind in kinds[: 1 if n < 8 else 3]]
    cases += [(n, 300, *kinds[0]) for n in (8, 16, 32)]  # quick rounds need lanes of which eight words are left
    for i, (n, deep, kind, dtype, cols) in enumerate(cases):
        most = max(1200, deep * n)
        tiles.cut(monkeypatch, (*((k, k * most) for k in range(1, 5)), (5, 1 << 62)))
        level = replace(analyse.LEVELS["default"], lanes=n, fixed=True)
        words = codes(kind, max(4600, deep * n) // cols - i % 2, cols, i)
        m = products.quantised(words, i, states=(256, 512, 1024)[i % 3], level=level)
        assert isinstance(m.plan.coder, Lanes)
        noted += len(m.plan.coder.escapes)
        maker.tensor(f"{i}", dtype, m, [])
    maker.finish()
    assert noted
    seen, launch = set(), gpu.launch

    def seeing(launches, memories):
        for each in launches:
            o = dict(each.call.options)
            if each.call.kernel == "lanes":
                seen.add((each.call.kernel, o["LANES"], o["SPAN"]))
                seen.add(("codes", o["ENTRIES"]))
            elif each.call.kernel == "trellis":
                seen.add((each.call.kernel, o["COLS"], o["PAIRS"]))
        launch(launches, memories)

    monkeypatch.setattr(gpu, "launch", seeing)
    with ar.RacFile(tmp_path / "m.rac", threads=1) as f:
        assert wrong(f.archives) == (len(cases), [])
        monkeypatch.setattr(layout, "WIDE", 64)
        assert wrong(f.archives, lambda t: t.chain.coder.lanes == 40) == (3, [])
    assert {("lanes", n, span) for n, span in lanes.items()} < seen
    assert {("trellis", 64, True), ("trellis", 64, False), ("trellis", 1024, False)} < seen
    assert {("codes", n) for n in (16, 256)} <= seen


def one(tmp_path, **options):
    """An archive of one tensor of lanes, and what `add` takes."""
    path = str(tmp_path / "m.rac")
    pack_source(from_arrays({"w": array("both", "f4", 40, 64, 5)}, {}), path, lanes=32, **options)
    with ar.RacFile(path, threads=1) as f:
        a = f.archives[0]
        t = ld.parse(a, a.record(a.index.entries[0]))
        assert isinstance(t.chain.coder, Lanes)
        return t, [bytes(u) for u in ld.read_units(a, t, [(0, len(t.units))])[0]]


def test_a_file_is_loaded_with_its_ties(tmp_path, monkeypatch):
    a = torch.from_numpy(array("both", "f4", 40, 64, 7))
    tensors = {"a": a, "tied": a, "equal": a.clone(), "small": torch.arange(5), "none": torch.empty(0, 3)}
    path = str(tmp_path / "m.rac")
    pack_source(from_arrays(tensors, {}), path, lanes=32)
    monkeypatch.setattr(ar, "engine_for", lambda device, threads, *more: Gpu(gpu, "cpu", *more))
    with ar.RacFile(path, framework="pt") as f:
        got, one = f.load(), f.get_tensor("small")
    assert list(got) == list(tensors)
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in tensors.items())
    assert got["tied"] is got["a"]
    assert got["equal"].data_ptr() != got["a"].data_ptr()
    assert torch.equal(one, tensors["small"])


def test_the_operator_decodes_as_the_kernels_of_the_cpu(tmp_path, monkeypatch):
    from rac.gpu import op

    t, units = one(tmp_path, level="max")
    p = op.Packed(t, units[: t.first], units[t.first :])
    got = torch.ops.rac.decode(p.data, p.handle)
    p.check()
    monkeypatch.delenv("TRITON_INTERPRET")
    wanted = torch.ops.rac.decode(p.data, p.handle)
    assert got.dtype == wanted.dtype == torch.float32
    assert got.shape == wanted.shape == t.shape
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


def test_the_operator_reads_a_record_in_its_place(tmp_path):
    """Two tiles of BF16; behind the last there is less than a kernel may read, so that it is taken from a copy."""
    import ml_dtypes

    from rac.gpu import op

    path = str(tmp_path / "m.rac")
    given = array("rows", ml_dtypes.bfloat16, 128, 128, 5)
    with pytest.MonkeyPatch.context() as patch:
        tiles.cut(patch, ((2, 1 << 62),))
        pack_source(from_arrays({"w": given}, {}), path, lanes=32)
    with ar.RacFile(path, threads=1) as f:
        a = f.archives[0]
        e = a.index.entries[0]
        t = ld.parse(a, a.record(e))
        (units,) = ld.read_units(a, t, [(0, len(t.units))])
        record = np.empty(e.size, np.uint8)
        a.access.read_into(e.at, record.data)
    assert t.tiles > 1 and not op.frames(t)
    at = [t.record.payload - e.at + u.offset for u in t.units[t.first :]]
    p = op.Packed(t, [bytes(u) for u in units[: t.first]], units[t.first :], at=at)
    assert len(p.data) == op.SLACK
    data = torch.from_numpy(record)
    for _ in range(2):
        got = torch.ops.rac.decode(data, p.handle)
        assert got.view(torch.int16).numpy().tobytes() == given.tobytes()
    p.check()
    moved = data.clone()  # other memory: laid out anew
    assert torch.equal(torch.ops.rac.decode(moved, p.handle).view(torch.int16), got.view(torch.int16))


def test_damage_is_found_where_checksums_match(tmp_path):
    """A word of a lane changed: its state does not end at 0. An escape more or less: the counts differ."""
    t, units = one(tmp_path, level="max")
    unit, p = bytearray(units[t.first]), t.chain.coder
    parsed = ll.parse_tile(np.frombuffer(bytes(unit), np.uint8), t.grid.rows * t.grid.cols, p)
    assert len(parsed.escapes)
    at = up16(p.directory) + 4 * (len(parsed.words) // 2)
    unit[at] ^= 1
    decoder = gpu.DeviceDecoder("cpu")
    decoder.add(t, units[: t.first], [bytes(unit)], checked=True)
    with pytest.raises((ChecksumError, FormatError), match="'w'"):
        decoder.flush()
    decoder.flush()  # is told once
    with pytest.raises(ChecksumError, match="checksum"):
        decoder.add(t, units[: t.first], [bytes(unit)])


def test_no_tables_of_the_cpu_are_made(monkeypatch):
    """Look-up tables of lanes/1 and what words of trellis/1 stand for are made when the CPU first asks."""
    a = ar.RacFile(BytesAccess((GOLDEN / "trellis-fronts.rac").read_bytes(), "t"), threads=1).archives[0]
    parsed = [(e, ld.parse(a, a.record(e))) for e in a.index.entries if 0 not in e.shape]
    e, t = next((e, t) for e, t in parsed if isinstance(t.chain.coder, Lanes) and t.chain.numbers and is_short(t))
    made = []
    monkeypatch.setattr(tables, "lookup", lambda *_: made.append("look-up"))
    monkeypatch.setattr(trellis.native, "dequant", lambda *_: made.append("dequant"))
    (units,) = ld.read_units(a, t, [(0, len(t.units))])
    decoder = gpu.DeviceDecoder("cpu")
    decoder.add(t, [u.data for u in units[: t.first]], units[t.first :], ld.objects(a, t))
    decoder.flush()
    assert not made
    dec = Decoder(t, [u.data for u in units[: t.first]])
    assert dec.coder.lut() is None
    assert dec.numbers.fused is None
    assert made == ["look-up", "dequant"]


def test_tiles_that_are_missing(tmp_path):
    t, units = one(tmp_path, level="max")
    with pytest.raises(FormatError, match="0 of 1 tiles"):
        gpu.DeviceDecoder("cpu").add(t, units[: t.first], [])
    with pytest.raises(FormatError, match="size"):
        gpu.DeviceDecoder("cpu").add(t, units[: t.first], [units[t.first] + bytes(16)])


def test_an_escape_too_few(tmp_path):
    t, units = one(tmp_path, level="max")
    unit, p = bytearray(units[t.first]), t.chain.coder
    count = int.from_bytes(unit[:4], "little")
    assert count % 16 not in (0, 1)  # one byte less and its padding have the same size
    at = (
        up16(p.directory) + up16(4 * int(np.frombuffer(bytes(unit[4 + p.skip : p.directory]), "<u2").sum())) + count - 1
    )
    unit[:4], unit[at] = (count - 1).to_bytes(4, "little"), 0
    decoder = gpu.DeviceDecoder("cpu")
    decoder.add(t, units[: t.first], [bytes(unit)], checked=True)
    with pytest.raises(FormatError, match="escape counts"):
        decoder.flush()
