"""Low-rank parts, PCA bases and the scalar quantiser: what they cost, and whole files with them."""

from __future__ import annotations

import io
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rac
from rac import cli
from rac.align import pca
from rac.calibrate.layers import Layer, Layers
from rac.container.access import BytesAccess
from rac.container.reader import Archive
from rac.decode.unpack import quantised
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.align.choose import choose, choose_rank
from rac.encode.allocate import budget
from rac.encode.options import Budget, Calibration, Lossy
from rac.encode.pack import pack_source
from rac.encode.quantise import trellis as lossy
from rac.encode.quantise.tensor import code, encode, encode_with_words, size_of
from rac.encode.sources import from_arrays
from rac.errors import BudgetError
from rac.native import trellis as native
from rac.records import Limits
from rac.registry import RECORD_OBJECT
from rac.split import low_rank
from rac.stages.table import is_quantised
from solve import solve


def moment(n, seed):
    """Inputs that are strongly correlated."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * n, n)) @ rng.standard_normal((n, n)) * np.geomspace(1, 30, n)
    return (x.T @ x / len(x)).astype(np.float32)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cost(e, s):
    return float(np.einsum("ij,jk,ik->", e, np.asarray(s, np.float64), e))


# the functions


@pytest.mark.parametrize(("shape", "rank"), [((60, 40), 1), ((60, 40), 7), ((30, 90), 5), ((9, 20), 9), ((20, 9), 9)])
def test_low_rank_is_the_truncated_svd(shape, rank):
    w, s = normal(1, *shape), moment(shape[1], 2).astype(np.float64)
    values = np.linalg.svd(w @ np.linalg.cholesky(s), compute_uv=False)
    a, b = low_rank(w, s, rank)
    assert (a.shape, b.shape) == ((shape[0], rank), (rank, shape[1]))
    rest = float((values[rank:] ** 2).sum())
    assert cost(w - a @ b, s) == pytest.approx(rest, rel=1e-5, abs=1e-9 * float((values**2).sum()))
    assert np.allclose(np.linalg.norm(a, axis=0), values[:rank], rtol=1e-4)


def test_low_rank_of_what_has_no_more():
    """Inputs of few directions, and a rank that a matrix does not have."""
    x = np.random.default_rng(3).standard_normal((3, 12))
    w = normal(1, 20, 12)
    a, b = low_rank(w, x.T @ x, 5)
    assert cost(w - a @ b, x.T @ x) < 1e-9 * cost(w, x.T @ x)
    assert np.isfinite(b).all() and not b[3:].any()
    for rank in (0, 13):
        with pytest.raises(ValueError, match="rank"):
            low_rank(w, np.eye(12), rank)


def test_pca():
    s = moment(30, 1)
    p = pca(s, 0.0)
    assert np.allclose(p.basis @ p.basis.T, np.eye(30), atol=1e-9)
    assert np.allclose(p.basis @ s.astype(np.float64) @ p.basis.T, np.diag(p.weight**2), atol=1e-6 * p.weight[-1] ** 2)
    assert (np.diff(p.weight) >= 0).all() and (pca(np.zeros((3, 3)), 0.1).weight > 0).all()


# the scalar quantiser


def scalar(x, rec, rate):
    """Twin of the kernel, in float32 too."""
    most = len(rec) // 2
    k = np.clip(np.floor(x + np.float32(0.5)), -most, most).astype(np.int64)
    inner = k - np.sign(k)
    e, f = x - rec[k + most], x - rec[inner + most]
    return np.where(f * f + rate[inner + most] < e * e + rate[k + most], inner, k)


def test_scalar_kernel_and_numpy_agree():
    rng = np.random.default_rng(1)
    most = 9
    rec = (np.arange(-most, most + 1) + rng.integers(-20, 21, 2 * most + 1) / 64).astype(np.float32)
    x = (4 * rng.standard_normal((1, 3000))).astype(np.float32)
    x[0, :4] = 0.5, -0.5, 1.5, 40
    rate = rng.random((1, 2, 2 * most + 1)).astype(np.float32)
    row = rng.integers(0, 2, 3000).astype(np.uint8)
    search = native.Search(1, (0, 0), 70, rec, rate, most + 0.5, row=row)
    k, value, wild, _ = native.block(search, x, x.copy(), np.zeros((1, 1), np.float32), np.ones(1, np.float32))
    expected = np.where(row, scalar(x[0], rec, rate[0, 1]), scalar(x[0], rec, rate[0, 0]))
    assert k[0].tolist() == expected.tolist()
    assert (value[0] == np.where(wild[0], x[0], rec[expected + most])).all()
    assert (wild[0] == (np.abs(x[0]) > most + 0.5)).all() and wild.any()


def test_scalar_stands_a_quarter_bit_from_the_bound():
    n = 512
    w = normal(0, n, n)
    flat = lossy.Scales(np.zeros(n, np.int8), np.zeros(n, np.int8))
    distance = {}
    for states, scale in ((1, -1.0), (8, -2.0)):
        for passes in (1, 2):
            q = lossy.quantise(w, "F32", scale, flat, lossy.Effort(states, passes))
            bits = 8 * sum(map(len, q.coded()[1])) / w.size
            assert 2.8 < bits < 3.2
            distance[states] = bits + 0.5 * math.log2(float(((q.dense.view(np.float32) - w) ** 2).mean()))
    assert 0.25 < distance[1] < 0.30
    assert distance[8] < distance[1] - 0.15


def test_scalar_outliers_and_low_rates():
    w = normal(4, 128, 96)
    w[5, 7], w[100, 20] = 3000.0, -70000.0
    flat = lossy.Scales(np.zeros(128, np.int8), np.zeros(96, np.int8))
    dense = lossy.quantise(w, "F32", -1.0, flat, lossy.Effort(1)).dense.view(np.float32)
    assert (dense[5, 7], dense[100, 20]) == (3000.0, -70000.0)
    assert np.abs(dense - w).max() < 1
    low = lossy.quantise(normal(5, 128, 96), "F32", 1.0, flat, lossy.Effort(1))
    assert ((low.dense.view(np.float32) - normal(5, 128, 96)) ** 2).mean() < 1


# how much a low-rank part costs


def one(w, s, rate, rank=0, align="triangular"):
    """(bytes, output error) of a matrix at the scale of `rate`."""
    groups = ties.find(from_arrays({"w": w}).tensors)
    recipe = choose(rcp.calibrated(groups, {"w": Layer(s, None)}, (), "fast"), groups, rank, align, rate)
    recipe = replace(recipe, scale=1.03 - rate)
    encoded, words = encode_with_words(groups[0], recipe)
    return size_of(encoded, recipe), cost(words.view(np.float32).astype(np.float64) - w, s)


def test_all_alignments_and_ranks_leave_the_same_error():
    """Units of factors, bases and residuals are such that errors add up to what the scale says."""
    w, s = normal(1, 300, 128), moment(128, 2)
    s += 10 * np.eye(128, dtype=np.float32) * np.trace(s) / 128  # what is damped is seen
    plain = one(w, s, 3)[1]
    for rank, align in ((1, "triangular"), (8, "triangular"), (0, "pca"), (0, "identity")):
        assert one(w, s, 3, rank, align)[1] == pytest.approx(plain, rel=0.1), (rank, align)


def test_rank_pays_where_there_is_a_strong_part():
    """`choose_rank` against the real bytes of all ranks; noise gets none."""
    w, s = normal(1, 400, 256), moment(256, 2)
    strong = w + 3 * normal(3, 400, 4) @ normal(4, 4, 256)
    for m, expected in ((w, {0}), (strong, {4})):
        groups = ties.find(from_arrays({"w": m}).tensors)
        recipe = rcp.calibrated(groups, {"w": Layer(s, None)}, (), "fast")
        assert choose_rank(m, recipe.aligned["w"], 3.0) in expected
        assert {choose(recipe, groups, None, "auto", 3.0).aligned["w"].rank} == expected
        sizes = {rank: one(m, s, 3, rank)[0] for rank in (0, 2, 4, 8)}
        assert min(sizes, key=lambda r: sizes[r]) in expected


def test_pca_pays_only_where_many_rows_share_a_basis():
    n = 48
    s = moment(n, 1)
    p = pca(s, rcp.DAMP)
    # Weights that are small where inputs are large, which no column alone shows
    tall = (normal(2, 3000, n) * np.geomspace(10, 0.1, n) @ p.basis).astype(np.float32)
    for w, expected in ((tall, "pca"), (tall[: 15 * n], "triangular"), (normal(3, 3000, n), "triangular")):
        groups = ties.find(from_arrays({"w": w}).tensors)
        recipe = rcp.calibrated(groups, {"w": Layer(s, None)}, (), "fast")
        assert choose(recipe, groups, None, "auto", 2.0).aligned["w"].alignment == expected
    (turned, error), (plain, expected) = one(tall, s, 2.0, 0, "pca"), one(tall, s, 2.0)
    assert turned < 0.7 * plain and error == pytest.approx(expected, rel=0.1)


# whole files


DTYPES = {"F32": np.float32, "F16": np.float16}


def model():
    """Three layers of one input, two of others, one that is not calibrated, one that stays lossless."""
    s, other = moment(96, 1), moment(160, 2)
    tensors = {
        "q.weight": normal(1, 200, 96),
        "k.weight": normal(2, 180, 96).astype(np.float16),
        "o.weight": normal(3, 160, 160),
        "norm.weight": normal(4, 50),
        "v.weight": normal(5, 190, 96),
        "p.weight": normal(6, 128, 160).astype(np.float16),
        "unknown.weight": normal(7, 150, 130),
    }
    tensors["tied.weight"] = tensors["q.weight"]
    layers = {f"{n}.weight": Layer(s.copy(), None) for n in "qkv"} | {f"{n}.weight": Layer(other, None) for n in "op"}
    layers["p.weight"] = Layer(moment(160, 9), np.geomspace(1, 16, 128))
    return from_arrays(tensors), layers


WAYS = {"rank": (3, "triangular"), "pca": (0, "pca"), "identity": (0, "identity")}


def recipe_of(way, scale=-2.0):
    source, layers = model()
    groups = ties.find(source.tensors)
    recipe = choose(rcp.calibrated(groups, layers, (), "fast"), groups, *WAYS[way], 3.0)
    return source, groups, replace(recipe, scale=scale)


@pytest.fixture(params=["rank", "pca"])
def made(request, tmp_path):
    """(source, groups, recipe, path) of a packed file."""
    source, groups, recipe = recipe_of(request.param)
    pack_source(source, tmp_path / "m.rac", recipe=recipe, jobs=2)
    return source, groups, recipe, tmp_path / "m.rac"


def test_files_have_what_was_coded(made, tmp_path):
    source, groups, recipe, path = made
    data = path.read_bytes()
    coded = {g.tensor.name: code(g.tensor, recipe) for g in groups if g.tensor.name in recipe.aligned}
    assert len(coded) == 6
    for back in (rac.load_file(path), dict(rac.iter_tensors(io.BytesIO(data))), rac.load(data)):
        for name, c in coded.items():
            assert back[name].tobytes() == c.dense.tobytes(), name
        assert back["tied.weight"].tobytes() == back["q.weight"].tobytes()
    rac.unpack(path, tmp_path / "back.safetensors")
    back = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "back.safetensors")
    assert all(back[name].tobytes() == c.dense.tobytes() for name, c in coded.items())
    assert rac.verify(path).lossy == 7  # names


def test_every_byte_counts_once(made):
    _, groups, recipe, path = made
    entries = Archive(BytesAccess(path.read_bytes())).index.entries
    mine = [g for g in groups if g.tensor.name in recipe.aligned]
    size = sum(size_of(encode(g, recipe), recipe) for g in mine)
    assert quantised(entries) == (6, 8 * size / sum(g.tensor.shape[0] * g.tensor.shape[1] for g in mine))
    objects = [e.name for e in entries if e.type == RECORD_OBJECT]
    if any(a.rank for a in recipe.aligned.values()):
        assert sorted(objects) == sorted(f"{n}.weight.{m}" for n in "qkvop" for m in "AB")
    else:
        assert objects == ["q.weight.U", "o.weight.U", "p.weight.U"]
    names = [e.name for e in entries]
    for name in objects:
        assert names.index(name) < names.index(name[:-2])


def test_any_number_of_jobs(made, tmp_path):
    source, _, recipe, path = made
    told = []
    for jobs in (1, 3):
        told.append(pack_source(source, tmp_path / f"{jobs}.rac", recipe=recipe, jobs=jobs).fidelity)
        assert (tmp_path / f"{jobs}.rac").read_bytes() == path.read_bytes()
    assert [f.name for f in told[0]] == [f.name for f in told[1]]
    for f in told[0]:
        a = recipe.aligned[f.name]
        assert (f.rank, f.alignment) == (a.rank, a.alignment if a.layer else "identity")
    entries = Archive(BytesAccess(path.read_bytes())).index.entries
    lossy_entries = [e for e in entries if e.type == RECORD_OBJECT or is_quantised(e.method)]
    assert sum(f.size for f in told[0]) == sum(e.size for e in lossy_entries)


def test_places_to_stop(made, tmp_path):
    source, groups, recipe, path = made
    whole = path.read_bytes()
    index = Archive(BytesAccess(whole)).index
    tensors = [e.type != RECORD_OBJECT for e in index.entries]
    out = tmp_path / "again.rac"
    for n, extra in [(1, 0), (1, 100), (2, 0), (3, 100), (len(tensors) - 1, 0), (len(tensors) - 3, 0)]:
        out.unlink(missing_ok=True)
        Path(f"{out}.part").write_bytes(whole[: index.entries[n].at + extra])
        done = pack_source(source, out, recipe=recipe, resume=True)
        assert out.read_bytes() == whole
        assert done.resumed == sum(tensors[:n])


def test_shards(made, tmp_path):
    """Each has the objects that its tensors use; a finished one is known again."""
    source, groups, recipe, path = made
    done = pack_source(source, tmp_path / "s.rac", recipe=recipe, shard_size=170_000)
    assert len(done.paths) > 2
    data = [Path(p).read_bytes() for p in done.paths]
    assert sum(b"q.weight.U" in d for d in data) in (0, 2)
    whole = rac.load_file(path)
    for name, array in rac.load_file(tmp_path / os.path.basename(done.paths[0])).items():
        assert array.tobytes() == whole[name].tobytes()
    Path(done.paths[1]).unlink()
    again = pack_source(source, tmp_path / "s.rac", recipe=recipe, shard_size=170_000, resume=True)
    assert [Path(p).read_bytes() for p in again.paths] == data
    assert again.resumed >= 1


@pytest.mark.parametrize("way", WAYS)
def test_bits_are_met_with_objects(tmp_path, way):
    source, groups, recipe = recipe_of(way)
    recipe = solve(groups, recipe, Budget(bits=4.5), 2)
    done = pack_source(source, tmp_path / "m.rac", recipe=recipe)
    assert 4.5 * 0.995 <= done.quantised_bits <= 4.5


def test_asked_for_at_the_command_line(tmp_path, monkeypatch, capsys):
    """`rac pack` and `rac.pack` with what a calibration would find; --resume knows the same settings again."""
    save = pytest.importorskip("safetensors.numpy").save_file
    save({"q.weight": normal(1, 200, 96), "k.weight": normal(2, 180, 96)}, tmp_path / "m.safetensors")
    (tmp_path / "text").write_text("some text")
    found = Layers({f"{n}.weight": Layer(moment(96, 1), None) for n in "qk"}, 7, "0" * 32)
    monkeypatch.setattr(budget, "calibrate", lambda *_, **__: found)
    start = [str(tmp_path / "m.safetensors"), "--calibrate", str(tmp_path / "text"), "--effort", "fast"]
    for name, more, asked in (
        ("rank", ["--low-rank", "2"], {"rank": 2}),
        ("pca", ["--align", "pca"], {"align": "pca"}),
        ("auto", ["--align", "auto", "--low-rank", "auto"], {}),
    ):
        out = tmp_path / f"{name}.rac"
        assert cli.main(["pack", *start, "-o", str(out), "--bits", "5", "--cache", "none", *more]) == 0
        data = out.read_bytes()
        origin = Archive(BytesAccess(data)).header["provenance"]
        assert {k: origin[k] for k in ("align", "rank") if k in origin} == asked
        args = {"bits": 5.0, "calibrate": tmp_path / "text", "effort": "fast", **asked}
        done = rac.pack(tmp_path / "m.safetensors", tmp_path / "n.rac", force=True, **args)
        assert (tmp_path / "n.rac").read_bytes() == data
        assert {f.rank for f in done.fidelity} == {asked.get("rank", 0)}
        assert {f.alignment for f in done.fidelity} == {asked.get("align", "triangular")}
    for wrong in (["--low-rank", "x"], ["--low-rank", "-1"], ["--align", "none"]):
        with pytest.raises(SystemExit):
            cli.main(["pack", *start, "-o", str(out), "--bits", "5", *wrong])
    assert cli.main(["pack", start[0], "-o", str(out), "--force", "--low-rank", "2"]) != 0
    assert "--bits" in capsys.readouterr().err


def test_what_is_refused(monkeypatch):
    for wrong in ({"rank": -1}, {"align": "some"}, {"rank": 2, "align": "pca"}, {"rank": 2, "align": "identity"}):
        with pytest.raises(ValueError, match="rank|alignment"):
            Lossy(Budget(bits=3), Calibration(("text",)), **wrong)
    for wrong in ({"rank": 2}, {"align": "pca"}, {"align": "triangular"}):
        with pytest.raises(ValueError, match="--calibrate"):
            Lossy(Budget(bits=3), **wrong)
    about = Lossy(Budget(bits=3), Calibration(("text",)), rank=0, align="pca").about
    assert about == {"align": "pca", "rank": 0, "goal": {"bits": "3"}}
    assert Lossy(Budget(bits=3)).about.keys() == {"goal"}
    monkeypatch.setattr("rac.encode.align.choose.Limits", lambda: Limits(objects=1000))
    with pytest.raises(BudgetError, match="readers"):
        recipe_of("pca")
    recipe_of("identity")
