"""`rac generate`, `rac perplexity`, `rac pack --format hf`."""

from __future__ import annotations

import json
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import quantised_models
import rac
import rac.runtime  # noqa: F401 - the quantizer
from rac.calibrate.evaluate import Measure
from rac.cli import main
from rac.encode.pack import pack, pack_source
from rac.methods import transforms
from rac.runtime.simulate import simulated
from rac.runtime.text import perplexity
from support import models


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    models.write("llama", root / "hf")
    pack(root / "hf", root / "m.rac")
    (root / "text.txt").write_text(models.TEXT)
    (root / "short.txt").write_text("short")
    return root


def test_generate_writes_the_same_dense_and_compressed(packed, capsys):
    wrote = []
    for resident in ("dense", "compressed"):
        assert main(["generate", str(packed / "m.rac"), "ab", "--tokens", "9", "--resident", resident]) == 0
        out, err = capsys.readouterr()
        wrote.append(out)
        assert re.fullmatch(r"\d tokens in [\d.]+ s, [\d.]+ per second\n", err.splitlines(keepends=True)[-1])
    assert wrote[0] == wrote[1] and wrote[0].startswith("ab")


def test_generate_says_what_cannot_write_alone(tmp_path, capsys):
    models.write("t5", tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    assert main(["generate", str(tmp_path / "m.rac"), "ab"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "T5ForConditionalGeneration is no causal language model" in err


def test_generate_samples_by_seed(packed, capsys):
    def run(seed):
        assert main(["generate", str(packed / "m.rac"), "ab", "--tokens", "9", "--sample", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert run("1") == run("1") != run("2")


@pytest.mark.parametrize("resident", ["dense", "compressed"])
def test_perplexity_is_that_of_compare(packed, capsys, resident):
    args = ["--text", str(packed / "text.txt"), "--tokens", "300", "--context", "100", "--dtype", "float32"]
    assert main(["perplexity", str(packed / "m.rac"), *args, "--resident", resident]) == 0
    out = capsys.readouterr().out
    want = Measure(packed / "hf", models.TEXT, 300, 100).figures().perplexity
    assert f"perplexity {want:.3f} on 300 tokens" in out and f"({resident}, float32," in out


def test_pack_to_a_folder(packed, tmp_path, capsys):
    options = ["--format", "hf", "--bits", "4", "--calibrate", "none"]
    assert main(["pack", str(packed / "hf"), "-o", str(tmp_path / "a"), *options]) == 0
    assert "of them compressed" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert main(["pack", str(packed / "m.rac"), "-o", str(tmp_path / "b"), "--format", "hf"]) == 0
    original = transformers.AutoModelForCausalLM.from_pretrained(packed / "hf")
    assert torch.equal(
        models.logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")), models.logits(original)
    )
    capsys.readouterr()
    assert main(["pack", str(packed / "m.rac"), "-o", str(tmp_path / "b"), "--format", "hf"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "b"), "-o", str(tmp_path / "again.rac")]) == 0
    assert "weights are records of an archive already (--format hf), and are copied" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "again.rac"), "--against", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(["pack", str(tmp_path / "b"), "-o", str(tmp_path / "c"), "--format", "hf"]) == 2
    assert "is such a folder already" in capsys.readouterr().err


@pytest.mark.filterwarnings("default:rac. .*loaded as the numbers")
def test_a_quantised_model_to_a_folder(packed, tmp_path, capsys):
    source = quantised_models.make("fp8", packed / "hf", tmp_path / "fp8")
    assert main(["pack", str(source), "-o", str(tmp_path / "a"), "--format", "hf"]) == 0
    out, err = capsys.readouterr()
    assert "15 of them compressed" in out and err.count("loaded as the numbers that they stand for") == 1


def test_errors_are_one_line(packed, tmp_path, capsys):
    cases = [
        (["generate", "/nowhere.rac", "x"], 2, "No such file"),
        (["generate", str(packed / "m.rac"), ""], 2, "prompt"),
        (["generate", str(packed / "m.rac"), "x", "--tokens", "0"], 2, "--tokens"),
        (["generate", str(packed / "m.rac"), "x", "--device", "nothing"], 2, "device"),
        (["perplexity", str(packed / "m.rac"), "--text", str(packed / "short.txt")], 2, "5 tokens"),
        (["perplexity", str(packed / "m.rac"), "--text", "/nowhere.txt"], 2, "nowhere"),
        (["perplexity", str(packed / "m.rac"), "--text", str(packed / "text.txt"), "--context", "1"], 2, "window"),
    ]
    for args, code, word in cases:
        assert main(args) == code, args
        err = capsys.readouterr().err.splitlines()
        assert err[-1].startswith("rac: ") and word in err[-1], (args, err)


def test_an_encoder_does_not_write(tmp_path, capsys):
    models.write("bert", tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    assert main(["generate", str(tmp_path / "m.rac"), "x"]) == 1
    assert "no causal language model" in capsys.readouterr().err


def test_weights_alone_are_no_model(packed, tmp_path, capsys):
    pack(packed / "hf" / "model.safetensors", tmp_path / "m.rac")
    assert main(["generate", str(tmp_path / "m.rac"), "x"]) == 2
    assert "Hugging Face folder" in capsys.readouterr().err


def test_help_teaches(capsys):
    for command, words in (("generate", ("--resident", "rac generate m.rac")), ("perplexity", ("windows", "--text"))):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert all(w in out for w in words)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    """An untied model, the same rotated by QuaRot, and their files."""
    root = tmp_path_factory.mktemp("rotated")
    models.write("llama-untied", root / "hf", torch.float32)
    pack(root / "hf", root / "plain.rac")
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "hf")
    ids = models.inputs(model)["input_ids"]
    before = transforms.logits(model, ids)
    p = transforms.parts(model)
    transforms.quarot(p, 3)
    transforms.require_same(before, p, ids)
    pack_source(transforms.source(p, root / "hf"), root / "quarot.rac", settings=p.about)
    (root / "text.txt").write_text(models.TEXT)
    return root


TEXT = ["--tokens", "200", "--context", "100"]


def test_simulated_activations(rotated, capsys):
    """Perplexity and compare measure the same, behind the maps of the file and with the keys that it names."""
    text = ["--text", str(rotated / "text.txt"), *TEXT]
    files = [str(rotated / f"{name}.rac") for name in ("plain", "quarot")]
    bits = ["--activations", "4", "--kv", "3"]
    assert main(["compare", str(rotated / "hf"), *files, *text, *bits, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["kl"] == 0 and min(row["kl"] for row in rows[1:]) > 0.01
    for file, row in zip(files, rows[1:], strict=True):
        model, tokenizer = rac.load_model(file), rac.load_tokenizer(file)
        keys = {"rotate_keys": True, "seed": 3} if "quarot" in file else {}
        with simulated(model, 4, 3, **keys):
            want, _, _ = perplexity(model, tokenizer, models.TEXT, 200, 100)
        assert row["perplexity"] == pytest.approx(want, rel=1e-4)
        assert main(["perplexity", file, *text, *bits]) == 0
        out = capsys.readouterr().out
        assert f"perplexity {want:.3f} on 200 tokens" in out and "4-bit activations, 3-bit cache" in out
    assert main(["compare", str(rotated / "hf"), *files, *text, "--activations", "16", "--clip", "1", "--json"]) == 0
    assert max(row["kl"] for row in json.loads(capsys.readouterr().out)) < 1e-3


def test_simulation_is_refused_in_one_line(rotated, capsys):
    plain, turned = str(rotated / "plain.rac"), str(rotated / "quarot.rac")
    text = ["--text", str(rotated / "text.txt"), *TEXT]
    cases = [
        (["perplexity", plain, *text, "--activations", "1"], 2, "2 to 16"),
        (["perplexity", plain, *text, "--kv", "0"], 2, "1 to 16"),
        (["perplexity", plain, *text, "--kv", "4", "--clip", "2"], 2, "clip"),
        (["compare", str(rotated / "hf"), plain, "--activations", "4"], 2, "--text"),
        (["perplexity", turned, *text, "--activations", "4", "--resident", "compressed"], 1, "dense"),
    ]
    for args, code, word in cases:
        assert main(args) == code, args
        err = capsys.readouterr().err.splitlines()
        assert err[-1].startswith("rac: ") and word in err[-1], (args, err)
