"""`rac pack --recipe`: every named method to a file, which is loaded and run."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rac
from rac.cli import main
from rac.methods.named import METHODS
from support import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    models.write("llama", root / "hf")
    (root / "text.txt").write_text(models.TEXT)
    return root


def pack(folder, out, *more):
    return main(["pack", str(folder / "hf"), "-o", str(out), *more])


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_is_packed_loaded_and_run(folder, tmp_path, capsys, name):
    text = ["--calibrate", str(folder / "text.txt"), "--tokens", "400"]
    path = tmp_path / f"{name}.rac"
    assert pack(folder, path, "--recipe", name, "--bits", "8", "--group", "16", "--steps", "3", *text) == 0
    out = capsys.readouterr().out
    assert re.search(rf"{name}, \d+ tensors quantised at [\d.]+ bits per weight", out)
    noise = [float(line.split()[4]) for line in out.splitlines() if ".weight " in line]
    assert len(noise) == 7 and all(35 < snr < 55 for snr in noise)  # of what was rounded, transformed before or not
    original = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    wanted = models.logits(original)
    for resident in ("dense", "compressed"):
        got = models.logits(rac.load_model(path, resident=resident, dtype="float32"))
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 0.2  # 8 bits, and BF16
    with rac.open(path) as f:
        about = f.archives[0].header["provenance"]
    assert about["recipe"] == name and about["bits"] == 8 and about["group"] == 16
    assert ("keys" in about) == (name in ("quarot", "spinquant", "kurtail"))
    measure = ["perplexity", str(path), "--text", str(folder / "text.txt"), "--tokens", "200", "--context", "100"]
    assert main([*measure, "--activations", "4", "--kv", "4"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["verify", str(path)]) == 0
    assert main(["info", str(path)]) == 0


def test_fixed_rate_and_entropy_coded_are_the_same_numbers(folder, tmp_path, capsys):
    assert pack(folder, tmp_path / "a.rac", "--recipe", "rtn", "--bits", "4", "--group", "row") == 0
    assert pack(folder, tmp_path / "b.rac", "--recipe", "rtn", "--bits", "4", "--group", "row", "--fixed-rate") == 0
    bits = [float(b) for b in re.findall(r"quantised at ([\d.]+) bits", capsys.readouterr().out)]
    assert bits[0] < bits[1]
    a, b = rac.load_file(tmp_path / "a.rac"), rac.load_file(tmp_path / "b.rac")
    assert all((a[name] == b[name]).all() for name in a)


def test_errors_are_one_line(folder, tmp_path, capsys):
    models.write("gpt2", tmp_path / "gpt2")
    text = ["--calibrate", str(folder / "text.txt")]
    cases = [
        (folder / "hf", ["--recipe", "gptq"], "calibrates on a text"),
        (folder / "hf", ["--recipe", "gptq", "--kl", "0.1", *text], "does not take --kl"),
        (folder / "hf", ["--recipe", "gptq", "--bits", "3.5", *text], "whole --bits"),
        (folder / "hf", ["--recipe", "rtn", "--dry-run"], "does not take --dry-run"),
        (folder / "hf", ["--recipe", "kurtail", "--calibrate", "self"], "one text file"),
        (folder / "hf", ["--recipe", "gptq", "--calibrate", "auto"], "one text file"),
        (folder / "hf", ["--recipe", "gptq", "--calibrate", str(tmp_path / "none.txt")], "cannot be read"),
        (tmp_path / "gpt2", ["--recipe", "quarot"], "gpt2"),
        ("org/name", ["--recipe", "rtn"], "rtn takes the folder of a causal language model"),
    ]
    for src, more, said in cases:
        assert main(["pack", str(src), "-o", str(tmp_path / "x.rac"), *more]) == 2, more
        err = capsys.readouterr().err
        assert said in err.splitlines()[-1], (more, err)
        assert not (tmp_path / "x.rac").exists()


def test_the_benchmark_of_all_recipes(folder, tmp_path, capsys):
    import json
    from xml.etree import ElementTree

    text = str(folder / "text.txt")
    args = [
        "compare",
        str(folder / "hf"),
        "--recipes",
        "rtn,gptq,aligned",
        "--bits",
        "3,6",
        "--calibrate",
        text,
        "--calibration-tokens",
        "300",
        "--text",
        text,
        "--tokens",
        "200",
        "--context",
        "100",
        "--group",
        "16",
        "--effort",
        "fast",
        "--out",
        str(tmp_path / "files"),
        "--plot",
        str(tmp_path / "plot.svg"),
    ]
    assert main([*args, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["recipe"], r.get("bits")) for r in rows[1:]] == [
        (n, b) for b in (3, 6) for n in ("rtn", "gptq", "aligned")
    ]
    kl = {(r["recipe"], r["bits"]): r["kl"] for r in rows[1:]}
    assert all(kl[name, 6] < kl[name, 3] for name in ("rtn", "gptq", "aligned"))
    assert all((r["fixed"] is None) == (r["recipe"] == "aligned") and r["seconds"] > 0 for r in rows[1:])
    assert len(ElementTree.parse(tmp_path / "plot.svg").findall(".//{*}path[@class]")) > 5
    assert sorted(p.name for p in (tmp_path / "files").glob("*.rac"))[:2] == ["aligned-3.rac", "aligned-6.rac"]

    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "files").glob("*.rac")}
    assert main([*args, "--reuse", "--activations", "4", "--kv", "4", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [{k: v for k, v in r.items() if "quantised" not in k} for r in again[1:]] == rows[1:]
    assert all(r["kl_quantised"] > 1.5 * r["kl"] for r in again[1:] if r["bits"] == 6)
    assert made == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "files").glob("*.rac")}
    assert main([*args, "--reuse", "--recipes", "rtn", "--group", "32"]) == 0  # another setting: made again
    assert made["rtn-3.rac"] != (tmp_path / "files" / "rtn-3.rac").stat().st_mtime_ns
    table = capsys.readouterr().out.splitlines()
    assert table[0].count("|") == table[-1].count("|") == 10
    assert main(args[:1] + [str(folder / "hf")]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_what_is_learned_serves_all_bits_and_each_seed_has_its_own(folder, tmp_path, capsys):
    import json

    text = str(folder / "text.txt")
    args = [
        "compare",
        str(folder / "hf"),
        "--recipes",
        "quarot,kurtail,rtn",
        "--bits",
        "4,3",
        "--seeds",
        "5,7",
        "--calibrate",
        text,
        "--calibration-tokens",
        "300",
        "--text",
        text,
        "--tokens",
        "200",
        "--context",
        "100",
        "--group",
        "16",
        "--steps",
        "3",
        "--out",
        str(tmp_path),
    ]
    assert main([*args, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)[1:]
    assert [(r["recipe"], r["bits"], r["seed"]) for r in rows] == [
        (n, b, s) for b in (4, 3) for n, s in (("quarot", 5), ("quarot", 7), ("kurtail", 5), ("kurtail", 7), ("rtn", 5))
    ]
    assert main([*args, "--reuse"]) == 0
    table = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    means = [row for row in table if row[2] == "mean of 2"]
    assert [row[:2] for row in means] == [["kurtail", "4"], ["kurtail", "3"], ["quarot", "4"], ["quarot", "3"]]
    a, b = (r["kl"] for r in rows if (r["recipe"], r["bits"]) == ("quarot", 3))
    assert means[3][7] == f"{(a + b) / 2:.4f} ({min(a, b):.4f} to {max(a, b):.4f})"
    assert all(len(row) == len(table[0]) for row in table)
    learned = []
    for name in ("kurtail-4", "kurtail-3", "kurtail-4-7", "kurtail-3-7"):
        with rac.open(tmp_path / f"{name}.rac") as f:
            learned.append(f.attachment("rotations/learned.bin"))
    assert learned[0] == learned[1] != learned[2] == learned[3]
    alone = tmp_path / "alone.rac"
    assert (
        main(
            [
                "pack",
                str(folder / "hf"),
                "-o",
                str(alone),
                "--recipe",
                "kurtail",
                "--bits",
                "3",
                "--seed",
                "7",
                "--calibrate",
                text,
                "--tokens",
                "300",
                "--group",
                "16",
                "--steps",
                "3",
            ]
        )
        == 0
    )
    a, b = rac.load_file(alone), rac.load_file(tmp_path / "kurtail-3-7.rac")
    assert all((a[name] == b[name]).all() for name in a)
    assert main([*args[:6], "--seeds", "1,1", *args[8:]]) == 2
    assert "different whole numbers" in capsys.readouterr().err


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Experts that the model fuses and the files hold one by one, and a router."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    words = models.tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": len(words)}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    model.save_pretrained(folder / "hf")
    words.save_pretrained(folder / "hf")
    (folder / "text.txt").write_text(models.TEXT)
    return folder


def test_fused_experts_are_rounded_one_by_one(mixture, tmp_path, capsys):
    original = transformers.AutoModelForCausalLM.from_pretrained(mixture / "hf", dtype=torch.float32)
    ids = models.tokenizer()(models.TEXT, return_tensors="pt").input_ids[:, :400]
    with torch.no_grad():
        wanted, errors = original(ids).logits, {}
    for name in ("rtn", "gptq"):
        path = tmp_path / f"{name}.rac"
        text = ["--calibrate", str(mixture / "text.txt"), "--tokens", "400"]
        assert pack(mixture, path, "--recipe", name, "--bits", "3", "--group", "16", *text) == 0
        with rac.open(path) as f:
            about = {e.name: e.method for archive in f.archives for e in archive.index.entries}
        assert "32 tensors quantised" in capsys.readouterr().out  # 8 of attention, 24 of experts
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in about
        with torch.no_grad():
            error = rac.load_model(path, dtype="float32")(ids).logits - wanted
        errors[name] = float(error.square().mean() / wanted.square().mean())
    assert errors["gptq"] < errors["rtn"] < 0.5


def test_recipes_know_names_that_files_have(tmp_path, capsys):
    """`query_key_value` of the files is three layers of the module."""
    torch.manual_seed(0)
    words = models.tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(words), "first_k_dense_replace": 2}
    config = transformers.AutoConfig.for_model("sarvam_moe", **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    words.save_pretrained(tmp_path / "hf")
    assert pack(tmp_path, tmp_path / "m.rac", "--recipe", "rtn", "--group", "16") == 0
    given, found = rac.load_file(tmp_path / "m.rac"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert {name for name in given if "query_key_value" in name} and len(given) > 10
    loaded = rac.load_model(tmp_path / "m.rac", dtype="float32")
    w, v = (m.get_submodule("model.layers.0.self_attn.k_proj").weight.detach().float() for m in (found, loaded))
    assert 0 < float((w - v).norm() / w.norm()) < 0.2
