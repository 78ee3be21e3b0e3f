"""Simulated activations: the grids by their definition, where they act, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rac
from rac.encode.pack import pack, pack_source
from rac.errors import UnsupportedError
from rac.methods import transforms as tf
from rac.models.activations import per_group, per_token
from rac.models.linears import blocks_linears
from rac.runtime.simulate import largest, simulated
from support import models


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.llama().eval()


def numbers(*shape):
    return torch.from_numpy(np.random.default_rng(0).standard_t(3, shape)).float()


@pytest.mark.parametrize(("bits", "clip"), [(2, 1.0), (4, 0.9), (8, 1.0), (16, 1.0)])
def test_tokens_on_their_grid(bits, clip):
    x = numbers(2, 5, 24)
    x[0, 0] = 0
    found = per_token(x, bits, clip)
    for row, out in zip(x.reshape(-1, 24).double(), found.reshape(-1, 24), strict=True):
        step = clip * row.abs().max() / (2 ** (bits - 1) - 1)
        want = torch.clamp(torch.round(row / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step if step else row
        assert torch.allclose(out.double(), want, rtol=0, atol=float(step) * 1e-3 + 1e-6)
        assert len(out.unique()) <= 2**bits
    assert torch.equal(per_token(x.bfloat16(), bits, clip), per_token(x.bfloat16().float(), bits, clip).bfloat16())
    static = per_token(x, bits, 1.0, most=2.0)
    assert float(static.max()) == pytest.approx(2.0) and float(static.min()) >= -2.0 * 2


@pytest.mark.parametrize(("bits", "group", "clip"), [(1, None, 1.0), (4, 8, 0.95), (4, None, 1.0), (8, 12, 1.0)])
def test_groups_on_their_grid(bits, group, clip):
    x = numbers(2, 3, 24) + 1
    x[0, 0] = 0
    found = per_group(x, bits, group, clip)
    width = group or 24
    for row, out in zip(x.reshape(-1, width).double(), found.reshape(-1, width), strict=True):
        low, high = clip * min(float(row.min()), 0), clip * max(float(row.max()), 0)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step) if step else 0
        codes = torch.clamp(torch.round(row / step) + zero, 0, 2**bits - 1) if step else row
        assert torch.allclose(out.double(), (codes - zero) * step, rtol=0, atol=1e-3 * step)
        assert len(out.unique()) <= 2**bits
    with pytest.raises(ValueError, match="divide"):
        per_group(x, 4, 7)


def test_every_layer_of_the_blocks_sees_its_grid_and_no_other(model):
    before = models.logits(model)
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, args, __, name=name: seen.__setitem__(name, args[0]))
    with simulated(model, 4) as found:
        after = models.logits(model)
    assert found.linears == 14 and found.heads == 0
    few = {name for name, x in seen.items() if max(len(row.unique()) for row in x.reshape(-1, x.shape[-1])) <= 16}
    assert few == set(blocks_linears(model)) == seen.keys() - {"lm_head"}
    assert float((after - before).abs().max() / before.abs().max()) > 0.01
    assert torch.equal(models.logits(model), before)  # and it is over behind the block


def test_an_asymmetric_grid(model):
    """From the least to the largest of a token, all of it: layers see what per_group gives."""
    seen = []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    logits = []
    for how in (
        {"activations": None, "kv": 16, "kv_clip": 1},
        {"activations": 3, "asymmetric": True},
        {"activations": 3},
    ):
        with simulated(model, **how):
            logits.append(models.logits(model))
    assert torch.allclose(per_group(seen[1], 3), seen[1], atol=1e-5)
    assert not torch.allclose(per_group(seen[2], 3), seen[2], atol=1e-5)
    assert not torch.equal(logits[1], logits[2])
    with pytest.raises(ValueError, match="symmetric"), simulated(model, 8, static={}, asymmetric=True):
        pass


def test_more_bits_are_closer(model):
    before = models.logits(model)
    off = []
    for bits in (2, 4, 8, 12, 16):
        with simulated(model, bits, bits, clip=1, kv_clip=1):
            off.append(float((models.logits(model) - before).norm() / before.norm()))
    assert off == sorted(off, reverse=True) and off[-1] < 1e-3 and off[2] < 0.05 < off[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_values(model, attention):
    model.set_attn_implementation(attention)
    before = models.logits(model)
    with simulated(model, kv=16, rotate_keys=True, seed=5, kv_clip=1) as found:
        same = models.logits(model)
    assert found.heads == 2 and found.linears == 0 and model.config._attn_implementation == attention
    assert float((same - before).abs().max() / before.abs().max()) < 1e-3
    results = []
    for how in ({}, {"rotate_keys": True}, {"rotate_keys": True, "seed": 1}, {"kv_group": 16}):
        with simulated(model, kv=3, **how):
            results.append(models.logits(model))
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(models.logits(model), before)


def test_the_cache_gives_what_the_whole_text_does(model):
    """Token by token with a cache, and at once."""
    ids = models.inputs(model)["input_ids"]
    with simulated(model, 6, 4, rotate_keys=True), torch.no_grad():
        whole = model(ids).logits
        kept, parts = {}, []
        for i in range(ids.shape[1]):
            out = model(ids[:, i : i + 1], use_cache=True, **kept)
            kept = next({name: out[name]} for name in ("cache", "past_key_values") if name in out)
            parts.append(out.logits)
    off = (torch.cat(parts, 1) - whole).abs().max() / whole.abs().max()
    assert float(off) < 0.05  # a number at the edge of two codes may fall either way


def test_rotated_keys_of_transforms_and_ours_are_one(model):
    p = tf.parts(model)
    with simulated(model, kv=4, rotate_keys=True, seed=3):
        ours = models.logits(model)
    quantise = lambda x: per_group(x, 4, None, 0.95)  # noqa: E731
    with tf.rotated_keys(p, 3, quantise, quantise):
        theirs = models.logits(model)
    assert torch.equal(ours, theirs)


def test_behind_the_online_maps(tmp_path):
    """A rotated model loaded from its file: what is quantised is T x, and folding the map would be another thing."""
    models.write("llama", tmp_path / "hf", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = models.inputs(model)["input_ids"]
    before = tf.logits(model, ids)
    p = tf.parts(model)
    tf.quarot(p, 1)
    tf.require_same(before, p, ids)
    pack_source(tf.source(p, tmp_path / "hf"), tmp_path / "m.rac", settings=p.about)
    loaded = rac.load_model(tmp_path / "m.rac")
    with simulated(model, 4, 4), simulated(loaded, 4, 4) as found:
        a, b = tf.logits(model, ids), tf.logits(loaded, ids)
    assert found.linears == 14 and found.heads == 2
    assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))
    layer = loaded.model.layers[0].mlp.down_proj
    kept = []
    with simulated(loaded, 4):
        layer.register_forward_hook(lambda _, args, __: kept.append(args[0]))
        tf.logits(loaded, ids)
    assert max(len(row.unique()) for row in kept[0].reshape(-1, kept[0].shape[-1])) <= 16
    compressed = rac.load_model(tmp_path / "m.rac", resident="compressed")
    if any(type(m).__name__ == "RacLinear" for m in compressed.modules()):
        with pytest.raises(UnsupportedError, match="dense"), simulated(compressed, 4):
            pass


def test_compressed_layers_without_maps(tmp_path):
    models.write("llama", tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    results = []
    for resident in ("dense", "compressed"):
        model = rac.load_model(tmp_path / "m.rac", resident=resident)
        with simulated(model, 4, 4) as found:
            results.append(models.logits(model))
        assert found.linears == 14
    assert torch.equal(*results)


def test_static_scales(model):
    ids = models.inputs(model)["input_ids"]
    found = largest(model, [ids[:1], ids[1:]])
    assert found.keys() == blocks_linears(model).keys() and min(found.values()) > 0
    before = models.logits(model)
    with simulated(model, 8, static=found):
        static = models.logits(model)
    with simulated(model, 8):
        tokens = models.logits(model)
    assert 0 < float((tokens - before).norm()) < float((static - before).norm()) < 0.2 * float(before.norm())
    del found["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match="up_proj"), simulated(model, 8, static=found):
        pass
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_other_architectures():
    for kind, linears in (("gpt2", 8), ("gemma", 14)):
        torch.manual_seed(0)
        model = models.KINDS[kind]().eval()
        with simulated(model, 8, 8) as found:
            models.logits(model)
        assert (found.linears, found.heads) == (linears, 2)


def test_what_is_refused(model):
    for how in (
        {},
        {"activations": 1},
        {"activations": 17},
        {"kv": 0},
        {"kv": 17},
        {"activations": 4, "clip": 0},
        {"kv": 4, "kv_clip": 1.5},
    ):
        with pytest.raises(ValueError, match="bits|clip|quantise"), simulated(model, **how):
            pass
    with pytest.raises(ValueError, match="divide"), simulated(model, kv=4, kv_group=7):
        models.logits(model)
    bare = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match="no linear layers"), simulated(bare, 4):
        pass
    model.config._attn_implementation = "flex_of_another"
    with pytest.raises(UnsupportedError, match="replaced"), simulated(model, kv=4):
        pass


def test_an_attention_that_runs_past_is_found(model):
    """A model whose layers do not ask for the attention that the configuration names."""
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedError, match="past"), simulated(model, kv=4):
        models.logits(model)
