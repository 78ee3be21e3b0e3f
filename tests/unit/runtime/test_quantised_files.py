"""What other tools have quantised, packed losslessly: a loaded model has the numbers that the codes stand for."""

from __future__ import annotations

import json
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import quantised_models  # noqa: E402
import rac  # noqa: E402
from rac.encode.sources import open_source  # noqa: E402
from rac.errors import UnsupportedError  # noqa: E402
from rac.frameworks import to_framework  # noqa: E402
from rac.runtime.folder import write_folder  # noqa: E402
from support import models  # noqa: E402


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    models.write("llama", folder)
    return folder


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("fp8", "no device here runs it as it is"),  # blocks that do not divide the matrices
        ("fp8-tensor", "modelopt"),
        ("fp8-e5m2", "config.json states no quantisation"),
        ("nvfp4", "modelopt"),
    ],
)
def test_numbers_where_transformers_cannot(scheme, why, plain, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("transformers may run these")
    folder = quantised_models.make(scheme, plain, tmp_path / scheme)
    rac.pack(folder, tmp_path / "m.rac")
    with pytest.warns(UserWarning, match=f"loaded as the numbers that they stand for .*{why}"):
        model = rac.load_model(tmp_path / "m.rac")
    assert not hasattr(model.config, "quantization_config")
    for t in open_source(folder, dequantise=True).tensors:
        assert torch.equal(model.get_parameter(t.name), to_framework(t.read(0, t.nbytes), t.dtype, t.shape, "pt"))
    with pytest.raises(UnsupportedError, match="load it dense, or pack its source to --bits"):
        rac.load_model(tmp_path / "m.rac", resident="compressed")
    with pytest.raises(UnsupportedError, match="load it dense, or pack its source to --bits"):
        write_folder(tmp_path / "m.rac", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_nobody_knows_is_refused(plain, tmp_path):
    folder = quantised_models.make("fp8", plain, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "new"}
    (folder / "config.json").write_text(json.dumps(config))
    rac.pack(folder, tmp_path / "m.rac")
    with pytest.raises(UnsupportedError, match="transformers cannot load 'new' here") as e:
        rac.load_model(tmp_path / "m.rac")
    assert "\n" not in str(e.value)


def test_plain_models_ask_nothing(plain, tmp_path):
    rac.pack(plain, tmp_path / "m.rac")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rac.load_model(tmp_path / "m.rac")
