"""Calibration on pictures, sounds, pairs and prompts, through the model's own processor or pipeline."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import calibrate_bar  # noqa: E402
import rac  # noqa: E402
from rac.calibrate import inputs as calibration_inputs  # noqa: E402
from rac.calibrate.inputs import calibrate, inputs_of  # noqa: E402
from rac.calibrate.media import sound  # noqa: E402
from rac.cli import main  # noqa: E402
from rac.encode import ties  # noqa: E402
from rac.encode.align.recipe import quantisable  # noqa: E402
from rac.encode.allocate.made import matched  # noqa: E402
from rac.encode.options import silent  # noqa: E402
from rac.encode.sources import open_source  # noqa: E402
from rac.errors import SourceError  # noqa: E402
from support import media  # noqa: E402

warnings.filterwarnings("ignore", module="diffusers")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    media.media(folder)
    return folder


def unreached(folder, found):
    groups = ties.find(open_source(folder).tensors)
    there = {name for layers in found for name in matched(groups, layers)}
    return [g.tensor.name for g in groups if quantisable(g.tensor) and g.tensor.name not in there]


@pytest.mark.parametrize(
    ("kind", "name", "left"),
    [
        ("vit", "images", ()),
        ("clip", "pairs.jsonl", ()),
        ("clip", "images", ("text_",)),
        ("whisper", "audio", ()),
        ("llava", "pairs.jsonl", ()),
    ],
)
def test_all_that_a_model_reads(kind, name, left, given, tmp_path):
    media.write(kind, tmp_path)
    found = calibrate(tmp_path, inputs_of(tmp_path, str(given / name)), silent)
    missing = unreached(tmp_path, found)
    assert all(any(part in m for part in left) for m in missing), missing
    assert bool(left) == bool(missing)
    assert sum(layer.sensitivity is not None for layer in found[0].values()) > len(found[0]) / 2


def test_pictures_are_those_that_the_processor_makes(given, tmp_path):
    from PIL import Image

    model = media.write("vit", tmp_path)
    (found,) = calibrate(tmp_path, inputs_of(tmp_path, str(given / "images")), silent)
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path)
    pictures = [Image.open(p) for p in sorted((given / "images").iterdir())]
    batch = processor(images=pictures, return_tensors="pt")
    expected = rac.calibrate(model, [batch])  # which has no pooler
    for name, layer in expected.items():
        np.testing.assert_allclose(found[name].second, layer.second, rtol=1e-3, atol=1e-4 * layer.second.max())


def test_sounds_of_all_widths(tmp_path):
    t = np.arange(16000) / 16000
    x = 0.8 * np.stack([np.sin(2 * np.pi * 200 * t), np.sin(2 * np.pi * 200 * t)], 1)
    for width, off in ((1, 0.02), (2, 1e-4), (3, 1e-6), (4, 1e-6)):
        media.write_wav(tmp_path / "a.wav", x, 16000, width)
        assert np.abs(sound(str(tmp_path / "a.wav"), 16000) - x[:, 0]).max() < off
    slower = sound(str(tmp_path / "a.wav"), 8000)
    assert len(slower) == 8000
    assert np.abs(slower - x[::2, 0]).max() < 1e-3
    for data, why in ((b"RIFF", "no wav file"), (b"", "no wav file")):
        (tmp_path / "b.wav").write_bytes(data)
        with pytest.raises(SourceError, match=why):
            sound(str(tmp_path / "b.wav"), 16000)
    media.write_wav(tmp_path / "c.wav", x[:0], 16000)
    with pytest.raises(SourceError, match="holds no sound"):
        sound(str(tmp_path / "c.wav"), 16000)


def test_the_command_on_pictures(given, tmp_path, capsys, monkeypatch):
    media.write("vit", tmp_path / "m")
    out = tmp_path / "m.rac"
    how = ["--effort", "fast", "--force", "--cache", str(tmp_path / "cache")]
    pack = ["pack", str(tmp_path / "m"), "-o", str(out), "--bits", "4", *how, "--calibrate"]
    assert main([*pack, str(given / "images")]) == 0
    assert "does not reach" not in capsys.readouterr().err
    first = out.read_bytes()
    with monkeypatch.context() as without:
        without.setattr("rac.calibrate.media.model_on", lambda *_: pytest.fail("it is in the cache"))
        assert main([*pack, str(given / "images")]) == 0
    assert out.read_bytes() == first
    with rac.open(out) as f:
        (used,) = f.archives[0].header["provenance"]["calibrate"]
    assert used["images"] == inputs_of(tmp_path, str(given / "images")).digest
    capsys.readouterr()
    assert main([*pack, str(given / "audio")]) == 2
    said = capsys.readouterr().err
    assert "`rac.calibrate` takes any batches" in said
    assert said.count("\n") == 1


def test_what_holds_nothing_of_use(given, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no pictures .* and no sounds"):
        inputs_of(tmp_path, str(tmp_path / "empty"))
    lines = tmp_path / "p.jsonl"
    for text, why in (
        ('{"image": "no.png", "text": "a"}', "line 1 names 'no.png', which is not there"),
        ('{"image": 3, "text": "a"}', "line 1 is no"),
        ("{", "line 1 is no JSON"),
    ):
        lines.write_text(text)
        with pytest.raises(SourceError, match=why):
            inputs_of(tmp_path, str(lines))
    lines.write_text(json.dumps({"text": "a text of lines"}))
    assert inputs_of(tmp_path, str(lines)) is None  # a text like any other
    media.write("vit", tmp_path / "m")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(SourceError, match=r"no picture that pillow can read.*a\.png"):
        calibrate(tmp_path / "m", inputs_of(tmp_path, str(broken)), silent)
    with pytest.raises(SourceError, match="does not take pictures with text"):
        calibrate(tmp_path / "m", inputs_of(tmp_path, str(given / "pairs.jsonl")), silent)
    with pytest.raises(SourceError, match="no model that transformers knows"):
        calibrate(tmp_path / "empty", inputs_of(tmp_path, str(given / "images")), silent)


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_a_pipeline_on_prompts(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr("rac.calibrate.pipeline.STEPS", 2)
    calibrate_bar.pipeline(calibrate_bar.SMALL, tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a cat\n\na house by the sea\n")
    given = inputs_of(tmp_path / "sd", str(tmp_path / "prompts.txt"))
    assert given.items == ("a cat", "a house by the sea")
    cache = str(tmp_path / "cache")
    found = calibrate(tmp_path / "sd", given, silent, cache)
    assert len(found) == 3
    assert unreached(tmp_path / "sd", found) == []
    monkeypatch.setattr("rac.calibrate.pipeline.components", lambda *_: pytest.fail("it is in the cache"))
    again = calibrate(tmp_path / "sd", given, silent, cache)
    assert [layers.digest for layers in again] == [layers.digest for layers in found]
    with pytest.raises(SourceError, match="text file of prompts"):
        inputs_of(tmp_path / "sd", "self")


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_that_takes_more_than_prompts(tmp_path):
    pytest.importorskip("diffusers")
    calibrate_bar.pipeline(calibrate_bar.SMALL, tmp_path)
    index = tmp_path / "model_index.json"
    (tmp_path / "prompts.txt").write_text("a cat")
    given = inputs_of(tmp_path, str(tmp_path / "prompts.txt"))
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"))
    with pytest.raises(SourceError, match="Img2ImgPipeline does not run on prompts alone .*rac.calibrate"):
        calibrate(tmp_path, given, silent)
    index.write_text("{")
    with pytest.raises(SourceError, match="no pipeline that diffusers can load"):
        calibrate(tmp_path, given, silent)


def test_forward_only(given, tmp_path):
    media.write("vit", tmp_path)
    asked = replace(inputs_of(tmp_path, str(given / "images")), backward=False)
    (found,) = calibrate(tmp_path, asked, silent)
    assert found
    assert all(layer.sensitivity is None for layer in found.values())


def test_no_more_inputs_than_are_needed(given, tmp_path, monkeypatch):
    media.write("vit", tmp_path)
    monkeypatch.setattr(calibration_inputs, "MOST", 2)
    said = []
    calibrate(tmp_path, inputs_of(tmp_path, str(given / "images")), lambda *what: said.append(what))
    assert said[0][0].endswith("images: the first 2 of 3 are used")
    assert said[-1] == ("calibrating", 2, 2)
