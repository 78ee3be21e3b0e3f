"""Folders for `from_pretrained`: written, loaded, saved again, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

import rac
import rac.runtime
from rac.encode.pack import pack
from rac.errors import ChecksumError, MismatchError, OutputError, UnsupportedError
from rac.runtime.folder import write_folder
from rac.runtime.layers import Compressed
from rac.runtime.record import TAIL
from support import models


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Kind to (archive at 4 bits, folder of it)."""
    out = {}
    for kind in ("llama", "llama-untied", "gpt2", "bert", "t5"):
        root = tmp_path_factory.mktemp(kind)
        models.write(kind, root / "hf")
        pack(root / "hf", root / "m.rac", bits=4, effort="fast")
        write_folder(root / "m.rac", root / "folder")
        out[kind] = (root / "m.rac", root / "folder")
    return out


def load(folder, **how):
    kind = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, **how)


@pytest.mark.parametrize("kind", ["llama", "llama-untied", "gpt2", "bert", "t5"])
def test_the_same_model_again_and_again(packed, kind, tmp_path):
    path, folder = packed[kind]
    want = models.logits(rac.load_model(path))
    model = load(folder)
    assert any(isinstance(m, Compressed) for m in model.modules())
    assert torch.equal(models.logits(model), want)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    assert torch.equal(models.logits(load(tmp_path / "again")), want)
    rac.load_model(path, resident="compressed").save_pretrained(tmp_path / "third")
    assert torch.equal(models.logits(load(tmp_path / "third")), want)


def test_auto_classes_and_files(packed):
    path, folder = packed["llama"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.dtype == torch.float32 and model.config.quantization_config.quant_method == "rac"
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab").input_ids
    with rac.open(path) as f:
        assert sorted(f.attachments()) == sorted(p.name for p in folder.iterdir() if p.suffix != ".safetensors")


def test_records_are_those_of_the_file(packed):
    path, folder = packed["llama"]
    data = path.read_bytes()
    count = 0
    with rac.open(path) as f, safetensors.safe_open(folder / "model.safetensors", "np") as g:
        for entry in f.archives[0].index.entries:
            if entry.type != 1:
                continue
            tensor = g.get_tensor(entry.name) if len(entry.shape) == 2 else None
            if tensor is not None and tensor.dtype == "uint8":
                assert tensor.tobytes() == data[entry.at : entry.at + entry.size] + bytes(TAIL)
                count += 1
    assert count == 15


def test_several_files(packed, tmp_path):
    path, _ = packed["llama"]
    done = write_folder(path, tmp_path / "folder", shard=100_000)
    files = sorted((tmp_path / "folder").glob("model-*.safetensors"))
    assert len(files) > 1 and done.size == sum(p.stat().st_size for p in (tmp_path / "folder").iterdir())
    assert torch.equal(models.logits(load(tmp_path / "folder", device_map="auto")), models.logits(rac.load_model(path)))


def test_dense_model_saves_as_any(packed, tmp_path):
    path, _ = packed["llama"]
    model = rac.load_model(path)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(models.logits(load(tmp_path / "dense")), models.logits(model))


def test_existing_folder(packed, tmp_path):
    path, _ = packed["llama"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        write_folder(path, tmp_path / "folder")
    write_folder(path, tmp_path / "folder", force=True)
    assert not (tmp_path / "folder" / "old").exists()


def test_nothing_is_left_of_a_folder_that_failed(packed, tmp_path):
    data = bytearray(packed["llama"][0].read_bytes())
    with rac.open(packed["llama"][0]) as f:
        data[f._tensors["model.norm.weight"][1].at + 200] ^= 1
    (tmp_path / "m.rac").write_bytes(data)
    with pytest.raises(ChecksumError):
        write_folder(tmp_path / "m.rac", tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["m.rac"]


def test_another_version_is_refused(packed, tmp_path):
    write_folder(packed["llama"][0], tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = "7.0"
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"7\.0"):
        load(tmp_path / "folder")


def test_another_shape_is_refused(packed, tmp_path):
    write_folder(packed["llama"][0], tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(MismatchError, match=r"160.*80|80.*160"):
        load(tmp_path / "folder")


def test_quantised_by_another_method(tmp_path):
    models.write("llama", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    pack(tmp_path / "hf", tmp_path / "m.rac")
    with pytest.raises(UnsupportedError, match="another method"):
        write_folder(tmp_path / "m.rac", tmp_path / "folder")
    with pytest.raises(UnsupportedError, match="another method"):
        rac.load_model(tmp_path / "m.rac", resident="compressed")
