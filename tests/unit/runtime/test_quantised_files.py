"""What other tools have quantised, packed losslessly: a loaded model has the numbers that the codes stand for."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import quantised_models  # noqa: E402
import rac  # noqa: E402
from rac.encode.sources import open_source  # noqa: E402
from rac.errors import MismatchError, RacError, UnsupportedError  # noqa: E402
from rac.frameworks import to_framework  # noqa: E402
from rac.runtime import made, record, replace  # noqa: E402
from rac.runtime.folder import write_folder  # noqa: E402
from rac.runtime.layers import RacLinear  # noqa: E402
from support import models  # noqa: E402


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    models.write("llama", folder)
    return folder


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("fp8", "no device here runs it as it is"),  # blocks that do not divide the matrices
        ("fp8-tensor", "modelopt"),
        ("fp8-e5m2", "config.json states no quantisation"),
        ("nvfp4", "modelopt"),
    ],
)
def test_numbers_where_transformers_cannot(scheme, why, plain, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("transformers may run these")
    folder = quantised_models.make(scheme, plain, tmp_path / scheme)
    rac.pack(folder, tmp_path / "m.rac")
    with pytest.warns(UserWarning, match=f"loaded as the numbers that they stand for .*{why}"):
        model = rac.load_model(tmp_path / "m.rac")
    assert not hasattr(model.config, "quantization_config")
    for t in open_source(folder, dequantise=True).tensors:
        assert torch.equal(model.get_parameter(t.name), to_framework(t.read(0, t.nbytes), t.dtype, t.shape, "pt"))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24)[None] * 7 % 250).logits


def linear(model):
    return [m for m in model.modules() if isinstance(m, RacLinear)]


@pytest.mark.parametrize("scheme", quantised_models.SCHEMES)
@pytest.mark.filterwarnings("ignore:rac. .*loaded as the numbers")
def test_compressed_is_the_dense_load_bit_for_bit(scheme, plain, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("transformers may run the dense one as it is")
    folder = quantised_models.make(scheme, plain, tmp_path / scheme)
    rac.pack(folder, tmp_path / "m.rac")
    want = logits(rac.load_model(tmp_path / "m.rac"))
    model = rac.load_model(tmp_path / "m.rac", resident="compressed")
    held = replace.residency(model)
    stored = sum(t.nbytes for t in open_source(folder).tensors)
    assert held.records == 15 and held.held < 0.65 * held.instead
    assert held.held < stored or not scheme.startswith("fp8")  # else heads of records weigh more in small models
    assert [layer.head.making is not None for layer in linear(model)] == [True] * 14 + [False]  # the output layer
    assert torch.equal(logits(model), want)
    layer = model.model.layers[1].mlp.down_proj
    assert torch.equal(layer.weight[3:5].float(), layer.dense()[3:5].float())
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), want)
    assert torch.equal(logits(model.dequantize()), want)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "nvfp4-packed"])
@pytest.mark.filterwarnings("ignore:rac. .*loaded as the numbers")
def test_folders_for_from_pretrained(scheme, plain, tmp_path):
    rac.pack(quantised_models.make(scheme, plain, tmp_path / scheme), tmp_path / "m.rac")
    want = logits(rac.load_model(tmp_path / "m.rac", resident="compressed"))
    written = write_folder(tmp_path / "m.rac", tmp_path / "hf")
    assert written.records == 15
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert len(linear(model)) == 15 and torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), want)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["quantization_config"]["made"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="records of tensors of several shapes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.filterwarnings("ignore:rac. .*loaded as the numbers")
def test_equal_scales_are_one_record_of_several_names(plain, tmp_path):
    folder = quantised_models.make("fp8-tensor", plain, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    scales = [name for name in tensors if name.endswith("weight_scale")]
    save_file(tensors | {name: torch.tensor(0.001) for name in scales}, folder / "model.safetensors", {"format": "pt"})
    rac.pack(folder, tmp_path / "m.rac")
    want = logits(rac.load_model(tmp_path / "m.rac"))
    assert torch.equal(logits(rac.load_model(tmp_path / "m.rac", resident="compressed")), want)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.filterwarnings("ignore:rac. .*loaded as the numbers")
def test_damaged_codes_and_scales_are_found_when_the_layer_runs(part, plain, tmp_path):
    rac.pack(quantised_models.make("fp8", plain, tmp_path / "m"), tmp_path / "m.rac")
    model = rac.load_model(tmp_path / "m.rac", resident="compressed")
    layer = linear(model)[0]
    a, b = record.split(layer.record.numpy())[part]
    t = record.parse(layer.record.numpy()[a:b]).tensor
    layer.record[a + t.record.payload + t.units[-1].offset] ^= 1
    with pytest.raises(RacError):
        logits(model)


def test_a_weight_whose_parts_do_not_fit_is_refused(plain, tmp_path):
    rac.pack(quantised_models.make("fp8", plain, tmp_path / "m"), tmp_path / "m.rac")
    with rac.open(tmp_path / "m.rac") as f:
        archive = f.archives[0]
        rows = {e.name: record.collect(archive, e) for e in archive.index.entries if e.dtype}
    name = "model.layers.0.mlp.up_proj.weight"
    making = made.Making.of({"quant_method": "fp8"}, "BF16", [name, f"{name}_scale_inv"])
    good = np.concatenate([rows[name], rows[f"{name}_scale_inv"]])
    assert made.Made(good, making).tensor.shape == (160, 128)
    for other in (rows[name], np.concatenate([rows[name], rows["model.layers.0.self_attn.q_proj.weight"]]), good[:-1]):
        with pytest.raises(RacError):
            made.Made(other, making)


def test_a_method_that_nobody_knows_is_refused(plain, tmp_path):
    folder = quantised_models.make("fp8", plain, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "new"}
    (folder / "config.json").write_text(json.dumps(config))
    rac.pack(folder, tmp_path / "m.rac")
    for resident, what in (("dense", "transformers cannot load 'new' here"), ("compressed", "load it dense: config")):
        with pytest.raises(UnsupportedError, match=what) as e:
            rac.load_model(tmp_path / "m.rac", resident=resident)
        assert "\n" not in str(e.value)


def test_plain_models_ask_nothing(plain, tmp_path):
    rac.pack(plain, tmp_path / "m.rac")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rac.load_model(tmp_path / "m.rac")
