"""Models whose matrices are on a grid: dense and compressed, on a device without kernels, from the command line."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import rac
from rac.cli import main
from rac.encode.align.recipe import matrix_of, quantisable
from rac.encode.sources import open_source
from rac.methods import transforms as tf
from rac.methods.grouped import pack_grouped
from rac.runtime import RacEmbedding, RacLinear
from rac.stages.groups import values
from support import grids, models


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


def test_a_rotated_model(tmp_path):
    """QuaRot's transforms, 8 bits: online maps travel with the codes, and the model computes what it does with them."""
    models.write("llama", tmp_path / "hf", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = models.inputs(model)["input_ids"]
    before = tf.logits(model, ids)
    p = tf.parts(model)
    tf.quarot(p, 3)
    tf.require_same(before, p, ids)
    source = tf.source(p, tmp_path / "hf")
    given = {t.name: grids.nearest(matrix_of(t), 8, 32) for t in source.tensors if quantisable(t)}
    pack_grouped(source, given, tmp_path / "m.rac", True, {"recipe": "rtn", **p.about})
    with torch.no_grad():  # the same codes without a file
        for name, g in given.items():
            p.model.get_parameter(name).copy_(torch.from_numpy(values(g)))
    rounded = tf.logits(p.model, ids)
    for options in ({}, {"resident": "compressed"}):
        found = rac.load_model(tmp_path / "m.rac", **options)
        assert tf.deviation(rounded, found, ids) < 1e-5 < tf.deviation(before, found, ids) < 0.1
