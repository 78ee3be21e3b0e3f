"""`rac analyze`: the report's keys, a page that fetches nothing, exit codes."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.numpy")

from rac.cli import analyze as command
from rac.cli import main
from rac.methods import rotations
from rac.study.analyze import model as md
from support import models

EVERY = ["original", "hadamard", "hadamard2", "hadamard-feedback", "pca", "triangular"]


class Page(html.parser.HTMLParser):
    """What is open, and every attribute."""

    VOID = ("meta", "br", "path", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.seen = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("analyze")
    models.write("llama", root / "hf")
    (root / "text.txt").write_text(models.TEXT * 8)
    (root / "short.txt").write_text("s")
    rng = np.random.default_rng(0)
    r1 = np.linalg.qr(rng.standard_normal((models.WIDTH, models.WIDTH)))[0]
    r2 = np.stack([np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2)])
    rotations.save(rotations.Rotations(r1, r2), root / "spin.safetensors")
    return root


@pytest.fixture(scope="module")
def report(folder):
    """Everything at once."""
    where = [f"--{kind}={folder / f'r.{kind}'}" for kind in ("html", "json")]
    args = ["--text", str(folder / "text.txt"), "--tokens", "1024", "--cache", "none", "--rotation"]
    assert main(["analyze", str(folder / "hf"), *args, f"spin={folder / 'spin.safetensors'}", *where]) == 0
    return json.loads((folder / "r.json").read_text())


def test_json_has_its_keys(report):
    assert report.keys() == {
        "about",
        "bases",
        "model",
        "blocks",
        "gaussian",
        "counts",
        "histograms",
        "edges",
        "tensors",
    }
    assert [b["id"] for b in report["bases"]] == [*EVERY, "spin"]
    about = report["about"]
    assert (about["matrices"], about["of"], about["tokens"], about["second_moment"]) == (10, 10, 1024, "text")
    assert about["fused"] and not about["unreached"] and about["weights"] == 2 * (2 * 128 * 128 + 3 * 128 * 160)
    for one in report["tensors"]:
        assert one["bases"].keys() == {*EVERY, "spin"} and one["inputs"]
        assert one["gain"] == one["role"].endswith(("q_proj", "gate_proj", "up_proj"))
        for key, b in one["bases"].items():
            assert set(md.LEVELS) <= b.keys() and 0 < b["bits"] < 8, key
            assert abs(b["off"]) <= 0.25 and b["kurtosis"] > 1
        assert one["bases"]["original"]["bits"] == pytest.approx(4, abs=0.3)
    assert [block["block"] for block in report["blocks"]] == ["0", "1"]
    assert 1 <= len(report["histograms"]) <= 3


def test_means_and_counts_are_of_the_matrices(report):
    bits = {one["name"]: {k: b["bits"] for k, b in one["bases"].items()} for one in report["tensors"]}
    sizes = [one["shape"][0] * one["shape"][1] for one in report["tensors"]]
    for key in EVERY:
        want = np.average([b[key] for b in bits.values()], weights=sizes)
        assert report["model"][key]["bits"] == pytest.approx(want, rel=1e-5)
    assert len(report["counts"]) == 2 * 4
    for c in report["counts"]:
        fewer = [name for name, b in bits.items() if b[c["aligned"]] < b[c["rotated"]]]
        assert c["fewer"] == len(fewer) and c["matrices"] == 10
        assert c["not"].keys() == bits.keys() - set(fewer)
    for key, g in report["gaussian"].items():
        within = [2.7 <= one["bases"][key]["kurtosis"] <= 3.3 for one in report["tensors"]]
        assert g["kurtosis"] == sum(within)


def test_page_is_whole_and_fetches_nothing(report, folder):
    text = (folder / "r.html").read_text()
    page = Page(text)
    assert page.open == [] and page.seen.count("svg") > 6 and page.seen.count("table") == 4
    for name, value in page.attributes:
        assert name not in ("src", "href", "srcset", "action"), (name, value)
    assert not re.search(r"https?:|//\w|@import|url\(|<script", text)
    assert "nan" not in text.lower().replace("nant", "") and "width=device-width" in text
    assert "learned: spin" in text and "prefers-color-scheme:dark" in text


def test_table(folder, capsys):
    args = ["--text", str(folder / "text.txt"), "--tokens", "512", "--cache", "none", "--layers", "*.0.*q_proj*"]
    assert main(["analyze", str(folder / "hf"), *args]) == 0
    out = capsys.readouterr().out
    assert re.search(r"triangular \(RAC\) below Hadamard, inputs: [01] of 1 matrices", out)
    assert "1 of 10 matrices, 16,384 weights; bits at equal error of the outputs on 512 tokens" in out


def test_without_a_text(folder, capsys, tmp_path):
    """Weights alone: any safetensors file will do."""
    w = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
    w[:, 3] *= 30
    st.save_file({"a.weight": w, "zero.weight": np.zeros((128, 256), np.float32)}, tmp_path / "m.safetensors")
    assert (
        main(
            [
                "analyze",
                str(tmp_path / "m.safetensors"),
                "--json",
                str(tmp_path / "r.json"),
                "--html",
                str(tmp_path / "r.html"),
            ]
        )
        == 0
    )
    assert "no text: no aligned bases" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert [b["id"] for b in found["bases"]] == EVERY[:3] and found["counts"] == []
    a, zero = found["tensors"]
    assert zero["bases"] == {} and a["bases"]["original"]["kurtosis"] > 20
    assert a["bases"]["hadamard2"]["kurtosis"] == pytest.approx(3, abs=0.3)
    assert "no bases that follow the inputs" in (tmp_path / "r.html").read_text()
    assert Page((tmp_path / "r.html").read_text()).open == []


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    w = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    names = [f"layers.{i}.w" for i in (0, 1, 2, 10, 11)]
    st.save_file({"other": w, **dict.fromkeys(names, w)}, tmp_path / "m.safetensors")
    found = md.analyze(tmp_path / "m.safetensors")
    assert [b["block"] for b in found["blocks"]] == ["", "0", "1", "2", "10", "11"]
    assert [t["name"] for t in found["tensors"]] == ["other", *names]


def test_processes_find_what_threads_find(folder, monkeypatch):
    def bits():
        found = md.analyze(folder / "hf", models.TEXT * 8, md.Asked(512, "*.mlp.*", jobs=2))
        return [b["bits"] for t in found["tensors"] for b in t["bases"].values()]

    threads = bits()
    monkeypatch.setattr(md, "LARGE", 0)
    assert bits() == pytest.approx(threads, rel=1e-3)


def test_seen_text(folder, capsys, monkeypatch):
    """One calibration on all tokens serves both: the output of an error is measured by what the bases came from."""
    read, calibrate = [], md.calibrate
    monkeypatch.setattr(md, "calibrate", lambda *a, **k: read.append((a[1], k["tokens"])) or calibrate(*a, **k))
    args = ["analyze", str(folder / "hf"), "--text", str(folder / "text.txt"), "--tokens", "512", "--cache", "none"]
    assert main([*args, "--layers", "*.0.mlp.down*", "--seen"]) == 0
    assert "outputs on 512 tokens, seen" in capsys.readouterr().out
    assert read == [(models.TEXT * 8, 512)]


def test_picture(folder, tmp_path, report):
    pytest.importorskip("matplotlib")
    from rac.study.analyze import picture

    data = picture.png(report)
    assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_picture_without_matplotlib(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["analyze", str(folder / "hf"), "--png", str(tmp_path / "r.png")]) == 2
    assert "rac-codec[plot]" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_wrong_use_is_one_line(folder, tmp_path, capsys):
    hf, text = str(folder / "hf"), str(folder / "text.txt")
    st.save_file({"tiny": np.ones((4, 4), np.float32)}, tmp_path / "tiny.safetensors")
    (tmp_path / "empty").mkdir()
    for words, *args in (
        ("text cannot be read", hf, "--text", str(tmp_path / "none.txt")),
        ("No such file", str(tmp_path / "none")),
        ("no *.safetensors", str(tmp_path / "empty")),
        ("no large matrix", str(tmp_path / "tiny.safetensors")),
        ("Hugging Face model folder", str(folder / "spin.safetensors"), "--text", text),
        ("none of its 10 matrices matches", hf, "--layers", "nothing"),
        ("no such folder", hf, "--html", str(tmp_path / "no" / "r.html")),
        ("no file of learned rotations", hf, "--rotation", f"x={tmp_path / 'tiny.safetensors'}"),
        ("name of another basis", hf, "--rotation", f"pca={folder / 'spin.safetensors'}"),
        ("--jobs", hf, "--jobs", "0"),
        ("tokens must be", hf, "--text", text, "--tokens", "1"),
        ("bits within", hf, "--bits", "9"),
        ("", hf, "--text", str(folder / "short.txt"), "--cache", "none"),
    ):
        assert main(["analyze", *args]) == 2, words
        err = capsys.readouterr().err
        assert err.startswith("rac: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "no").exists()


def test_interrupted_leaves_no_file(folder, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    out = [f"--{kind}={tmp_path / f'r.{kind}'}" for kind in ("html", "json")]
    with monkeypatch.context() as m:
        m.setattr(md, "_tensor", stop)
        assert main(["analyze", str(folder / "hf"), *out]) == 130
    assert capsys.readouterr().err == "rac: interrupted\n" and list(tmp_path.iterdir()) == []
    with monkeypatch.context() as m:  # while a file is being written
        m.setattr(command.os, "replace", stop)
        assert main(["analyze", str(folder / "hf"), "--layers", "*.0.*q_proj*", *out]) == 130
    assert list(tmp_path.iterdir()) == []
