"""Whole models, block by block: against the whole model run again for every set of layers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rac.errors import SourceError, UnsupportedError
from rac.methods import transforms as tf
from rac.methods.gptq import gptq, rtn
from rac.methods.layerwise import calibration_ids, quantise_gptq, quantise_rtn
from rac.models.linears import blocks_linears
from rac.runtime.simulate import simulated
from rac.stages.groups import values
from support import models

IDS = (np.arange(5 * 48).reshape(5, 48) * 37 % 251).astype(np.int64)


def make(**other):
    torch.manual_seed(0)
    return models.llama(**other).eval()


def slow(model, sequential, bits, group):
    """The same by running the whole model for each set, Hessians in float64."""
    blocks = model.model.layers
    sets = []
    for i in range(len(blocks)):
        names = [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]
        names = names if sequential else [sum(names, [])]
        sets += [[f"model.layers.{i}.{name}" for name in each] for each in names]
    found = {}
    for names in sets:
        inputs, hooks = {}, []
        for name in names:

            def see(_, args, __, name=name, inputs=inputs):
                inputs[name] = args[0].double().reshape(-1, args[0].shape[-1]).numpy()

            hooks.append(model.get_submodule(name).register_forward_hook(see))
        with torch.no_grad():
            model(torch.from_numpy(IDS), use_cache=False)
        for hook in hooks:
            hook.remove()
        for name in names:
            layer = model.get_submodule(name)
            found[f"{name}.weight"] = gptq(layer.weight.detach().numpy(), inputs[name].T @ inputs[name], bits, group)
            layer.weight.data.copy_(torch.from_numpy(values(found[f"{name}.weight"])))
    return found


def same(a, b):
    """But for numbers at the edge of two codes."""
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name].scales, b[name].scales) and np.array_equal(a[name].zeros, b[name].zeros)
    off = np.concatenate([(a[name].codes != b[name].codes).reshape(-1) for name in a])
    assert off.mean() < 0.02


@pytest.mark.parametrize("sequential", [False, True])
def test_it_is_the_whole_model_run_again_and_again(sequential):
    model, other = make(), make()
    steps = []
    found = quantise_gptq(model, IDS, 4, 32, sequential=sequential, note=lambda *a: steps.append(a))
    same(found, slow(other, sequential, 4, 32))
    assert steps == [("gptq", 1, 2), ("gptq", 2, 2)]
    assert list(found) == [f"{name}.weight" for name in blocks_linears(model)]
    for name, g in found.items():
        assert torch.equal(model.get_parameter(name), torch.from_numpy(values(g)))


def test_what_is_left_alone():
    model, before = make(), make()
    model.train()
    quantise_gptq(model, IDS, 4, 32)
    ours, theirs = model.state_dict(), before.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {f"{name}.weight" for name in blocks_linears(model)}
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("quarot", [False, True])
def test_the_model_predicts_better_than_rounded_to_nearest(quarot):
    ids = torch.from_numpy(IDS)
    off = {}
    for way in ("rtn", "gptq", "together"):
        model = make(tie_word_embeddings=False)
        before = tf.logits(model, ids)
        if quarot:
            tf.quarot(tf.parts(model), 0)
        if way == "rtn":
            quantise_rtn(model, 3, 64)
        else:
            quantise_gptq(model, IDS, 3, 64, sequential=way == "gptq")
        off[way] = float((tf.logits(model, ids) - before).norm() / before.norm())
    assert max(off["gptq"], off["together"]) < 0.95 * off["rtn"], off


def test_hessians_are_of_what_the_weight_sees():
    """Behind an online map, and quantised where a simulation is in force."""
    model = make(tie_word_embeddings=False)
    tf.quarot(tf.parts(model), 4)
    other = make(tie_word_embeddings=False)
    tf.quarot(tf.parts(other), 4)
    with simulated(model, 4, 4, rotate_keys=True), simulated(other, 4, 4, rotate_keys=True):
        same(quantise_gptq(model, IDS, 4, 32), slow(other, True, 4, 32))
    plain = make(tie_word_embeddings=False)
    tf.quarot(tf.parts(plain), 4)
    quantise_gptq(plain, IDS, 4, 32)
    assert not torch.equal(plain.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)


def test_rtn():
    model, before = make(), make()
    steps = []
    found = quantise_rtn(model, 3, None, symmetric=True, search=True, note=lambda *a: steps.append(a))
    assert len(found) == 14 and steps[-1][1:] == (14, 14)
    for name, g in found.items():
        want = rtn(before.get_parameter(name).detach().numpy(), 3, None, symmetric=True, search=True)
        assert np.array_equal(g.codes, want.codes)
        assert torch.equal(model.get_parameter(name), torch.from_numpy(values(want)))


def test_other_architectures():
    torch.manual_seed(0)
    assert len(quantise_gptq(models.gemma().eval(), IDS[:2], 4, 32)) == 14
    for do in (quantise_rtn, lambda m, b: quantise_gptq(m, IDS, b)):
        with pytest.raises(UnsupportedError, match="Conv1D.*aligned"):
            do(models.gpt2(), 4)
        with pytest.raises(UnsupportedError, match="no blocks"):
            do(torch.nn.Linear(3, 3), 4)
        with pytest.raises(UnsupportedError, match="float32"):
            do(make().bfloat16(), 4)


def test_what_is_refused():
    model = make()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    for do in (lambda: quantise_gptq(model, IDS, 4), lambda: quantise_rtn(model, 4)):
        with pytest.raises(SourceError, match="NaN.*layers.1.mlp"):
            do()
    with pytest.raises(UnsupportedError, match="block by block"):
        quantise_gptq(make(num_hidden_layers=1), IDS, 4)


def test_ids_of_a_text(tmp_path):
    models.write("llama", tmp_path / "hf")
    ids = calibration_ids(str(tmp_path / "hf"), models.TEXT, 300, 64)
    assert ids.shape == (4, 64) and ids.dtype == np.int64
    assert ids.reshape(-1).tolist() == models.tokenizer()(models.TEXT).input_ids[:256]
    with pytest.raises(SourceError, match="tokens"):
        calibration_ids(str(tmp_path / "hf"), "short")


@pytest.mark.filterwarnings("ignore")
def test_the_pages(tmp_path, monkeypatch):
    """The code of docs/methods/gptq.md and smoothquant.md runs."""
    docs = Path(__file__).parents[3] / "docs" / "methods"
    models.write("llama", tmp_path / "smollm2", torch.float32)
    (tmp_path / "valid.txt").write_text(models.TEXT)
    monkeypatch.chdir(tmp_path)
    names = {}
    for page, count in (("gptq", 1), ("smoothquant", 2)):
        blocks = re.findall(r"```python\n(.*?)```", (docs / f"{page}.md").read_text(), re.DOTALL)
        assert len(blocks) == count
        for block in blocks:
            exec(block, names)
        names |= {"sequences": [torch.from_numpy(IDS)]}
    assert names["found"].linears == 14 and 0 <= names["alpha"] <= 1
