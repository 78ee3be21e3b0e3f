"""`rac pack --calibrate`: what a text does not reach is named, and how a model reads it can be said."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.torch")

import rac
from rac.cli import main
from support import models

SIZES = {"d_model": 128, "decoder_ffn_dim": 160, "decoder_layers": 2, "decoder_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    models.write("llama", root / "hf")
    torch.manual_seed(0)
    words = transformers.AutoTokenizer.from_pretrained(root / "hf")
    config = transformers.BartConfig(vocab_size=len(words), max_position_embeddings=64, pad_token_id=0, **SIZES)
    transformers.BartForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "bart")
    words.save_pretrained(root / "bart")
    (root / "text.txt").write_text(models.TEXT)
    return root


def pack(folder, kind, out, *more):
    text = ["--calibrate", str(folder / "text.txt"), "--tokens", "256", "--cache", "none", "--effort", "fast"]
    return main(["pack", str(folder / kind), "-o", str(out), "--bits", "4", *text, *more])


def test_what_a_text_does_not_reach(folder, tmp_path, capsys):
    assert pack(folder, "bart", tmp_path / "m.rac") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "does not reach" in line]
    assert len(said) == 1 and said[0].startswith("rac: text does not reach: cross attention: 8 tensors, ")
    assert "rac.calibrate does" in said[0] and "encoder_attn.k_proj" in said[0]


def test_how_a_model_reads_the_text(folder, tmp_path, capsys):
    found, sizes = {}, set()
    for name, more in {"usual": [], "short": ["--context", "32"], "forward": ["--no-backward"]}.items():
        assert pack(folder, "hf", tmp_path / f"{name}.rac", *more) == 0
        with rac.open(tmp_path / f"{name}.rac") as f:
            found[name] = f.archives[0].header["provenance"]["calibrate"]
            sizes.add(tuple(e.size for e in f.archives[0].index.entries))
    assert found["short"] == [found["usual"][0] | {"context": 32}]
    assert found["forward"] == [found["usual"][0] | {"backward": False}]
    assert len(sizes) > 1  # whole files may be as long by chance
    capsys.readouterr()
    source, out = str(folder / "hf"), str(tmp_path / "x.rac")
    assert main(["pack", source, "-o", out, "--bits", "4", "--calibrate", "none", "--no-backward"]) == 2
    assert "give one with --calibrate" in capsys.readouterr().err


def test_weights_that_torch_pickled_are_calibrated_like_others(folder, tmp_path, capsys):
    pickled = tmp_path / "pickled"
    shutil.copytree(folder / "hf", pickled)
    weights = st.load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    assert pack(folder, "hf", tmp_path / "a.rac") == 0
    assert main(["pack", str(pickled), "-o", str(tmp_path / "x"), "--bits", "4", "--calibrate", "none"]) == 2
    assert "--allow-pickle-weights" in capsys.readouterr().err
    assert main(["pack", str(pickled), "-o", str(tmp_path / "x"), "--format", "hf", "--allow-pickle-weights"]) == 0
    call = ["pack", str(pickled), "-o", str(tmp_path / "b.rac"), "--bits", "4", "--calibrate", str(folder / "text.txt")]
    call += ["--tokens", "256", "--cache", "none", "--effort", "fast", "--allow-pickle-weights"]
    call += ["--report", str(report := tmp_path / "report.json")]
    assert main(call) == 0
    assert "does not reach" not in capsys.readouterr().err
    found = [rac.open(tmp_path / name).archives[0].header["provenance"]["calibrate"] for name in ("a.rac", "b.rac")]
    assert found[0] == found[1]  # the same text, as many tokens
    assert np.mean([f["snr"] for f in json.loads(report.read_text())["tensors"]]) > 25  # from the weights alone: 15
