"""`rac compare`: tables, JSON, exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rac.cli import main
from rac.encode.pack import pack

st = pytest.importorskip("safetensors.numpy")


@pytest.fixture
def model(tmp_path):
    """A safetensors file, its lossless archive and one at 3 bits."""
    rng = np.random.default_rng(0)
    w = {"a.weight": rng.standard_normal((160, 200)).astype(np.float32), "norm": np.ones(9, np.float32)}
    path = tmp_path / "m.safetensors"
    st.save_file(w, path)
    pack(path, tmp_path / "same.rac")
    pack(path, tmp_path / "three.rac", bits=3.0, effort="fast")
    return path


def test_table_of_sizes(model, capsys):
    assert main(["compare", *(str(model.with_name(n)) for n in ("m.safetensors", "same.rac", "three.rac"))]) == 0
    printed = capsys.readouterr()
    head, own, same, three = printed.out.splitlines()
    assert "SNR of weights does not rank lossy files" in printed.err and "--text auto" in printed.err
    assert head.split() == ["file", "bytes", "bits", "of", "the", "file", "of", "quantised", "SNR,", "dB"]
    assert own.split()[0] == "m.safetensors" and own.split()[1] == f"{model.stat().st_size:,}"
    assert own.split()[3:] == ["-", "-"] and same.split()[3:] == ["-", "exact"]
    assert 2.98 < float(three.split()[3]) <= 3 and 15 < float(three.split()[4]) < 20
    assert len({len(line) for line in (head, own, same, three)}) == 1


def test_json(model, capsys):
    assert main(["compare", str(model), str(model.with_name("three.rac")), "--json"]) == 0
    own, three = json.loads(capsys.readouterr().out)
    assert own.keys() == three.keys() == {"file", "size", "bits", "quantised_bits", "snr"}
    assert three["size"] == model.with_name("three.rac").stat().st_size and own["snr"] is None


def test_wrong_use_is_one_line(model, tmp_path, capsys):
    def fails(code, words, *args):
        assert main(["compare", *map(str, args)]) == code
        out = capsys.readouterr()
        assert out.err.startswith("rac: ") and out.err.count("\n") == 1 and words in out.err

    three = model.with_name("three.rac")
    fails(2, "--text", model, three, "--snr")
    fails(2, "No such file", model, tmp_path / "none.rac")
    fails(2, "text cannot be read", model, three, "--text", tmp_path / "none.txt")
    other = tmp_path / "other.safetensors"
    st.save_file({"b.weight": np.ones((160, 200), np.float32)}, other)
    fails(1, "'a.weight'", model, other)
    three.write_bytes(three.read_bytes()[:-100])
    fails(1, "three.rac", model, three)
