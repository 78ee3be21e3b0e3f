"""Folders for `from_pretrained`: written, loaded, saved again, refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

import rac
import rac.runtime
from rac.decode.unpack import names_of_files
from rac.encode.pack import pack
from rac.errors import ChecksumError, MismatchError, OutputError, SourceError, UnsupportedError
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
        pack(root / "hf", root / "m.rac", bits=4, effort="fast", calibrate="none")
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


def test_its_folder_is_no_archive_and_no_source(packed, tmp_path):
    folder = packed["llama"][1]
    with pytest.raises(SourceError, match="after `import rac.runtime`"):
        rac.load_model(folder)
    with pytest.raises(SourceError, match="records of an archive already.*pack its original"):
        pack(folder, tmp_path / "m.rac", bits=4, calibrate="none")


def test_auto_classes_and_files(packed):
    path, folder = packed["llama"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.dtype == torch.float32 and model.config.quantization_config.quant_method == "rac"
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab").input_ids
    with rac.open(path) as f:
        assert sorted(names_of_files(f)) == sorted(p.name for p in folder.iterdir() if p.suffix != ".safetensors")


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


@pytest.mark.filterwarnings("error")
def test_files_beside_the_model(tmp_path):
    """Weights of other files travel, but are not the model's."""
    from safetensors.torch import load_file, save_file

    model = models.write("llama-untied", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({n.removeprefix("model."): w for n, w in weights.items()}, tmp_path / "hf" / "consolidated.safetensors")
    save_file({n: w.half() for n, w in weights.items()}, tmp_path / "hf" / "model.fp16.safetensors")
    path = tmp_path / "m.rac"
    pack(tmp_path / "hf", path)
    for resident in ("dense", "compressed"):
        assert torch.equal(models.logits(rac.load_model(path, resident=resident)), models.logits(model))
    assert write_folder(path, tmp_path / "folder").tensors == len(weights)
    assert torch.equal(models.logits(load(tmp_path / "folder")), models.logits(model))


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


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_existing_folder_is_replaced_only_if_it_is_ours(packed, tmp_path):
    path, folder = packed["llama"][0], tmp_path / "folder"
    folder.mkdir()
    write_folder(path, folder, force=True)  # an empty one
    made = content(folder)
    with pytest.raises(OutputError, match="exists"):
        write_folder(path, folder)
    write_folder(packed["gpt2"][0], folder, force=True)
    assert content(folder)["config.json"] != made["config.json"]
    write_folder(path, folder, force=True)
    assert content(folder) == made
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt"])
def test_what_others_put_into_a_folder_stays(packed, tmp_path, name):
    path, folder = packed["llama"][0], tmp_path / "folder"
    write_folder(path, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = content(folder)
    with pytest.raises(OutputError, match=f"holds '{name}', which rac did not write"):
        write_folder(path, folder, force=True)
    (folder / name).unlink()
    (folder / "link").symlink_to("/")
    with pytest.raises(OutputError, match="holds 'link'"):
        write_folder(path, folder, force=True)
    assert {**before, **content(folder)} == before and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_folders_of_others_and_files_stay(packed, tmp_path):
    path, folder = packed["llama"][0], tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis").write_text("mine")
    with pytest.raises(OutputError, match="did not write"):
        write_folder(path, folder, force=True)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(OutputError, match="did not write"):
        write_folder(path, folder, force=True)
    with pytest.raises(OutputError, match="no folder"):
        write_folder(path, folder / "thesis", force=True)
    assert (folder / "thesis").read_text() == "mine"


def test_a_link_stays_and_its_folder_is_replaced(packed, tmp_path):
    path, folder, link = packed["llama"][0], tmp_path / "folder", tmp_path / "link"
    link.symlink_to(folder)
    write_folder(path, link, force=True)
    write_folder(path, link, force=True)
    assert link.is_symlink() and (folder / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link"]


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_exchange_leaves_the_old_folder(packed, tmp_path, monkeypatch, call):
    """Ctrl-C between the two renames, and before the first."""
    path, folder = packed["llama"][0], tmp_path / "folder"
    write_folder(path, folder)
    before, real, calls = content(folder), os.rename, []

    def rename(a, b):
        calls.append(a)
        if len(calls) == call:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write_folder(packed["gpt2"][0], folder, force=True)
    assert content(folder) == before and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_nothing_is_left_of_a_folder_that_failed(packed, tmp_path):
    data = bytearray(packed["llama"][0].read_bytes())
    with rac.open(packed["llama"][0]) as f:
        data[f._tensors["model.norm.weight"][1].at + 200] ^= 1
    (tmp_path / "m.rac").write_bytes(data)
    with pytest.raises(ChecksumError):
        write_folder(tmp_path / "m.rac", tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["m.rac"]


def test_a_damaged_record_goes_into_no_folder(packed, tmp_path):
    """Records are not decoded on the way, but their checksums are looked at."""
    path, _ = packed["llama"]
    with rac.open(path) as f:
        entry = next(e for e in f.archives[0].index.entries if e.name.endswith("down_proj.weight"))
    data = bytearray(path.read_bytes())
    data[entry.at + entry.size // 2] ^= 1
    (tmp_path / "m.rac").write_bytes(data)
    with pytest.raises(ChecksumError, match="down_proj"):
        write_folder(tmp_path / "m.rac", tmp_path / "folder")
    assert os.listdir(tmp_path) == ["m.rac"]


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
