"""Learned rotations of small random models: they stay orthogonal, what they minimise falls, the function is kept."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rac.encode.pack import pack_source
from rac.errors import DivergedError, SourceError, TransformError
from rac.linalg.transform import hooked
from rac.methods import rotations as ro
from rac.methods import transforms as tf
from rac.methods.rotations import cayley as ca
from rac.methods.rotations import learned as la
from rac.methods.rotations.kurtail import gather
from rac.methods.rotations.spinquant import start
from support import models

CLOSE = 2e-5


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads wait for each other longer than such small matrices take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind="Llama", width=96, **other):
    """Two layers, 6 heads of 16, 3 key heads; two channels of the stream are outliers: there is work to do."""
    settings = {
        "vocab_size": 300,
        "hidden_size": width,
        "intermediate_size": 144,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings | other)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.model.embed_tokens.weight.data[:, [3, 40]] *= 12
    return model


def learnt(kind="Llama", **other):
    model = make(kind, **other)
    p = tf.parts(model)
    tf.fuse_norms(p)
    return p


def text(count=12, context=32, vocabulary=300, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, (count, context))


def own_text(p, count=12, context=24):
    """Tokens that the model finds likely, so that its loss tells good rotations from bad ones."""
    ids = torch.from_numpy(text(count, 2))
    with torch.no_grad():
        for _ in range(context - 2):
            ids = torch.cat((ids, p.model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids.numpy()


def far(x):
    return float((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).abs().max())


# Cayley SGD and Adam


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("make_it", [lambda x: ca.CayleySGD([x], 0.3, 0.5), lambda x: ca.CayleyAdam([x], 0.05)])
def test_matrices_stay_orthogonal(make_it):
    x = torch.linalg.qr(random(3, 24, 24))[0].contiguous().requires_grad_()
    optimiser, target = make_it(x), random(3, 24, 24, seed=1)
    for _ in range(300):
        (x * target).sin().sum().backward()
        optimiser.step()
    assert far(x.detach()) < 1e-11


@pytest.mark.parametrize(
    "make_it",
    [lambda x: ca.CayleySGD([x], 1.5), lambda x: ca.CayleySGD([x], 0.5, 0.9), lambda x: ca.CayleyAdam([x], 0.1)],
)
def test_procrustes(make_it):
    """min |X A - B| over rotations X has a closed form: the polar factor of B A^T."""
    a, noise = random(16, 60), random(16, 60, seed=1)
    true = torch.linalg.matrix_exp(ca.skew(random(16, 16, seed=2), torch.eye(16, dtype=torch.float64)) * 0.2)
    b = true @ a + 0.1 * noise
    u, _, v = torch.linalg.svd(b @ a.T)
    x = torch.eye(16, dtype=torch.float64).requires_grad_()
    optimiser = make_it(x)
    lr = optimiser.lr
    for k in range(1500):
        ((x @ a - b).square().sum() / 60).backward()
        optimiser.lr = lr * (1 - k / 1500)
        optimiser.step()
    assert torch.linalg.det(u @ v) > 0  # a path of rotations reaches it
    assert float((x.detach() - u @ v).abs().max()) < 1e-3


def iterated(x, w, step, iterations):
    """What `cayley` gives, by the paper's fixed-point iterations; orthogonal as far as they have converged."""
    y = x + step * (w @ x)
    for _ in range(iterations):
        y = x + step / 2 * (w @ (x + y))
    return y


def test_the_iteration_of_the_paper_converges_to_the_closed_form():
    x = torch.linalg.qr(random(12, 12))[0]
    w = ca.skew(random(12, 12, seed=1), x)
    assert float((w + w.mT).abs().max()) < 1e-12
    step = float(2 * ca.Q / w.abs().sum(0).max())
    exact = ca.cayley(x, w, step)
    off = [float((iterated(x, w, step, n) - exact).abs().max()) for n in (0, 2, 5, 60)]
    assert far(exact) < 1e-12 and off[0] > off[1] > off[2] > 1e-9 and off[3] < 1e-12
    eps = 1e-6  # and the curve leaves x along W x
    assert torch.allclose((ca.cayley(x, w, eps) - x) / eps, w @ x, atol=1e-4)


def test_each_matrix_of_a_batch_moves_by_itself():
    xs = torch.linalg.qr(random(2, 8, 8))[0].contiguous()
    target = random(2, 8, 8, seed=3) * torch.tensor([1.0, 50.0])[:, None, None]
    both = xs.clone().requires_grad_()
    (both * target).sum().backward()
    ca.CayleySGD([both], 0.7).step()
    for i in range(2):
        one = xs[i].clone().requires_grad_()
        (one * target[i]).sum().backward()
        ca.CayleySGD([one], 0.7).step()
        assert torch.allclose(one, both[i])


def test_settings_that_make_no_sense():
    for wrong in ({"lr": 0}, {"lr": 1, "momentum": 1}):
        with pytest.raises(ValueError, match="lr|momentum"):
            ca.CayleySGD([], **wrong)
    with pytest.raises(ValueError, match="bits"):
        ro.Simulated(0)


# simulated quantisation


def test_quantiser():
    x = random(5, 33)
    for bits in (2, 4, 8):
        y = ro.quantised(x, bits)
        step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
        assert all(len(row.unique()) <= 2**bits for row in y)
        assert ((y - x).abs().amax(-1) <= 1.001 * step).all()  # half a step; one where the zero point rounds
        assert (((y - x).abs() <= 0.5001 * step[:, None]).double().mean()) > 0.9
    assert ro.quantised(x, 16) is x
    assert not ro.quantised(torch.zeros(2, 4), 4).any()
    x.requires_grad_()
    (ro.quantised(x, 2) * torch.arange(33)).sum().backward()
    assert torch.equal(x.grad, torch.arange(33).double().expand(5, 33))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Phi3"])
def test_rotating_activations_is_rotating_weights(kind):
    """What `simulated` computes is the rotated model with quantised activations, whose weights were really rotated."""
    p = learnt(kind)
    ids, how = torch.from_numpy(text(2)), ro.Simulated(4, 4)
    r1, r2 = (r.detach() for r in start(p, 5))
    with ro.simulated(p, how, r1, r2, r4=9):
        ours = tf.logits(p.model, ids)
    assert not p.layers[0].mlp_out._forward_pre_hooks and tf.deviation(ours, p.model, ids) > 1e-2
    q = tf.parts(copy.deepcopy(p.model))
    ro.fuse(q, ro.Rotations(r1.numpy(), r2.numpy(), 9))
    with ro.simulated(q, how):
        theirs = tf.logits(q.model, ids)
    # values that lie between two steps round the other way here and there
    assert float((ours - theirs).abs().median() / ours.abs().max()) < 1e-3
    for bits in (14, 12):
        with ro.simulated(p, ro.Simulated(bits, bits), r1, r2, r4=9):
            ours = tf.logits(p.model, ids)
        with ro.simulated(q, ro.Simulated(bits, bits)):
            assert tf.deviation(ours, q.model, ids) < 2e-3


def test_nothing_quantised_is_the_model():
    p = learnt()
    ids = torch.from_numpy(text(2))
    before = tf.logits(p.model, ids)
    r1, r2 = (r.detach() for r in start(p, 5))
    with ro.simulated(p, ro.Simulated(16, 16), r1, r2, r4=3):
        assert tf.deviation(before, p.model, ids) < CLOSE
    with ro.simulated(p, ro.Simulated(16, 4), r1, r2, r3=False):
        a = tf.logits(p.model, ids)
    with ro.simulated(p, ro.Simulated(16, 4), r1, r2):
        b = tf.logits(p.model, ids)
    assert not torch.allclose(a, b) and tf.deviation(before, p.model, ids) == 0


def test_gradients_reach_the_rotations():
    p = learnt()
    ids = torch.from_numpy(text(2))

    def tangents(bits):
        r1, r2 = start(p, 1)
        with ro.simulated(p, ro.Simulated(bits, bits), r1, r2, r4=0):
            p.model(ids, labels=ids, use_cache=False).loss.backward()
        return [ca.skew(r.grad, r.detach()).abs().amax((-2, -1)) for r in (r1, r2)]

    rounded, plain = tangents(4), tangents(16)
    for a, b in zip(rounded, plain, strict=True):
        assert (a > 1e-4).all() and (b < 1e-3 * a).all()  # without rounding the loss does not depend on a rotation


# SpinQuant


def test_spinquant_learns_and_keeps_the_function():
    p = learnt()
    ids = own_text(p)
    tokens = torch.from_numpy(ids)
    before = tf.logits(p.model, tokens)
    weights = {n: w.clone() for n, w in p.model.state_dict().items()}
    how = ro.Simulated(3, 4)
    found = ro.spinquant(p, ids, steps=60, batch=4, lr=0.2, how=how, seed=2)
    assert all(torch.equal(w, weights[n]) for n, w in p.model.state_dict().items())
    assert all(w.requires_grad for w in p.model.parameters())
    about = found.about
    # What is learnt of eight sequences of a random model need not hold for the other four: that depends on the machine.
    assert about["plain"] < min(about["start"], about["end"]) and len(found.history) == 60
    assert np.mean(found.history[-10:]) < 0.97 * np.mean(found.history[:10])
    assert np.abs(found.r1 @ found.r1.T - np.eye(96)).max() < 1e-12
    assert np.abs(found.r2 @ found.r2.transpose(0, 2, 1) - np.eye(16)).max() < 1e-12
    assert ro.loss_of(p, ids[-4:], how, found) == pytest.approx(about["end"], rel=1e-6)
    again = ro.spinquant(p, ids, steps=60, batch=4, lr=0.2, how=how, seed=2)
    assert np.array_equal(again.r1, found.r1) and np.array_equal(again.r2, found.r2)
    other = ro.spinquant(p, ids, steps=1, batch=4, how=how, seed=3)
    assert not np.allclose(other.r1, found.r1)
    ro.fuse(p, found)
    assert tf.require_same(before, p, tokens) < CLOSE and len(p.online) == 2
    assert json.loads(p.about["rotations"]) == about and hooked(p.layers[1].mlp_out).online.seed == 3


def test_learning_that_diverges_says_so():
    p = learnt()
    ids = own_text(p)
    p.layers[1].mlp_out.weight.data[0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"step 1: loss nan"):
        ro.spinquant(p, ids, steps=5)
    assert not p.layers[0].mlp_out._forward_pre_hooks and p.layers[0].mlp_out.weight.requires_grad


def test_a_loss_that_rises_for_long_diverges(monkeypatch):
    module = sys.modules["rac.methods.rotations.spinquant"]
    p = learnt()
    ids = own_text(p)
    monkeypatch.setattr(module, "next_token_loss", lambda m, i, f=module.next_token_loss: f(m, i) * next(grows))
    grows = iter(1.0 if k < 8 else 1.15 for k in range(1000))
    with pytest.raises(DivergedError, match=r"step 2\d: .* smaller learning rate than 1.5"):
        ro.spinquant(p, ids, steps=60, lr=1.5)


def test_the_step_grows_with_the_root_of_the_tokens():
    module = sys.modules["rac.methods.rotations.spinquant"]
    assert module.rate(8 * 2048) == 1.5 and module.rate(2 * 512) == 0.375
    p = learnt()
    ids = own_text(p)
    assert ro.spinquant(p, ids, steps=1, batch=2).about["lr"] == module.rate(2 * ids.shape[1])


# KurTail


def test_kurtosis_of_known_laws():
    rng = np.random.default_rng(0)
    assert ro.kurtosis(torch.linspace(-1, 1, 100_001).double()) == pytest.approx(1.8, abs=1e-3)
    assert ro.kurtosis(torch.from_numpy(rng.standard_normal(1 << 20))) == pytest.approx(3, abs=0.03)
    assert ro.kurtosis(torch.tensor([[1.0, -1, 1, -1], [9, 9, 9, 1]])).tolist() == pytest.approx([1, 7 / 3])


def test_kurtail_brings_the_kurtosis_down_and_keeps_the_function():
    p = learnt()
    ids = text(8)
    tokens = torch.from_numpy(ids)
    before = tf.logits(p.model, tokens)
    found = ro.kurtail(p, ids, steps=150, batch=256, most=200, seed=1)
    for name in ("r1", "r2"):
        a = found.about[name]
        assert a["end"]["loss"] < 0.8 * a["start"]["loss"]
        assert abs(a["end"]["kurtosis"] - 1.8) < abs(a["start"]["kurtosis"] - 1.8)
    assert found.about["r1"]["before"]["kurtosis"] > 9
    assert len(found.history) == 300 and np.abs(found.r1 @ found.r1.T - np.eye(96)).max() < 1e-12
    again = ro.kurtail(p, ids, steps=150, batch=256, most=200, seed=1)
    assert np.array_equal(again.r1, found.r1) and np.array_equal(again.r2, found.r2)
    ro.fuse(p, found)
    assert tf.require_same(before, p, tokens) < CLOSE
    x, _ = gather(p, ids, 200, 1)  # it is really the activations of the rotated model that have it
    assert float(ro.kurtosis(x).mean()) == pytest.approx(found.about["r1"]["end"]["kurtosis"], abs=2e-3)


def test_gathered_are_the_inputs_of_the_layers():
    p = learnt("Phi3")
    ids, seen = np.maximum(text(3, 20), 1), []  # the embedding of token 0, padding, is 0
    held = p.layers[1].mlp_in[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    x, v = gather(p, ids, 60)
    held.remove()
    assert x.shape == (2 * 2 * 60, 96) and v.shape == (2, 60 * 3, 16)
    assert torch.equal(x[-60:], torch.cat(seen))
    x, v = gather(p, ids, 17)
    assert x.shape == (2 * 2 * 17, 96) and v.shape == (2, 17 * 3, 16)


# what does not fit, and files


def test_what_does_not_fit():
    p = tf.parts(make())
    for learn in (ro.spinquant, ro.kurtail):
        p.layers[0].mlp_norm.weight.data += 1
        with pytest.raises(TransformError, match="not fused"):
            learn(p, text(8))
    tf.fuse_norms(p)
    with pytest.raises(SourceError, match="at least 4 are needed"):
        ro.spinquant(p, text(3))
    with pytest.raises(SourceError, match="no tokens"):
        ro.kurtail(p, text(0))
    found = ro.Rotations(np.eye(96), np.stack([np.eye(16)] * 3))
    with pytest.raises(ValueError, match="3 layers"):
        ro.fuse(p, found)
    tf.online_down(p, p.layers[0], 0)
    for learn in (ro.spinquant, ro.kurtail):
        with pytest.raises(TransformError, match="online transform"):
            learn(p, text(8))
    q = tf.parts(make("Gemma2"))
    for learn in (ro.spinquant, ro.kurtail):
        with pytest.raises(TransformError, match="cannot be rotated"):
            learn(q, text(8))


def test_files(tmp_path):
    pytest.importorskip("safetensors")
    p = learnt()
    r1, r2 = (r.detach().numpy() for r in start(p, 0))
    found = ro.Rotations(r1, r2, 5, {"method": "x", "end": 1.5}, (3.0, 2.0))
    ro.save(found, tmp_path / "r.safetensors")
    again = ro.load(tmp_path / "r.safetensors")
    assert np.abs(again.r1 - r1).max() < 1e-6 and np.abs(again.r1 @ again.r1.T - np.eye(96)).max() < 1e-12
    assert (again.seed, again.about, again.history) == (5, found.about, found.history)
    ro.save(replace(found, r1=r1 * 1.1), tmp_path / "r.safetensors")
    with pytest.raises(SourceError, match="orthogonal"):
        ro.load(tmp_path / "r.safetensors")
    ro.save(replace(found, r1=r1[:5]), tmp_path / "r.safetensors")
    with pytest.raises(SourceError, match="no rotations"):
        ro.load(tmp_path / "r.safetensors")
    (tmp_path / "r.safetensors").write_bytes(b"nothing")
    for name in ("r.safetensors", "none"):
        with pytest.raises(SourceError, match="no file of learned rotations"):
            ro.load(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_from_learning_to_a_loaded_file(tmp_path):
    import rac

    models.write("llama", tmp_path / "hf", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.from_numpy(text(8, 32, models.VOCABULARY))
    before = tf.logits(model, ids)
    p = tf.parts(model)
    tf.fuse_norms(p)
    found = ro.kurtail(p, ids.numpy(), steps=5, most=64)
    ro.fuse(p, found)
    tf.require_same(before, p, ids)
    pack_source(ro.attached(tf.source(p, tmp_path / "hf"), found), tmp_path / "m.rac", level="fast", settings=p.about)
    assert tf.deviation(before, rac.load_model(tmp_path / "m.rac"), ids) < CLOSE
    kept = ro.load(tmp_path / "m.rac")
    assert np.abs(kept.r2 - found.r2).max() < 1e-6 and kept.about["method"] == "kurtail"
    pack_source(tf.source(p, tmp_path / "hf"), tmp_path / "n.rac", level="fast", settings=p.about)
    with pytest.raises(SourceError, match="was not packed by a method that learns"):
        ro.load(tmp_path / "n.rac")


# learned axes


def test_codes_with_feedback_have_the_error_that_is_stated():
    rng = np.random.default_rng(0)
    w, a = rng.standard_normal((40, 24)), rng.standard_normal((24, 24))
    s, step = a @ a.T, 0.05
    t = la.triangular(s, 0)
    codes, error = la.quantise(w, t, step)
    widths = step / t.by_column
    assert np.allclose(codes * widths, w + error)
    inner = error[:, t.order] @ np.linalg.cholesky(s[np.ix_(t.order, t.order)])
    assert np.abs(inner).max() <= step / 2 + 1e-6
    assert ((error @ s) * error).sum() == pytest.approx(w.size * step**2 / 12, rel=0.1)


def test_bits_of_codes_of_known_entropy():
    rng = np.random.default_rng(0)
    flat = rng.integers(-4, 4, (400, 500)).astype(np.int32)
    assert la.coded_bits(flat) / flat.size == pytest.approx(3, abs=0.05)
    scales = np.repeat([1, 8], 250)
    mixed = np.rint(rng.standard_normal((400, 500)) * scales).astype(np.int32)
    expected = np.mean([0.5 * np.log2(2 * np.pi * np.e * (v + 1 / 12)) for v in (1, 64)])
    assert la.coded_bits(mixed) / mixed.size == pytest.approx(expected, abs=0.06)


def test_the_differentiable_rate_is_near_that_of_codes():
    z = torch.from_numpy(np.random.default_rng(0).logistic(size=(500, 64)) * 3)
    law = torch.tensor([[0.0], [np.log(1 / np.sqrt(np.pi**2 / 3))]], dtype=torch.float64)
    bits = float(la.rate(z, law, torch.Generator().manual_seed(0))) - 0.5 / np.log(2)
    assert bits == pytest.approx(2 / np.log(2) + np.log2(3), abs=0.1)


def sparse(rows=1500, n=32, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((rows, n)) * (rng.random((rows, n)) < 0.15) + 0.03 * rng.standard_normal((rows, n))
    return z, np.linalg.qr(rng.standard_normal((n, n)))[0]


def test_an_axis_along_which_weights_are_sparse_is_found():
    z, q = sparse()
    a = np.random.default_rng(1).standard_normal((32, 32))
    s = a @ a.T / 32 + np.eye(32)
    found = ro.learn_axis(z @ q, s, bits=2.5, rows=1500)
    assert np.abs(found.u @ found.u.T - np.eye(32)).max() < 1e-10
    best = ro.compare_axes(z @ q, s, q, bits=2.5)
    assert found.bits_saved / z.size > 0.8 * (best["triangular"] - best["learned"]) > 0.3
    bits = ro.compare_axes(z @ q, s, found.u, bits=2.5)
    assert bits["triangular"] == pytest.approx(2.5, abs=0.02)
    assert (bits["triangular"] - bits["learned"]) * z.size == pytest.approx(found.bits_saved)
    assert found.cost_bits == 32 * 32 * 16
    again = ro.learn_axis(z @ q, s, bits=2.5, rows=1500)
    assert np.array_equal(again.u, found.u)


def test_gaussian_weights_have_no_such_axis():
    w = np.random.default_rng(0).standard_normal((1000, 32))
    found = ro.learn_axis(w, np.eye(32), steps=60, block=16)
    assert abs(found.bits_saved) / w.size < 0.02 and found.cost_bits == 32 * 16 * 16
    assert not found.u[:16, 16:].any() and not found.u[16:, :16].any()
    bits = ro.compare_axes(w, np.eye(32))
    assert bits.keys() == {"original", "triangular", "hadamard", "pca"}
    assert max(bits.values()) - min(bits.values()) < 0.03


def test_feedback_and_principal_axes_do_the_same_for_gaussian_weights():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((32, 32)) * np.geomspace(1, 4, 32)
    bits = ro.compare_axes(rng.standard_normal((1000, 32)), a @ a.T, bits=4)
    assert bits["pca"] == pytest.approx(bits["triangular"], abs=0.1) and bits["original"] > bits["triangular"] + 0.3


def test_axes_that_do_not_fit():
    w = np.ones((4, 6))
    with pytest.raises(ValueError, match="do not divide"):
        ro.learn_axis(w, np.eye(6), block=4)
    with pytest.raises(ValueError, match="do not fit"):
        ro.compare_axes(w, np.eye(5))
    with pytest.raises(ValueError, match="zeros"):
        ro.compare_axes(0 * w, np.eye(6))
