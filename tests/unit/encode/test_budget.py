"""Lossy packs: budgets in real bytes, what is kept, the same bytes for any number of jobs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rac
from rac.calibrate.layers import Layer
from rac.cli import main
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.options import Budget, Calibration, Lossy
from rac.encode.pack import pack, pack_source
from rac.encode.quantise import trellis as lossy
from rac.encode.quantise.tensor import code, snr
from rac.encode.sources import from_arrays
from rac.encode.verify import verify
from rac.errors import BudgetError, OutputError
from rac.linalg.triangular import triangular
from rac.stages import trellis as tr
from solve import solve


def model(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((200, 384)).astype(dtype),
        "b.weight": (0.02 * rng.standard_normal((384, 260))).astype(dtype),
        "embed.weight": rng.standard_normal((300, 64)).astype(dtype),
        "norm.weight": np.ones(384, dtype),
        "small.weight": rng.standard_normal((8, 8)).astype(dtype),
        "steps": np.arange(70000),
    }


def source_file(path, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


def lossy_bits(path):
    archive = Archive(FileAccess(path))
    mine = [e for e in archive.index.entries if e.method == "trellis/1"]
    archive.close()
    return 8 * sum(e.size for e in mine) / sum(int(np.prod(e.shape)) for e in mine), {e.name for e in mine}


@pytest.mark.parametrize("bits", [2.0, 3.0, 5.0])
def test_bits_are_met_in_real_bytes(tmp_path, bits):
    src, tensors = source_file(tmp_path / "m.safetensors", model()), model()
    done = pack(src, tmp_path / "m.rac", bits=bits, embeddings=False)
    got, names = lossy_bits(tmp_path / "m.rac")
    assert names == {"a.weight", "b.weight"}
    assert bits * 0.995 <= got <= bits
    assert (done.quantised, done.quantised_bits) == (2, got)
    back = rac.load_file(tmp_path / "m.rac")
    for name, array in tensors.items():
        if name not in names:
            assert back[name].tobytes() == array.tobytes()
            continue
        error = ((back[name] - array) ** 2).mean() / array.var()
        # within a tenth of a bit of the bound of a Gaussian, and what small matrices pay for their tables
        assert got + 0.5 * np.log2(error) < 0.12
    assert verify(tmp_path / "m.rac").lossy == 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_types_and_jobs(tmp_path, dtype):
    arrays = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in model().items()}
    source = from_arrays(arrays)
    groups = ties.find(source.tensors)
    recipe = solve(groups, rcp.data_free(groups, (), "fast"), Budget(bits=4), 2)
    for jobs in (1, 3):
        pack_source(source, tmp_path / f"{jobs}.rac", recipe=recipe, jobs=jobs)
    assert (tmp_path / "1.rac").read_bytes() == (tmp_path / "3.rac").read_bytes()
    back = rac.load_file(tmp_path / "1.rac")
    assert back["a.weight"].dtype == arrays["a.weight"].dtype
    a, b = back["a.weight"].astype(np.float32), arrays["a.weight"].astype(np.float32)
    assert ((a - b) ** 2).mean() < 0.006
    with rac.open(tmp_path / "1.rac") as f:
        assert (f.get_slice("a.weight")[20:70, 5:9] == back["a.weight"][20:70, 5:9]).all()


def test_size_and_file_bits(tmp_path):
    src = source_file(tmp_path / "m.safetensors", model())
    pack(src, tmp_path / "size.rac", size=150_000)
    assert 0.985 * 150_000 <= (tmp_path / "size.rac").stat().st_size <= 150_000
    weights = sum(v.size for v in model().values())
    pack(src, tmp_path / "bits.rac", file_bits=5.0)
    assert 4.9 <= 8 * (tmp_path / "bits.rac").stat().st_size / weights <= 5.0


@pytest.mark.parametrize("level", ["fast", "default"])
def test_everything_in_the_file_counts(tmp_path, level):
    """Attachments, and lossless tensors at the level that is asked for."""
    source_file(tmp_path / "model.safetensors", model())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes(np.random.default_rng(1).bytes(40_000).hex().encode())
    pack(tmp_path, tmp_path / "m.rac", size=190_000, level=level)
    assert 0.97 * 190_000 <= (tmp_path / "m.rac").stat().st_size <= 190_000


class Stop(Exception):
    pass


def stop(name, _):
    """As progress: ends a pack of `model` in its middle."""
    if name == "b.weight":
        raise Stop


def test_resume_gives_the_same_bytes(tmp_path):
    source = from_arrays(model())
    groups = ties.find(source.tensors)
    recipe = solve(groups, rcp.data_free(groups, (), "fast"), Budget(bits=3), 2)
    pack_source(source, tmp_path / "whole.rac", recipe=recipe)

    with pytest.raises(Stop):
        pack_source(source, tmp_path / "m.rac", recipe=recipe, progress=stop)
    done = pack_source(source, tmp_path / "m.rac", recipe=recipe, resume=True)
    assert done.resumed >= 2
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "whole.rac").read_bytes()


def test_what_is_kept(tmp_path):
    src = source_file(tmp_path / "m.safetensors", model())
    pack(src, tmp_path / "m.rac", bits=3, keep=("b.*",))
    assert lossy_bits(tmp_path / "m.rac")[1] == {"a.weight", "embed.weight"}
    with pytest.raises(BudgetError, match="3 are kept by --keep"):
        pack(src, tmp_path / "n.rac", bits=3, keep=("*",))


def test_budgets_that_cannot_be_met(tmp_path):
    src = source_file(tmp_path / "m.safetensors", model())
    with pytest.raises(BudgetError, match="the nearest is"):
        pack(src, tmp_path / "m.rac", bits=0.001)
    with pytest.raises(BudgetError, match="stays lossless"):
        pack(src, tmp_path / "m.rac", size=1000)
    for wrong in ({}, {"bits": 3, "size": 5}, {"bits": -1}, {"bits": 3, "effort": "some"}):
        with pytest.raises(ValueError, match="give one|effort|above 0"):
            Lossy(Budget(**{k: v for k, v in wrong.items() if k != "effort"}), effort=wrong.get("effort", "fast"))
    with pytest.raises(ValueError, match="none is no text"):
        Calibration(("a.txt", "none"))
    with pytest.raises(ValueError, match="first calibration text"):
        Lossy(Budget(kl=0.1), Calibration(("self", "a.txt")))
    (tmp_path / "m.rac").write_bytes(b"x")
    with pytest.raises(OutputError, match="exists"):
        pack(src, tmp_path / "m.rac", bits=3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, value):
    tensors = model()
    tensors["a.weight"][3, 4] = value
    src = source_file(tmp_path / "m.safetensors", tensors)
    done = pack(src, tmp_path / "m.rac", bits=3)
    assert ("with NaN or infinity", ("a.weight",)) in [(one.why, one.names) for one in done.lossless]
    assert rac.load_file(tmp_path / "m.rac")["a.weight"].tobytes() == tensors["a.weight"].tobytes()


def test_super_weights_come_back_exactly(tmp_path):
    w = np.random.default_rng(2).standard_normal((128, 256)).astype(np.float32)
    w[5, 7], w[100, 200] = 3000.0, -70000.0
    r, c = w.shape
    scales = lossy.Scales(np.zeros(r, np.int8), np.zeros(c, np.int8))
    q = lossy.quantise(w, "F32", -1.5, scales, lossy.Effort(256, 2))
    dense = q.dense.view(np.float32)
    assert (dense[5, 7], dense[100, 200]) == (3000.0, -70000.0)
    assert abs(dense - w).max() < 2


def second_moment(n, seed):
    """Inputs that are strongly correlated."""
    x = np.random.default_rng(seed).standard_normal((4 * n, n)) @ np.random.default_rng(seed + 1).standard_normal(
        (n, n)
    )
    x *= np.geomspace(1, 30, n)
    return (x.T @ x / len(x)).astype(np.float32)


def test_triangular_recursion():
    s = second_moment(48, 3)
    r = triangular(s, damp=0.0)
    p = s[np.ix_(r.order, r.order)].astype(np.float64)
    lower = (np.eye(48) + r.feed.astype(np.float64)).T * r.weight
    assert np.allclose(lower @ lower.T, p, rtol=1e-3, atol=1e-3 * p.max() / 48)
    assert (np.diff(np.diag(s)[r.order]) >= 0).all()


def test_alignment_pays():
    """At the same rate the triangular recursion leaves a fraction of the output error of plain quantisation."""
    s = second_moment(96, 5)
    w = np.random.default_rng(6).standard_normal((400, 96)).astype(np.float32)
    source = from_arrays({"w": w})
    groups = ties.find(source.tensors)

    error = {}
    for name, recipe in {
        "plain": rcp.data_free(groups, (), "default"),
        "triangular": rcp.calibrated(groups, {"w": Layer(s, None)}, (), "default"),
    }.items():
        solved = solve(groups, recipe, Budget(bits=3.2), 2)
        q = code(groups[0].tensor, solved).quantised
        e = q.dense.view(np.float32).astype(np.float64) - w
        error[name] = float(np.einsum("ij,jk,ik->", e, s.astype(np.float64), e))
    assert error["triangular"] < 0.5 * error["plain"]


@pytest.mark.parametrize("turned", [False, True])
def test_experts_with_inputs_of_their_own(turned):
    """Better at the same size than one second moment for all, and what a decoder restores is what was measured."""
    seconds = [second_moment(96, i) * 4**i for i in (1, 2, 3)]
    mean = np.mean(seconds, 0, dtype=np.float32)
    w = np.random.default_rng(6).standard_normal((3, 200, 96)).astype(np.float32)
    w = np.ascontiguousarray(w.swapaxes(1, 2)) if turned else w
    groups = ties.find(from_arrays({"w": w}).tensors)
    own = [Layer(s, np.linspace(1, 2, 200) * 3**i, turned) for i, s in enumerate(seconds)]
    of_all = np.concatenate([one.sensitivity for one in own])
    found = {}
    for name, each in (("own", own), ("shared", [Layer(mean, one.sensitivity, turned) for one in own])):
        recipe = rcp.calibrated(groups, {"w": Layer(mean, of_all, turned, True, each)}, (), "default")
        assert recipe.aligned["w"].layer is not None
        solved = solve(groups, recipe, Budget(bits=3.2), 2)
        e = (code(groups[0].tensor, solved).dense.view(np.float32).reshape(w.shape) - w).astype(np.float64)
        e = e.swapaxes(1, 2) if turned else e
        found[name] = sum(
            np.einsum("i,ij,jk,ik->", one.sensitivity, e[i], one.second, e[i]) for i, one in enumerate(own)
        )
    assert found["own"] < 0.8 * found["shared"]


def test_what_calibration_did_not_reach_is_named():
    source = from_arrays({k: v for k, v in model().items() if v.dtype.kind == "f"})
    groups = ties.find(source.tensors)

    layers = {
        "a.weight": Layer(np.eye(384, dtype=np.float32), None),
        "b.weight": Layer(np.eye(7, dtype=np.float32), None),
    }
    recipe = rcp.calibrated(groups, layers, (), "fast")
    assert recipe.unreached == ("b.weight",)
    assert recipe.aligned["b.weight"].base == rcp.data_free(groups, (), "fast").aligned["b.weight"].base
    assert rcp.calibrated(groups, {}, (), "fast").unreached == ("a.weight", "b.weight")


def test_rows_that_count_more_are_finer():
    w = np.random.default_rng(7).standard_normal((128, 128)).astype(np.float32)
    source = from_arrays({"w": w})
    groups = ties.find(source.tensors)

    sensitivity = np.ones(128)
    sensitivity[:64] = 64.0
    layers = {"w": Layer(np.eye(128, dtype=np.float32), sensitivity)}
    less = tr.power(rcp.calibrated(groups, layers, (), "default").aligned["w"].scales.rows)
    assert less[64] / less[0] == pytest.approx(8 ** rcp.Sample().trust, rel=0.1)
    recipe = rcp.calibrated(groups, layers, (), "default", sample=rcp.Sample(trust=1.0))
    q = code(groups[0].tensor, solve(groups, recipe, Budget(bits=4), 1)).quantised
    e = (q.dense.view(np.float32) - w) ** 2
    assert e[64:].mean() > 30 * e[:64].mean()
    assert (tr.power(recipe.aligned["w"].scales.rows)[64] / tr.power(recipe.aligned["w"].scales.rows)[0]) == 8


def test_inputs_that_are_rows():
    """Weights stored (in, out), as GPT-2's, gain as much from their calibration as the others."""
    n = 192
    w = np.random.default_rng(5).standard_normal((256, n)).astype(np.float32)
    s = second_moment(n, 6)
    found = {}
    for transposed in (False, True):
        groups = ties.find(from_arrays({"w": np.ascontiguousarray(w.T) if transposed else w}).tensors)
        layers = {"w": Layer(s, np.geomspace(1, 4, 256), transposed)}
        recipe = solve(groups, rcp.calibrated(groups, layers, (), "default"), Budget(bits=3.2), 1)
        q = code(groups[0].tensor, recipe).quantised
        found[transposed] = snr(groups[0].tensor, q.dense, recipe)
        even = solve(groups, rcp.data_free(groups, (), "default"), Budget(bits=3.2), 1)
        plain = snr(groups[0].tensor, code(groups[0].tensor, even).dense, recipe)
        assert found[transposed] > plain + 6
    assert abs(found[True] - found[False]) < 0.8


def test_embeddings_too(tmp_path):
    src = source_file(tmp_path / "m.safetensors", model())
    done = pack(src, tmp_path / "m.rac", bits=4)
    bits = {f.name: f.bits for f in done.fidelity}
    assert bits.keys() == {"a.weight", "b.weight", "embed.weight"}
    assert bits["embed.weight"] > bits["a.weight"] + 0.7
    done = pack(src, tmp_path / "m.rac", bits=4, embeddings=False, force=True)
    assert done.quantised == 2 and any("(--no-embeddings)" in one.why for one in done.lossless)
    for name in ("--embeddings", "--no-embeddings"):
        both = ["pack", str(src), "-o", str(tmp_path / f"{name}.rac"), "--bits", "4", "--calibrate", "none", name]
        assert main(both) == 0
    sizes = [(tmp_path / f"{name}.rac").stat().st_size for name in ("--embeddings", "--no-embeddings")]
    assert sizes[1] == (tmp_path / "m.rac").stat().st_size > sizes[0]


def test_tables_get_bits_by_what_their_errors_cost():
    """An error of a unit costs the same in all, and tables get more; where no gradient has told, one bit more."""
    rng = np.random.default_rng(3)
    arrays = {"a.weight": rng.standard_normal((256, 64)), "embed.weight": rng.standard_normal((300, 64)) / 8}
    groups = ties.find(from_arrays({k: v.astype(np.float32) for k, v in arrays.items()}).tensors)
    second = np.eye(64, dtype=np.float32)
    layers = {"a.weight": Layer(second, np.full(256, 3.0)), "embed.weight": Layer(second, np.full(300, 48.0))}
    a, table = rcp.calibrated(groups, layers, (), "fast", embeddings=True).aligned.values()
    assert not a.scales.rows.any() and not table.scales.rows.any()
    assert abs((a.base - table.base) - (np.log2(4) + 0.7)) < 1e-9
    layers["a.weight"] = Layer(second, None)
    a, table = rcp.calibrated(groups, layers, (), "fast", embeddings=True).aligned.values()
    deviations = [np.log2(np.sqrt((w**2).mean(0))).mean() for w in arrays.values()]
    assert abs((a.base - table.base) - (deviations[0] - deviations[1] + 1)) < 1e-3


def test_lanes_of_quantised_tensors(tmp_path):
    src = source_file(tmp_path / "m.safetensors", {"w": model()["a.weight"]})
    for lanes in (4, 64):
        pack(src, tmp_path / "m.rac", bits=4, effort="fast", lanes=lanes, force=True)
        archive = Archive(FileAccess(tmp_path / "m.rac"))
        assert archive.record(archive.index.entries[0]).head["stages"][0]["lanes"] == lanes
        archive.close()


def test_resume_goes_on_only_with_what_was_asked(tmp_path):
    """The scale is taken from the part of the same request; another --keep begins anew."""
    src = source_file(tmp_path / "m.safetensors", model())
    want = {"bits": 3.0, "effort": "fast", "calibrate": "none"}
    pack(src, tmp_path / "whole.rac", **want)

    with pytest.raises(Stop):
        pack(src, tmp_path / "m.rac", progress=stop, **want)
    said = []
    done = pack(src, tmp_path / "m.rac", resume=True, note=lambda what, *_: said.append(what), **want)
    assert done.resumed > 0 and not said
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "whole.rac").read_bytes()
    with pytest.raises(Stop):
        pack(src, tmp_path / "n.rac", progress=stop, **want)
    done = pack(
        src, tmp_path / "n.rac", resume=True, keep=("a.weight",), note=lambda what, *_: said.append(what), **want
    )
    assert done.resumed == 0 and said
    assert [f.name for f in done.fidelity] == ["b.weight", "embed.weight"]
