"""`rac info` of lossy archives and of objects: every byte is in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import rac
from rac.cli import info, main
from rac.container import reader
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.encode import record as rec
from rac.stages import trellis as tr
from support import ROOT, products, tiles

st = pytest.importorskip("safetensors.numpy")


@pytest.fixture
def lossy(tmp_path):
    """Two layers of two roles at 3 bits, with far weights, and a tensor that stays lossless."""
    rng = np.random.default_rng(0)
    shapes = {"up": (160, 200), "down": (200, 160)}
    w = {f"h.{i}.{k}.weight": rng.standard_normal(s).astype(np.float32) for i in range(2) for k, s in shapes.items()}
    w["h.0.up.weight"][3, [5, 70]] = 2000, -3000
    st.save_file(w | {"norm": np.ones(9, np.float32)}, tmp_path / "m.safetensors")
    rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac", bits=3.0, effort="fast")
    return tmp_path / "m.rac"


@pytest.fixture
def joined(tmp_path, monkeypatch):
    """Objects quantised and not, tensors of either stage behind the trellis, several tiles; one names its alignment."""
    tiles.cut(monkeypatch)
    head = rec.head
    monkeypatch.setattr(rec, "head", lambda g, *a: head(g, *a) | ({"x-align": "pca"} if g.tensor.name == "t" else {}))
    maker = products.Maker(tmp_path / "m.rac")
    maker.object("a", products.exact(products.normal(1, 150, 7)))
    maker.object("b", products.quantised(products.words(2, 7, 140), 2, 3))
    maker.object("u", products.exact(products.normal(3, 140, 140)))
    maker.tensor("low", "BF16", products.quantised(products.words(4, 150, 140), 4, 5), ("a", "b"))
    maker.tensor("t", "F32", products.quantised(products.words(5, 150, 140), 5, states=64), ("u",))
    maker.finish()
    return tmp_path / "m.rac"


def adds_up(path):
    """The report of an archive, after checking that nothing is missing from it."""
    r = info.report(str(path))
    assert r["size"] == path.stat().st_size == sum(r["bytes"].values())
    records = sum(t["bytes"] for key in ("tensors", "objects", "attachments") for t in r[key])
    assert records + sum(r["bytes"][k] for k in ("header", "other records", "index", "trailer")) == r["size"]
    for t in (*r["tensors"], *r["objects"]):
        if "quantised" in t:
            streams = t["quantised"]["streams"]
            assert sum(streams.values()) == t["bytes"] and min(streams.values()) >= 0
            assert [streams[k] for k in ("directories", "words", "escapes", "raw")] == list(t["parts"].values())[1:5]
    assert sum(t["bytes"] for t in r["tensors"] if "quantised" in t) == sum(t["bytes"] for t in r["roles"])
    assert sum(t["tensors"] for t in r["roles"]) == r["quantised"]
    return r


def show(capsys, *args):
    capsys.readouterr()
    assert main(["info", *map(str, args)]) == 0
    return capsys.readouterr().out


def table(out, title):
    """Rows below the line that begins with `title`, up to a line that is empty or has fewer words."""
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith(title))
    return [line.split() for line in lines[at + 1 : next(i for i in range(at, len(lines)) if not lines[i].strip())]]


def test_bytes_of_quantised_tensors(lossy, capsys):
    r = adds_up(lossy)
    assert [(t["role"], t["tensors"], t["weights"]) for t in r["roles"]] == [
        ("h.*.down.weight", 2, 64000),
        ("h.*.up.weight", 2, 64000),
    ]
    up = next(t for t in r["tensors"] if t["name"] == "h.0.up.weight")
    q = up["quantised"]
    archive = Archive(FileAccess(lossy))
    record = archive.record(next(e for e in archive.index.entries if e.name == "h.0.up.weight"))
    archive.close()
    lanes, trellis = record.head["stages"]
    assert (q["states"], q["corrections"], q["rank"], q["basis"]) == (32, trellis["sizes"][0], 0, None)
    assert (q["row_classes"], q["column_classes"], q["tables"]) == (lanes["rows"], lanes["cols"], lanes["tables"])
    assert q["outliers"] == 2 and q["streams"]["outliers"] == 24
    assert q["streams"]["tables"] == sum(lanes["sizes"]) + lanes["rows"] * lanes["cols"]
    assert not any("quantised" in t for t in r["tensors"] if t["name"] == "norm")

    out = show(capsys, lossy, "--tensors")
    kinds = {row[0]: row[1:] for row in table(out, "quantised ")}
    assert len(kinds) == 4 and kinds["h.0.up.weight"][:4] == [q["align"] or "-", "-", "-", "32"]
    assert kinds["h.0.up.weight"][6] == "2"
    for name, total, *parts in table(out, "bits per weight"):
        stated = next(t["bits_per_weight"] for t in r["tensors"] if t["name"] == name)
        assert abs(float(total) - stated) < 1e-4 and abs(sum(map(float, parts)) - stated) < 1e-3


def test_whether_a_file_is_lossy(lossy, capsys, tmp_path):
    rac.pack(lossy.with_name("m.safetensors"), tmp_path / "all.rac")
    for path, said in ((lossy, "LOSSY"), (tmp_path / "all.rac", "lossless")):
        with rac.open(path) as f:
            assert f.lossy == (said == "LOSSY")
        assert f"\n  {said} " in show(capsys, path)


def test_plain_output_has_one_table_by_role(lossy, capsys):
    out = show(capsys, lossy)
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["role"])
    assert lines[at].split() == ["role", "tensors", "weights", "bits/w", "outliers"]
    down, up = (line.split() for line in lines[at + 1 : at + 3])
    assert down[:3] == ["h.*.down.weight", "2", "64,000"] and up[:1] == ["h.*.up.weight"] and up[-1] == "2"
    assert lines[at + 3] == "  bytes"
    r = info.report(str(lossy))
    mean = sum(t["bits_per_weight"] * t["weights"] for t in r["roles"]) / 128000
    assert f"4 tensors quantised at {mean:.4f} bits" in out

    rac.save_file({"w": np.arange(9.0)}, lossy.with_name("l.rac"))
    assert "role" not in show(capsys, lossy.with_name("l.rac"))


def test_objects_are_rows_and_a_line_of_their_own(joined, capsys):
    r = adds_up(joined)
    assert [o["name"] for o in r["objects"]] == ["a", "b", "u"]
    assert r["bytes"]["objects"] == sum(o["bytes"] for o in r["objects"]) > 0 == r["bytes"]["other records"]
    low, turned = (t["quantised"] for t in r["tensors"])
    assert (low["rank"], low["basis"], low["align"], low["outliers"]) == (7, None, None, 5)
    assert (turned["rank"], turned["basis"], turned["align"], turned["states"]) == (0, "u", "pca", 64)
    assert low["streams"]["outliers"] == 5 * 12  # before another stage an outlier is of binary32
    assert ["quantised" in o for o in r["objects"]] == [False, True, False]

    out = show(capsys, joined, "--tensors")
    assert re.search(r"^u +object +140x140 +\S+ +[\d,]+ +[\d.]+% +[\d.]+$", out, re.MULTILINE)
    assert re.search(rf"^    objects +{r['bytes']['objects']:,} ", out, re.MULTILINE) and "other records" not in out
    kinds = {row[0]: row[1:] for row in table(out, "quantised ")}
    assert kinds.keys() == {"low", "t", "b"}
    assert kinds["low"][:4] == ["-", "-", "7", "16"] and kinds["t"][:4] == ["pca", "u", "-", "64"]
    lines = [line.split() for line in show(capsys, joined).splitlines()]
    bits = {line[0]: float(line[3]) for line in lines if line and line[0] in ("low", "t", "(objects)")}
    stated = bits["low"] / 2 + bits["t"] / 2 + bits["(objects)"]
    assert abs(stated - r["quantised_bits"]) < 1e-3


def test_streams_say_the_same(lossy, joined, capsys):
    for path in (lossy, joined):
        expected = json.loads(show(capsys, path, "--json")) | {"files": ["<stdin>"]}
        with open(path, "rb") as f:
            done = subprocess.run(
                [sys.executable, "-m", "rac.cli", "info", "-", "--json"], stdin=f, capture_output=True, check=True
            )
        assert json.loads(done.stdout) == expected


def test_only_heads_are_read(lossy, monkeypatch):
    read = 0
    into = FileAccess.read_into

    def read_into(self, at, out):
        nonlocal read
        read += len(out)
        into(self, at, out)

    monkeypatch.setattr(FileAccess, "read_into", read_into)
    monkeypatch.setattr(reader, "TAIL", 4096)
    r = info.report(str(lossy))
    heads = sum(t["quantised"]["streams"]["head"] + 64 for t in r["tensors"] if "quantised" in t)
    assert 0 < read <= 2 * 4096 + heads < r["size"] // 4


def test_a_head_against_its_row_is_refused(joined, capsys, monkeypatch):
    sizes = tr.Trellis.from_head

    def longer(head, context):
        p = sizes(head, context)
        return tr.Trellis(p.states, p.zero, p.low, p.scale, (*p.sizes[:3], p.sizes[3] + 12))

    monkeypatch.setattr(tr.Trellis, "from_head", longer)
    assert main(["info", str(joined)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("rac: ") and "'b'" in err and err.count("\n") == 1


def test_bytes_of_a_provenance_are_digits(capsys):
    path = ROOT / "format_spec" / "golden" / "good" / "metadata.rac"
    stated = Archive(FileAccess(path)).header["provenance"]
    found = json.loads(show(capsys, path, "--json"))["provenance"]
    assert any(isinstance(v, bytes) for v in stated.values())
    assert found == {k: v.hex() if isinstance(v, bytes) else v for k, v in stated.items()}
