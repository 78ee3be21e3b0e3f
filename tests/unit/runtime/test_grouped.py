"""Models whose matrices are on a grid: dense and compressed, on a device without kernels, from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parents[2]))

import grids
import models

import rac
from rac.cli import main
from rac.decode import device
from rac.encode.grouped import pack_grouped
from rac.encode.recipe import matrix_of, quantisable
from rac.encode.sources import open_source
from rac.runtime import RacEmbedding, RacLinear
from rac.runtime import device as rd
from rac.runtime import record as rc


@pytest.fixture(scope="module", params=[True, False], ids=["entropy", "fixed"])
def path(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    models.write("llama", root / "hf")
    source = open_source(root / "hf")
    given = {t.name: grids.nearest(matrix_of(t), 4, 64) for t in source.tensors if quantisable(t, embeddings=True)}
    assert len(given) > 8
    pack_grouped(source, given, root / "m.rac", request.param, {"recipe": "rtn"})
    return root / "m.rac"


def test_dense_and_compressed(path):
    dense, compressed = rac.load_model(path), rac.load_model(path, resident="compressed")
    layers = [m for m in compressed.modules() if isinstance(m, RacLinear | RacEmbedding)]
    assert len(layers) >= 15
    assert torch.equal(models.logits(dense), models.logits(compressed))


def test_command_line(path, tmp_path, capsys):
    assert main(["verify", str(path)]) == 0
    assert main(["load", str(path)]) == 0
    assert main(["info", str(path), "--tensors"]) == 0
    told = capsys.readouterr().out
    assert "groups/1" in told and "LOSSY" in told
    assert main(["unpack", str(path), "-o", str(tmp_path / "hf")]) == 0
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(models.logits(rac.load_model(path)), models.logits(other))


def test_resident_on_a_device_without_kernels(path, monkeypatch):
    """The record is fetched, decoded and copied; it is said once."""
    layer = rac.load_model(path, resident="compressed").model.layers[0].mlp.up_proj
    expected = rac.load_model(path).model.layers[0].mlp.up_proj.weight
    monkeypatch.setattr(rd, "_why_not", lambda device: None)
    monkeypatch.setattr(device, "_warned", set())
    resident, data = rd.Resident(), layer.weight.numpy()
    with pytest.warns(UserWarning, match="tensors of groups/1 are decoded on the CPU") as told:
        found = [resident.dense(layer.weight, lambda: (rc.parse(data), data)) for _ in range(3)]
    assert all(torch.equal(w, expected) for w in found) and len(told) == 1
