"""`rac.load_model` and `rac.load_tokenizer`: the same model bit for bit, dense or compressed, or one clear error."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rac
from rac.encode.pack import pack
from rac.errors import ChecksumError, MismatchError, SourceError, UnsupportedError
from rac.runtime import RacEmbedding, RacLinear
from rac.runtime.layers import Compressed
from support import models


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Every kind: (original, lossless archive, archive at 4 bits)."""
    out = {}
    for kind in models.KINDS:
        root = tmp_path_factory.mktemp(kind)
        model = models.write(kind, root / "hf")
        pack(root / "hf", root / "m.rac")
        pack(root / "hf", root / "4.rac", bits=4, effort="fast", calibrate="none")
        out[kind] = (model, root / "m.rac", root / "4.rac")
    return out


@pytest.fixture
def folder(tmp_path):
    models.write("llama", tmp_path / "hf")
    return tmp_path / "hf"


def alive():
    """Models that are in memory."""
    gc.collect()
    return sum(type(o) is transformers.LlamaForCausalLM for o in gc.get_objects())


def held(model):
    return [m for m in model.modules() if isinstance(m, Compressed)]


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("resident", ["dense", "compressed"])
def test_logits_are_those_of_the_original(packed, kind, resident):
    original, path, _ = packed[kind]
    model = rac.load_model(path, resident=resident)
    assert type(model) is type(original) and model.dtype == torch.bfloat16 and not model.training
    assert bool(held(model)) is (resident == "compressed")
    for _ in range(3):  # the second run decodes ahead
        assert torch.equal(models.logits(model), models.logits(original))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_lossy_is_the_same_dense_and_compressed(packed, kind):
    original, _, path = packed[kind]
    dense, small = (rac.load_model(path, resident=r) for r in ("dense", "compressed"))
    assert torch.equal(models.logits(dense), models.logits(small))
    assert not torch.equal(models.logits(dense), models.logits(original))


def test_every_matrix_of_a_plain_layer_stays_compressed(packed):
    model = rac.load_model(packed["llama"][1], resident="compressed")
    # 7 matrices in each of 2 layers, and the embedding, which is the output layer too
    assert sum(isinstance(m, RacLinear) for m in model.modules()) == 15
    assert sum(isinstance(m, RacEmbedding) for m in model.modules()) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(m.record.dtype == torch.uint8 for m in held(model))
    gpt2 = rac.load_model(packed["gpt2"][1], resident="compressed")
    assert sum(isinstance(m, RacLinear) and m.transposed for m in gpt2.modules()) == 8


def test_t5_keeps_what_looks_at_its_weight(packed):
    model = rac.load_model(packed["t5"][1], resident="compressed")
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is torch.nn.Linear


def test_layers_of_derived_classes_and_what_is_tied_to_them_stay_compressed(packed, tmp_path):
    st = pytest.importorskip("safetensors.torch")
    original, path, _ = packed["gemma"]
    shutil.copytree(path.parent / "hf", tmp_path / "hf")
    state = st.load_file(tmp_path / "hf" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()  # files may have both names
    st.save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    pack(tmp_path / "hf", tmp_path / "m.rac")
    for file in (path, tmp_path / "m.rac"):
        model = rac.load_model(file, resident="compressed")
        assert "RacGemma3TextScaledWordEmbedding" in repr(model) and isinstance(model.lm_head, RacLinear)
        assert model.lm_head.record is model.model.embed_tokens.record_of("weight")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert len(held(model)) == 15
        assert torch.equal(models.logits(model), models.logits(original))


def test_tied_weights_stay_tied(packed):
    for kind, tied in (("llama", True), ("llama-untied", False), ("gpt2", True)):
        model = rac.load_model(packed[kind][1])
        same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert same is tied, kind


def test_dtype_and_generation_settings(packed, tmp_path):
    path = packed["llama"][1]
    wide = transformers.AutoModelForCausalLM.from_pretrained(path.parent / "hf", dtype=torch.float32)
    for resident in ("dense", "compressed"):
        model = rac.load_model(path, resident=resident, dtype=torch.float32)
        assert model.dtype == torch.float32
        assert torch.equal(models.logits(model), models.logits(wide))
    shutil.copytree(path.parent / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"temperature": 0.125, "do_sample": True}))
    pack(tmp_path / "hf", tmp_path / "m.rac")
    assert rac.load_model(tmp_path / "m.rac").generation_config.temperature == 0.125


def test_tokenizer(packed):
    tokenizer = rac.load_tokenizer(packed["llama"][1])
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"


def test_shards(folder, tmp_path):
    pack(folder, tmp_path / "set.rac", shard_size=200_000)
    first = sorted(tmp_path.glob("set-*.rac"))[0]
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for resident in ("dense", "compressed"):
        assert torch.equal(models.logits(rac.load_model(first, resident=resident)), models.logits(whole))


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("resident", ["dense", "compressed"])
class TestRefused:
    def refused(self, folder, resident, error, *words):
        pack(folder, folder.parent / "m.rac", force=True)
        before = alive()
        with pytest.raises(error) as found:
            rac.load_model(folder.parent / "m.rac", resident=resident)
        text = str(found.value)
        assert all(word in text for word in ("m.rac", *words)), text
        del found
        assert alive() == before  # nothing partly filled is left

    def test_another_shape(self, folder, resident):
        change_config(folder, intermediate_size=80)
        self.refused(folder, resident, MismatchError, "mlp.", "160", "80")

    def test_missing_tensor(self, folder, resident):
        change_config(folder, num_hidden_layers=3)
        self.refused(folder, resident, MismatchError, "model.layers.2.", "holds no tensor", "more")

    def test_unknown_class(self, folder, resident):
        change_config(folder, architectures=["LlamaForNothing"])
        self.refused(folder, resident, UnsupportedError, "LlamaForNothing", transformers.__version__)

    def test_unknown_kind(self, folder, resident):
        change_config(folder, model_type="nothing")
        self.refused(folder, resident, UnsupportedError, "nothing", "config.json")

    def test_no_architecture(self, folder, resident):
        change_config(folder, architectures=None)
        self.refused(folder, resident, UnsupportedError, "architecture")

    def test_code_of_its_own(self, folder, resident):
        change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
        self.refused(folder, resident, UnsupportedError, "trust_remote_code")

    def test_config_is_no_json(self, folder, resident):
        (folder / "config.json").write_text("{")
        self.refused(folder, resident, SourceError, "config.json")

    def test_no_config(self, folder, resident):
        (folder / "config.json").unlink()
        self.refused(folder, resident, SourceError, "config.json")


def test_code_of_its_own_runs_when_trusted(folder, tmp_path):
    (folder / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\nclass X(LlamaForCausalLM): pass\n"
    )
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"}, architectures=["X"])
    pack(folder, tmp_path / "m.rac")
    with pytest.raises(UnsupportedError, match="trust_remote_code"):
        rac.load_tokenizer(tmp_path / "m.rac")
    model = rac.load_model(tmp_path / "m.rac", trust_remote_code=True)
    assert type(model).__name__ == "X"
    assert models.logits(model).shape == (2, 12, models.VOCABULARY)


def test_unused_tensors_are_named(folder, tmp_path):
    change_config(folder, num_hidden_layers=1)
    pack(folder, tmp_path / "m.rac")
    with pytest.warns(UserWarning, match=r"no use for tensor 'model\.layers\.1"):
        rac.load_model(tmp_path / "m.rac")


@pytest.mark.parametrize("resident", ["dense", "compressed"])
def test_damage_names_the_tensor(folder, tmp_path, resident):
    pack(folder, tmp_path / "m.rac")
    with rac.open(tmp_path / "m.rac") as f:
        archive, entry = f._tensors["model.layers.1.mlp.down_proj.weight"]
        at = archive.record(entry).payload + 4000
    data = bytearray((tmp_path / "m.rac").read_bytes())
    data[at] ^= 1
    (tmp_path / "m.rac").write_bytes(data)
    with pytest.raises(ChecksumError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        models.logits(rac.load_model(tmp_path / "m.rac", resident=resident))


def test_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import rac; rac.load_model('x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in done.stderr and "rac-codec[transformers]" in done.stderr


def test_arguments(packed):
    with pytest.raises(ValueError, match="resident"):
        rac.load_model(packed["llama"][1], resident="zip")
    with pytest.raises(ValueError, match="device_map"):
        rac.load_model(packed["llama"][1], device="cpu", device_map="auto")
    with pytest.raises(SourceError):
        rac.load_model("/nowhere.rac")


def test_device_map(packed):
    original, path, _ = packed["llama"]
    for how in ({"device": "cpu"}, {"device_map": "auto"}):
        model = rac.load_model(path, resident="compressed", **how)
        assert torch.equal(models.logits(model), models.logits(original))


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="device 'nothing': "):
        rac.load_model(tmp_path / "m.rac", device="nothing")
