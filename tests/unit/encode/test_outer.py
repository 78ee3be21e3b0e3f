"""Second moments of the gradients at outputs: what of them is chance, and errors that are fed back along rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import rac
from rac.calibrate.file import load
from rac.calibrate.layers import Layer, Layers, joined
from rac.calibrate.outer import Outer
from rac.calibrate.sketch import sketch
from rac.cli import main
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.align.choose import choose
from rac.encode.allocate.few import few
from rac.encode.allocate.made import matched
from rac.encode.options import Budget
from rac.encode.quantise.tensor import SHAPED, code, encode
from rac.encode.sources import from_arrays
from rac.errors import SourceError
from rac.ranks.units import seen_of, told
from solve import solve

N, WIDTH = 192, 128
FED = rcp.Sample(rows=True)


def mixed(seed, n=N, directions=12):
    """What makes gradients (tokens, n) of independent numbers (tokens, n): a few directions are most of them."""
    rng = np.random.default_rng(seed)
    return np.eye(n) + 2 * rng.standard_normal((n, directions)) @ rng.standard_normal((directions, n)) / n**0.5


def summed(batches, mix, seed=100, tokens=64):
    rng = np.random.default_rng(seed)
    out = None
    for _ in range(batches):
        g = (rng.standard_normal((tokens, len(mix))) @ mix.T).astype(np.float32)
        one = Outer.of(g.T @ g)
        out = one if out is None else out.plus(one)
    return out


def moment(mix):
    return (mix @ mix.T).astype(np.float32)


def off(g):
    return g - np.diag(np.diag(g))


def test_chance_is_taken_off():
    """The drawn mean is nearer to what many tokens would give than the mean, and than its diagonal."""
    mix = mixed(0)
    g, few_tokens = moment(mix), summed(8, mix, tokens=16)
    found, plain = few_tokens.mean(128), few_tokens.total / 128
    far = [np.linalg.norm(off(m) - off(g)) for m in (found, plain, np.diag(np.diag(plain)))]
    assert far[0] < far[1] and far[0] < far[2]
    best = min(np.linalg.norm(off(plain) * a - off(g)) for a in np.linspace(0, 1, 101))
    assert far[0] < 1.05 * best
    np.testing.assert_allclose(np.diag(found), np.diag(plain), rtol=1e-6)
    assert summed(400, mix).share > 0.98


def test_nothing_is_believed_that_is_only_chance():
    assert summed(16, np.eye(N)).share < 0.1 and summed(16, np.eye(N)).mean(1024) is None
    assert summed(1, mixed(0)).share == 0 and summed(1, mixed(0)).mean(64) is None  # one batch cannot tell
    same = Outer.of(moment(mixed(0)))
    assert same.plus(Outer.of(moment(mixed(0)))).share == pytest.approx(1)
    for bad in (np.nan, np.inf, 0.0):
        total = np.full((4, 4), bad, np.float32)
        assert Outer.of(total).plus(Outer.of(total.copy())).share == 0


def test_one_odd_batch_is_not_believed():
    """Gradients of a few tokens that are most of the sum: what they say is in no other batch."""
    mix, rng = np.eye(N), np.random.default_rng(1)
    total = summed(15, mix)
    odd = 200 * rng.standard_normal((1, N)).astype(np.float32)
    assert total.plus(Outer.of(odd.T @ odd)).share < 0.05


def weight(seed=2):
    return np.random.default_rng(seed).standard_normal((N, WIDTH)).astype(np.float32)


def layer(outputs=None, sensitivity=None):
    x = np.random.default_rng(3).standard_normal((512, WIDTH)) @ mixed(4, WIDTH)
    second = (x.T @ x / 512).astype(np.float32)
    given = np.diag(moment(mixed(0))).astype(np.float64) if sensitivity is None else sensitivity
    return Layer(second, given, outputs=outputs)


def cost(w, layer, sample, g):
    """tr(G E S E^T) at 3 bits, and what was done."""
    groups = ties.find(from_arrays({"w": w}).tensors)
    recipe = solve(groups, rcp.calibrated(groups, {"w": layer}, (), "default", sample=sample), Budget(bits=3.2), 1)
    coded = code(groups[0].tensor, recipe)
    e = (coded.dense.view(np.float32) - w).astype(np.float64)
    return float(np.trace(g @ e @ layer.second @ e.T)), recipe.aligned["w"].fed, coded.quantised.trellis.states


def test_errors_are_fed_back_along_rows_too():
    g = moment(mixed(0))
    plain, fed = (cost(weight(), layer(g), sample, g) for sample in (rcp.Sample(), FED))
    assert fed[1:] == (True, SHAPED) and plain[1:] == (False, 256)
    assert fed[0] < 0.8 * plain[0]
    # where it promises nothing, or nothing is known, all is as without
    for outputs in (np.diag(np.diag(g)), None, g[:-1, :-1]):
        assert cost(weight(), layer(outputs), FED, g) == plain


@pytest.mark.parametrize("kind", ["zeros", "table", "turned"])
def test_what_is_not_fed(kind):
    g, w, name = moment(mixed(0)), weight(), "model.embed_tokens.weight" if kind == "table" else "w"
    found = layer(g)
    if kind == "zeros":
        w[np.random.default_rng(5).random(w.shape) < 0.5] = 0
    if kind == "turned":
        w, found = w.T.copy(), replace(found, transposed=True)
    groups = ties.find(from_arrays({name: w}).tensors)
    recipe = rcp.calibrated(groups, {name: found}, (), "default", embeddings=True, sample=FED)
    assert not recipe.aligned[name].fed
    if kind == "turned":
        assert recipe.aligned[name].rows() is not None


@pytest.mark.parametrize("align", ["identity", "pca"])
def test_other_alignments_feed_nothing_back(align):
    groups = ties.find(from_arrays({"w": weight()}).tensors)
    recipe = rcp.calibrated(groups, {"w": layer(moment(mixed(0)))}, (), "default", sample=FED)
    assert recipe.aligned["w"].rows() is not None
    assert choose(recipe, groups, 0, align, 3.0).aligned["w"].rows() is None


def test_rows_of_a_sample_have_their_part_of_it(monkeypatch):
    monkeypatch.setattr("rac.encode.allocate.few.LEAST", 1)
    g = moment(mixed(0))
    groups = ties.find(from_arrays({"w": weight()}).tensors)
    recipe = rcp.calibrated(groups, {"w": layer(g)}, (), "default", sample=FED)
    some = few(groups, recipe)
    at, a = recipe.aligned["w"].few, some.recipe.aligned["w"]
    assert a.fed and len(a.rows().weight) == len(at) < N
    np.testing.assert_array_equal(a.layer.outer, g[np.ix_(at, at)])
    rate = 8 * some.bytes_of(e := _encoded(some, -1.0), e.size) / weight().size
    assert rate == pytest.approx(8 * _size(groups, recipe, -1.0) / weight().size, rel=0.06)


def _encoded(some, scale):
    return encode(some.groups[0], replace(some.recipe, scale=scale), measured=False)


def _size(groups, recipe, scale):
    return encode(groups[0], replace(recipe, scale=scale), measured=False).size


def test_ranks_tell_each_other():
    groups = ties.find(from_arrays({"w": weight()}).tensors)
    for outputs in (moment(mixed(0)), None):
        (seen,) = rcp.look([(groups[0].tensor, layer(outputs))], FED)
        assert seen_of(told(seen)).aligned.fed == seen.aligned.fed == (outputs is not None)


def test_joined_saved_and_cut(tmp_path):
    g, other = moment(mixed(0)), moment(mixed(1))
    both = joined([{"w": layer(g)}, {"w": layer(other)}])["w"]
    np.testing.assert_allclose(both.outer, (g + other) / 2, rtol=1e-6)
    assert joined([{"w": layer(g)}, {"w": layer()}])["w"].outer is None
    file = tmp_path / "a.calibration"
    Layers({"w": layer(g), "v": layer()}, 1, "0" * 32).save(file)
    found = load(file)
    np.testing.assert_array_equal(found["w"].outer, g)
    assert found["v"].outer is None
    # query, key and value in one: each has its part
    sketched = {"w": replace(layer(g), sketch=sketch(weight()))}
    groups = ties.find(from_arrays({"part": weight()[32:96].copy()}).tensors)
    part = matched(groups, Layers(sketched, 1, "0" * 32))["part"]
    np.testing.assert_array_equal(part.outer, g[32:96, 32:96])
    data = bytearray(file.read_bytes())
    at = data.index(np.ascontiguousarray(g).tobytes()[:64])
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(SourceError, match="damaged calibration"):
        _ = load(file)["w"].outer


def test_a_calibration_keeps_them(tmp_path):
    torch = pytest.importorskip("torch")
    from rac.calibrate.layers import calibrate
    from support.models import WIDTH as HIDDEN
    from support.models import llama

    torch.manual_seed(0)
    llama(intermediate_size=3 * HIDDEN).save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(3, 150, 12 * 1024)
    how = {"tokens": len(ids), "context": 128, "outer": True}
    found = calibrate(tmp_path, ids, **how)
    kinds = {name.split(".")[-2] for name, one in found.items() if one.outer is not None}
    assert {"o_proj", "down_proj"} <= kinds <= {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    own = found["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_allclose(np.diag(own.outer), own.sensitivity, rtol=1e-4)
    np.testing.assert_array_equal(own.outer, own.outer.T)
    assert np.abs(off(own.outer)).max() > 0.05 * own.sensitivity.min()
    for less in ({"fisher": False}, {"outer": False}):
        without = calibrate(tmp_path, ids[:2048], **how | {"tokens": 2048} | less)
        assert all(one.outer is None for one in without.values())


def test_a_model_that_is_run_as_a_whole_keeps_them(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from rac.calibrate import outer, passes
    from rac.calibrate.layers import calibrate
    from support.models import write

    def refuse(*_):
        raise passes.UnfitError("asked for")

    monkeypatch.setattr(outer, "FEWEST", 0.0)
    write("llama", tmp_path / "m")
    ids = np.random.default_rng(0).integers(3, 90, 512)
    found = []
    for step in (1, 2):
        if step == 2:
            monkeypatch.setattr(passes.Chain, "__init__", refuse)
        monkeypatch.setattr(passes, "_ROWS", 64)  # a sequence is a batch in both
        found.append(calibrate(tmp_path / "m", ids, tokens=512, context=64, outer=True))
    known = [{name for name, one in each.items() if one.outer is not None} for each in found]
    assert known[0] == known[1] and known[0]
    for name in known[0]:
        a, b = (each[name].outer for each in found)
        np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-3 * np.abs(a).max())


@pytest.mark.parametrize("what", ["second", "outer", "nan"])
def test_a_calibration_of_no_moments_is_refused(tmp_path, what, capsys):
    """What is in the file is what was written, but no second moment."""
    found = layer(moment(mixed(0)))
    odd = (5 * np.random.default_rng(1).standard_normal((N, N)) + np.eye(N)).astype(np.float32)
    if what == "nan":
        odd = moment(mixed(0))
        odd[9, 4] = odd[4, 9] = np.nan
    found = replace(found, moment=-found.second) if what == "second" else replace(found, outputs=odd)
    save_file({"w": weight()}, source := tmp_path / "m.safetensors")
    Layers({"w": found}, 1, "0" * 32).save(file := tmp_path / "a.calibration")
    out = tmp_path / "m.rac"
    how = ["--bits", "3.2", "--calibration", str(file), "--effort", "max"]
    assert main(["pack", str(source), "-o", str(out), *how]) == 2
    said = capsys.readouterr().err
    assert "damaged calibration" in said and said.count("\n") == 1 and not out.exists()


def test_only_the_largest_effort_does(tmp_path):
    save_file({"w": weight()}, source := tmp_path / "m.safetensors")
    made = Layers({"w": layer(moment(mixed(0)))}, 1, "0" * 32)
    said = {}
    for effort in ("fast", "default", "max"):
        rac.pack(source, out := tmp_path / f"{effort}.rac", bits=3.2, calibration=made, effort=effort)
        with rac.open(out) as f:
            said[effort] = f.archives[0].header["provenance"].get("rows")
    assert said == {"fast": None, "default": None, "max": 1}
