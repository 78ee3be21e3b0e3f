"""Transforms of small random models of every architecture in the table: what they compute stays what it was."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rac.encode.pack import pack_source
from rac.errors import TransformError
from rac.linalg.transform import hooked
from rac.methods import transforms as tf
from support import models

CLOSE = 2e-5
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
}
BEHIND = ("gemma2", "gemma3_text")
"""Architectures whose residual stream cannot be rotated."""
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def make(kind, **other):
    """Two layers of width 96, 6 heads of 16, 3 key heads, gains and biases random."""
    settings = {
        "vocab_size": 300,
        "hidden_size": 96,
        "intermediate_size": 144,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if kind in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        settings["head_dim"] = 16
    name = CLASSES[kind]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**settings | other)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, w in model.named_parameters():
        if "norm" in key or "bias" in key:
            w.data += 0.3 * torch.randn_like(w)
    return model


def steps(kind):
    """Names of single transforms to functions of the parts."""

    def values(p):
        for i, layer in enumerate(p.layers):
            tf.rotate_values(p, layer, tf.hadamard(p.head_dim, i))

    def residual(p):
        tf.fuse_norms(p)
        tf.rotate_residual(p, tf.hadamard(p.width, 3))

    def learned(p):
        tf.fuse_norms(p)
        q, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((p.width, p.width)))
        tf.rotate_residual(p, tf.matrix(q))
        r, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((p.head_dim, p.head_dim)))
        for layer in p.layers:
            tf.rotate_values(p, layer, tf.matrix(r))

    def every(place):
        return lambda p: tf.smooth(p, tf.maxima(p, [IDS]), 0.7, [place])

    def down(p):
        for i, layer in enumerate(p.layers):
            tf.online_down(p, layer, i)

    def heads(p):
        for i, layer in enumerate(p.layers):
            tf.online_heads(p, layer, i)

    def oblique(p):
        m = np.random.default_rng(4).standard_normal((12, 12)) + 4 * np.eye(12)
        for layer in p.layers:
            tf.online(p, layer.mlp_out, f"{layer.name}.mlp.down_proj", tf.matrix(m, p.inner, 3))

    found = {
        "fuse": tf.fuse_norms,
        "values": values,
        "down": down,
        "heads": heads,
        "oblique": oblique,
        **{f"smooth-{place}": every(place) for place in ("attention", "mlp", "heads", "down")},
    }
    return found if kind in BEHIND else found | {"residual": residual, "learned": learned, "quarot": tf.quarot}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_transform_leaves_the_function(kind):
    for name, do in steps(kind).items():
        model = make(kind)
        before, weights = tf.logits(model, IDS), {n: w.clone() for n, w in model.state_dict().items()}
        p = tf.parts(model)
        do(p)
        assert any(not torch.equal(w, weights[n]) for n, w in model.state_dict().items()), name
        assert p.about["transforms"] and p.deviation is None
        assert tf.require_same(before, p, IDS) < CLOSE, name
        assert p.deviation is not None


@pytest.mark.parametrize("kind", sorted(CLASSES.keys() - set(BEHIND)))
def test_all_of_it_in_a_row(kind):
    tied = {"tie_word_embeddings": True} if kind in ("llama", "qwen2") else {}
    biased = {"attention_bias": True} if kind == "llama" else {}
    model = make(kind, **tied, **biased)
    before = tf.logits(model, IDS)
    p = tf.parts(model)
    tf.smooth(p, tf.maxima(p, [IDS]), 0.5, ["attention", "mlp", "heads", "down"])
    tf.quarot(p, 9)
    assert tf.require_same(before, p, IDS) < CLOSE
    assert len(p.online) == 4 and model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    gains = [p.gain(layer.mlp_norm) for layer in p.layers]
    assert all(torch.equal(g, torch.ones_like(g)) for g in gains)


def test_the_norm_of_hidden_states_is_kept_and_they_are_rotated():
    """R1 turns the residual stream by the matrix that it names, not by some other."""
    model = make("llama")
    a = model(IDS, output_hidden_states=True).hidden_states
    p = tf.parts(model)
    tf.fuse_norms(p)
    r1 = tf.hadamard(96, 3)
    tf.rotate_residual(p, r1)
    b = model(IDS, output_hidden_states=True).hidden_states
    assert torch.allclose(r1.apply(a[1].detach()), b[1].detach(), atol=1e-4)


def test_online_maps_are_what_the_layer_sees():
    model = make("llama")
    p = tf.parts(model)
    seen = []
    layer = p.layers[0].mlp_out
    held = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(IDS)
    held.remove()
    tf.online_down(p, p.layers[0], 4)
    assert hooked(layer) is p.online["model.layers.0.mlp.down_proj.weight"]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(IDS)
    assert torch.allclose(tf.hadamard(144, 4).apply(seen[0]), seen[1], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(k, a) for k in ("llama", "qwen3", "phi3", "smollm3") for a in ("eager", "sdpa")] + [("gemma2", "eager")],
)
def test_keys_are_rotated_and_nothing_changes(kind, attention):
    model = make(kind)
    model.set_attn_implementation(attention)
    before = tf.logits(model, IDS)
    p, seen = tf.parts(model), []
    with tf.rotated_keys(p, 3, lambda k: seen.append(k.clone()) or k):
        assert tf.deviation(before, model, IDS) < CLOSE
    assert len(seen) == 2 and seen[0].shape == (2, 3, 20, 16)
    with tf.rotated_keys(p, None, values=lambda v: 0 * v):
        assert tf.deviation(before, model, IDS) > 1e-2
    assert torch.equal(tf.logits(model, IDS), before) and model.config._attn_implementation == attention


def test_smoothing_moves_outliers():
    model = make("llama")
    p = tf.parts(model)
    p.layers[0].attention_norm.weight.data[5] = 200.0
    before = tf.logits(model, IDS)
    first = tf.maxima(p, [IDS[:1], IDS[1:]])
    assert np.array_equal(first["model.layers.0", "mlp"], tf.maxima(p, [IDS])["model.layers.0", "mlp"])
    for alpha in (0.0, 0.5, 1.0):
        x = tf.maxima(p, [IDS])["model.layers.0", "attention"]
        tf.smooth(p, tf.maxima(p, [IDS]), alpha)
        y = tf.maxima(p, [IDS])["model.layers.0", "attention"]
        assert tf.deviation(before, model, IDS) < CLOSE and not np.allclose(x, y)
    assert np.allclose(y, 1, atol=1e-4)  # with alpha 1 all of the outliers are in the weights
    with pytest.raises(ValueError, match="alpha"):
        tf.smooth(p, first, 1.5)
    with pytest.raises(ValueError, match="places"):
        tf.smooth(p, first, 0.5, ["nowhere"])
    with pytest.raises(TransformError, match="not known"):
        tf.smooth(p, {}, 0.5)
    with pytest.raises(TransformError, match="sequences"):
        tf.maxima(p, [])


@pytest.mark.parametrize(("kind", "why"), [("gpt2", "LayerNorm"), ("bert", "LayerNorm"), ("t5", "no rules")])
def test_architectures_without_rules(kind, why):
    with pytest.raises(TransformError, match=why) as e:
        tf.parts(models.KINDS[kind]())
    assert "aligned recipe (the default) takes any model" in str(e.value)


def test_what_an_architecture_lacks():
    p = tf.parts(make("gemma2"))
    weights = {n: w.clone() for n, w in p.model.state_dict().items()}
    with pytest.raises(TransformError, match="gains behind its projections"):
        tf.quarot(p)
    assert all(torch.equal(w, weights[n]) for n, w in p.model.state_dict().items())
    model = make("llama")
    model.model.layers[1].extra = torch.nn.Linear(3, 3)
    with pytest.raises(TransformError, match="extra"):
        tf.parts(model)
    model = make("llama")
    model.model.layers[0].input_layernorm = torch.nn.LayerNorm(96)
    with pytest.raises(TransformError, match="no RMSNorm"):
        tf.parts(model)
    model = make("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(TransformError, match="no linear layer"):
        tf.parts(model)
    with pytest.raises(TransformError, match="float32"):
        tf.parts(make("llama").to(torch.bfloat16))


def test_what_does_not_fit():
    p = tf.parts(make("llama"))
    layer = p.layers[0]
    with pytest.raises(TransformError, match="not fused"):
        tf.rotate_residual(p, tf.hadamard(96, 0))
    tf.fuse_norms(p)
    with pytest.raises(TransformError, match="width 48"):
        tf.rotate_residual(p, tf.hadamard(48, 0))
    with pytest.raises(TransformError, match="not orthogonal"):
        tf.rotate_residual(p, tf.matrix(1.01 * np.eye(96)))
    with pytest.raises(TransformError, match="width 96"):
        tf.rotate_values(p, layer, tf.hadamard(96, 0))
    with pytest.raises(TransformError, match="NaN"):
        tf.matrix(np.full((4, 4), np.nan))
    with pytest.raises(TransformError, match="inverse"):
        tf.online(p, layer.mlp_out, "x", tf.matrix(np.zeros((144, 144))))
    with pytest.raises(TransformError, match="width 96"):
        tf.online(p, layer.mlp_out, "x", tf.hadamard(96, 0))
    tf.online_heads(p, layer, 1)
    with pytest.raises(TransformError, match="already"):
        tf.online_heads(p, layer, 1)
    with pytest.raises(TransformError, match="before the heads"):
        tf.rotate_values(p, layer, tf.hadamard(16, 0))
    with pytest.raises(TransformError, match="before they are mapped"):
        tf.smooth(p, {(x.name, "heads"): np.ones(96) for x in p.layers}, 0.5, ["heads"])


def test_a_model_whose_function_changed_is_not_packed(tmp_path):
    models.write("llama", tmp_path / "hf", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = models.inputs(model)["input_ids"]
    before = tf.logits(model, ids)
    p = tf.parts(model)
    tf.fuse_norms(p)
    with pytest.raises(TransformError, match="before require_same"):
        tf.source(p, tmp_path / "hf")
    model.model.layers[0].mlp.up_proj.weight.data *= 1.05
    with pytest.raises(TransformError, match="has changed what the model computes"):
        tf.require_same(before, p, ids)
    with pytest.raises(TransformError, match="before require_same"):
        tf.source(p, tmp_path / "hf")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(TransformError, match="inf"):
        tf.require_same(before, p, ids)


@pytest.mark.filterwarnings("ignore")
def test_the_page(tmp_path, monkeypatch):
    """The code of docs/transforms.md runs, and its table has every architecture."""
    page = (Path(__file__).parents[3] / "docs" / "transforms.md").read_text()
    models.write("llama", tmp_path / "smollm2", torch.float32)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    assert tf.deviation(names["before"], names["model"], names["tokens"]) < 0.1
    assert all(kind in page for kind in tf.RULES) and all(f"`{f}`" in page for f in tf.__all__ if "rotate" in f)


SMOLLM2 = os.environ.get("RAC_SMOLLM2", "")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(SMOLLM2), reason="tools/check_models.py fetches it; or RAC_SMOLLM2")
@pytest.mark.filterwarnings("ignore")
def test_smollm2(tmp_path):
    import rac

    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    ids = torch.arange(256)[None] * 97 % model.config.vocab_size
    before = tf.logits(model, ids)
    p = tf.parts(model)
    tf.smooth(p, tf.maxima(p, [ids]), 0.5)
    tf.quarot(p, 0)
    assert tf.require_same(before, p, ids) < 1e-4
    pack_source(tf.source(p, SMOLLM2), tmp_path / "m.rac", level="fast", settings=p.about)
    assert tf.deviation(before, rac.load_model(tmp_path / "m.rac"), ids) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_compare_folds_online_maps(tmp_path, capsys):
    """A lossless file of a transformed model predicts what the original does; its weights are not compared."""
    import json

    from rac.cli import main

    models.write("llama", tmp_path / "hf", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    before = tf.logits(model, models.inputs(model)["input_ids"])
    p = tf.parts(model)
    tf.quarot(p, 3)
    tf.require_same(before, p, models.inputs(model)["input_ids"])
    pack_source(tf.source(p, tmp_path / "hf"), tmp_path / "m.rac", settings=p.about)
    (tmp_path / "t.txt").write_text(models.TEXT)
    line = [
        "compare",
        tmp_path / "hf",
        tmp_path / "m.rac",
        "--text",
        tmp_path / "t.txt",
        "--tokens",
        128,
        "--context",
        64,
    ]
    assert main([*map(str, line), "--json"]) == 0
    own, theirs = json.loads(capsys.readouterr().out)
    assert theirs["snr"] is None and theirs["kl"] < 1e-5 and theirs["top1"] == 1
    assert theirs["perplexity"] == pytest.approx(own["perplexity"], rel=1e-5)
    assert main([*map(str, line)]) == 0
    assert "exact" not in capsys.readouterr().out
    with pytest.raises(TransformError):  # and what is packed anew needs a check anew
        tf.smooth(p, tf.maxima(p, [models.inputs(model)["input_ids"]]), 0.5, ["down"])
