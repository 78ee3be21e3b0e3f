"""Models whose layers need online transforms: packed, loaded dense and compressed, run, folded, refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import rac
import rac.runtime
from rac.encode import ties
from rac.encode.align.recipe import data_free
from rac.encode.pack import pack_source
from rac.errors import MismatchError, UnsupportedError
from rac.linalg.transform import hooked
from rac.methods import transforms as tf
from rac.records import Online
from rac.runtime.folder import write_folder
from rac.runtime.layers import Compressed, RacLinear
from support import models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the original, its logits, lossless archive, archive at some bits): QuaRot and an oblique matrix."""
    root = tmp_path_factory.mktemp("online")
    models.write("llama", root / "hf", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "hf")
    before = tf.logits(model, ids(model))
    p = tf.parts(model)
    tf.quarot(p, 3)
    m = np.random.default_rng(1).standard_normal((16, 16)) + 5 * np.eye(16)
    for layer in p.layers:
        tf.online(p, layer.mlp_in[1], f"{layer.name}.mlp.up_proj", tf.matrix(m, p.width, 2))
    assert tf.require_same(before, p, ids(model)) < 1e-4
    source = tf.source(p, root / "hf")
    pack_source(source, root / "m.rac", settings=p.about)
    recipe = data_free(ties.find(source.tensors), (), "fast")
    pack_source(source, root / "lossy.rac", settings=p.about, recipe=recipe)
    return root / "hf", before, root / "m.rac", root / "lossy.rac"


def ids(model):
    return models.inputs(model)["input_ids"]


def test_the_model_that_was_packed(made):
    _, before, path, _ = made
    dense, compressed = rac.load_model(path), rac.load_model(path, resident="compressed")
    assert tf.deviation(before, dense, ids(dense)) < 1e-4
    assert sum(hooked(layer) is not None for layer in dense.modules()) == 6
    assert sum(isinstance(layer, Compressed) for layer in compressed.modules()) == 16
    assert torch.equal(models.logits(dense), models.logits(compressed))
    for layer in dense.modules():  # it is the maps that do it
        layer._forward_pre_hooks.clear()
    assert tf.deviation(before, dense, ids(dense)) > 0.1


def test_lossy(made):
    path = made[3]
    dense, compressed = rac.load_model(path), rac.load_model(path, resident="compressed")
    assert torch.equal(models.logits(dense), models.logits(compressed))
    with rac.open(path) as f:
        assert f.online("model.layers.0.mlp.up_proj.weight").online.id == "matrix/1"
        assert [e.name.startswith("online-") for e in f.archives[0].index.entries if e.type == 3] == [True]


def test_bfloat16_between_the_layers(made):
    dense = rac.load_model(made[2], dtype="bfloat16")
    assert tf.deviation(made[1], dense, ids(dense)) < 0.1
    generated = rac.load_model(made[2]).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)
    original = transformers.AutoModelForCausalLM.from_pretrained(made[0])
    assert torch.equal(generated, original.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_gradients_reach_adapters(made):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    dense, compressed = rac.load_model(made[2]), rac.load_model(made[2], resident="compressed")
    found = []
    for model in (dense, compressed):
        torch.manual_seed(0)
        tuned = get_peft_model(model, LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False))
        tuned(**models.inputs(model)).logits.square().sum().backward()
        found.append([p.grad.clone() for n, p in tuned.named_parameters() if "lora" in n])
    assert len(found[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_dense_model_is_not_saved_without_them(made, tmp_path):
    model = rac.load_model(made[2])
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(UnsupportedError, match="online transforms"):
            one.save_pretrained(tmp_path / "no")
    other = copy.deepcopy(model)
    assert rac.runtime.fold(other) is other
    other.save_pretrained(tmp_path / "folded")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert tf.deviation(made[1], again, ids(again)) < 1e-4
    with pytest.raises(UnsupportedError):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_records_keep_them(made, tmp_path):
    for path in made[2:]:
        want = models.logits(rac.load_model(path))
        rac.load_model(path, resident="compressed").save_pretrained(tmp_path / f"a-{path.stem}")
        write_folder(path, tmp_path / f"b-{path.stem}")
        for folder in (f"a-{path.stem}", f"b-{path.stem}"):
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
            assert torch.equal(models.logits(again), want)
        again.dequantize()
        assert torch.equal(models.logits(again), want)
        with pytest.raises(UnsupportedError):
            again.save_pretrained(tmp_path / "no")


def arrays(folder, name, **change):
    """The original as a source, one of its tensors with an online transform that nobody undid."""
    from dataclasses import replace

    from rac.encode.sources import open_source

    source = open_source(folder)
    return replace(source, tensors=tuple(replace(t, **change) if t.name == name else t for t in source.tensors))


def test_layers_that_cannot(made, tmp_path):
    up, embedding = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    for i, name in enumerate((up, embedding)):
        pack_source(arrays(made[0], name, online=Online("hadamard/1", 128)), tmp_path / f"{i}.rac")
    for resident in ("dense", "compressed"):
        model = rac.load_model(tmp_path / "0.rac", resident=resident)
        assert tf.deviation(made[1], model, ids(model)) > 0.1
    with pytest.raises(UnsupportedError, match="online transform"):
        rac.load_model(tmp_path / "1.rac")
    model = rac.load_model(tmp_path / "1.rac", resident="compressed")
    with pytest.raises(MismatchError, match="online transform"):
        models.logits(model)


def test_a_dense_tensor_of_a_folder(made, tmp_path):
    """A matrix that the coder could not make smaller is no record in a folder, and its transform has no place there."""
    name = "model.layers.0.mlp.up_proj.weight"
    noise = np.random.default_rng(0).integers(0, 256, 160 * 128 * 4, dtype=np.uint8)
    pack_source(arrays(made[0], name, data=noise, online=Online("hadamard/1", 128)), tmp_path / "m.rac")
    with rac.open(tmp_path / "m.rac") as f:
        assert [e.method for e in f.archives[0].index.entries if e.name == name] == ["raw/1"]
    with pytest.raises(UnsupportedError, match="cannot state"):
        write_folder(tmp_path / "m.rac", tmp_path / "folder")


def test_vllm_is_refused(made):
    from rac.runtime.vllm_plugin import weights

    with pytest.raises(UnsupportedError, match="vLLM"):
        list(weights(made[2]))


def test_a_layer_alone(made):
    """Called with a keyword; its record replaced by another."""
    model = rac.load_model(made[2], resident="compressed")
    layers = [layer for n, layer in model.named_modules() if n.endswith("down_proj")]
    assert all(isinstance(layer, RacLinear) for layer in layers)
    x = torch.randn(3, 160)
    first = layers[0](x)
    assert torch.equal(first, layers[0].online().apply(x) @ layers[0].dense().t())
    layers[0].record.data = layers[1].record.data.clone()
    layers[0].head = layers[1].head
    assert torch.equal(layers[0](x), layers[1](x))
    dense = dict(rac.load_model(made[2]).named_modules())["model.layers.0.mlp.down_proj"]
    assert torch.equal(dense(input=x), first)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("resident", ["dense", "compressed"])
def test_adapters_merge_into_what_is_folded(made, resident):
    peft = pytest.importorskip("peft")
    model = rac.load_model(made[2], resident=resident)
    plain = models.logits(model)
    config = peft.LoraConfig(target_modules=["up_proj", "down_proj", "o_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    before = models.logits(adapted)
    assert (before - plain).abs().max() > 1e-2 * plain.abs().max()
    merged = adapted.merge_and_unload()
    assert (models.logits(merged) - before).abs().max() < 1e-4 * before.abs().max()
    assert not any(hooked(layer) is not None for layer in merged.modules())
