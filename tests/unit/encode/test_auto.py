"""What a lossy pack is calibrated on where nobody says: the built-in mix and the model's own text, or why not."""

import json
import shutil

import pytest

import rac
from rac.calibrate import builtin
from rac.cli import main
from rac.container import zstd
from rac.encode.align import recipe
from rac.encode.allocate import budget, texts
from rac.encode.allocate.budget import read_text
from rac.encode.allocate.texts import calibration_for
from rac.errors import MissingDependencyError, SourceError

pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.torch")
from support import models  # needs transformers

FAST = {"bits": 5.0, "effort": "fast", "tokens": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model with a tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    models.write("llama", path)
    return path


def choice(given, src):
    c = calibration_for(given, src, 256, None)
    return c.texts, c.remark, c.named


def provenance(path):
    with rac.open(path) as f:
        return f.archives[0].header["provenance"]


def test_what_suits_the_source(folder, tmp_path, monkeypatch):
    names, remark, named = choice(None, folder)
    assert names == ("auto", "self") and not named
    assert remark.startswith("calibrated on the built-in mix and the model's own text") and "--calibrate none" in remark
    assert choice("auto", folder) == (("auto", "self"), "", True)
    assert choice(["auto", "self", "x.txt"], folder)[0] == ("auto", "self", "x.txt")
    assert choice("none", folder)[0] == () and "several times" in choice("none", folder)[1]
    assert choice("x.txt", folder) == (("x.txt",), "", True)

    for src, why in ((folder / "model.safetensors", "only the folder"), (tmp_path, "no config.json"), (b"", "only")):
        assert choice(None, src)[0] == () and why in choice(None, src)[1] and choice("none", src)[1] == ""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert choice(None, tmp_path) == (
        (),
        "quantised from the weights alone: BertModel is no causal language model",
        False,
    )
    assert choice("auto", tmp_path)[:2] == (
        ("auto",),
        "calibrated on the built-in mix alone: BertModel is no causal language model",
    )
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "1_Pooling", "type": "sentence_transformers.Pooling"}]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert choice(None, tmp_path)[0] == ()  # it has no tokenizer
    (tmp_path / "tokenizer.json").write_text("{}")
    sentences = choice(None, tmp_path)
    assert sentences == (("auto",), "calibrated on the built-in mix; --calibrate none: from the weights alone", False)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    assert choice(None, tmp_path)[0] == ("self",) and "no tokenizer" in choice(None, tmp_path)[1]

    assert choice(None, "org/name")[0] == ("auto", "self")  # a repository: asked again when it was downloaded

    monkeypatch.setattr(texts, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(
        MissingDependencyError, match=r"needs torch: pip install rac-codec\[calibrate\]; --calibrate none"
    ):
        calibration_for(None, folder, 256, None)
    assert choice("none", folder)[0] == ()


def test_unasked_is_auto_and_both_are_said(folder, tmp_path, capsys):
    cache, said = tmp_path / "cache", []
    rac.pack(folder, tmp_path / "a.rac", **FAST, cache=str(cache), note=lambda what, *_: said.append(what))
    assert said[0].startswith("calibrated on the built-in mix")
    used = provenance(tmp_path / "a.rac")["calibrate"]
    digest = zstd.digest(builtin.learned().encode()).hex()
    assert used == [{"name": "auto", "text": digest, "tokens": 256}, {"text": "self", "tokens": 256}]

    how = ["--bits", "5", "--effort", "fast", "--tokens", "256", "--cache", str(cache)]
    assert main(["pack", str(folder), "-o", str(tmp_path / "b.rac"), *how]) == 0
    assert capsys.readouterr().err.startswith(
        "calibrated on the built-in mix and the model's own text; --calibrate none"
    )
    assert main(["pack", str(folder), "-o", str(tmp_path / "c.rac"), *how, "--calibrate", "auto"]) == 0
    assert (tmp_path / "a.rac").read_bytes() == (tmp_path / "b.rac").read_bytes() == (tmp_path / "c.rac").read_bytes()

    capsys.readouterr()
    assert main(["pack", str(folder), "-o", str(tmp_path / "d.rac"), *how, "--calibrate", "none"]) == 0
    assert "quantised from the weights alone: the divergence is several times" in capsys.readouterr().err
    assert provenance(tmp_path / "d.rac")["calibrate"] == "none"


def test_what_is_learned_from_texts_of_no_kind_counts_less(folder, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("A text that somebody has named. " * 400)
    seen = []

    def composed(of, layers, effort, sample, missing):
        seen.append(sample.damp)
        return recipe.composed(of, layers, effort, sample, missing)

    monkeypatch.setattr(budget, "composed", composed)
    for given in ("auto", "self", str(tmp_path / "x.txt"), ["auto", str(tmp_path / "x.txt")]):
        rac.pack(folder, tmp_path / "m.rac", **FAST, calibrate=given, cache=str(tmp_path / "cache"), force=True)
    assert seen == [recipe.GENERAL_DAMP, recipe.DAMP, recipe.DAMP, recipe.DAMP]


def test_an_interrupted_pack_goes_on(folder, tmp_path):
    how = FAST | {"cache": str(tmp_path / "cache")}
    rac.pack(folder, tmp_path / "whole.rac", **how)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rac.pack(folder, tmp_path / "m.rac", progress=stop, **how)
    said = []
    rac.pack(folder, tmp_path / "m.rac", resume=True, note=lambda what, *_: said.append(what), **how)
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "whole.rac").read_bytes()
    assert len(said) == 1 and said[0].startswith("calibrated on the built-in mix")  # no calibration, no search


def test_a_divergence_is_measured_on_text_that_was_not_learned(folder, tmp_path):
    assert read_text("auto") == builtin.measured() and builtin.measured() not in builtin.learned()
    rac.pack(folder, tmp_path / "m.rac", kl=0.05, effort="fast", tokens=256)
    assert provenance(tmp_path / "m.rac")["goal"] == {"kl": "0.05"}


def test_a_model_that_cannot_be_run_is_said_and_recorded(folder, tmp_path):
    src = tmp_path / "hf"
    shutil.copytree(folder, src)
    about = json.loads((src / "config.json").read_text()) | {"architectures": ["NewForCausalLM"], "model_type": "new"}
    (src / "config.json").write_text(json.dumps(about))
    said = []
    rac.pack(src, tmp_path / "m.rac", **FAST, note=lambda what, *_: said.append(what))
    assert any(
        line.startswith("the model could not be calibrated, and is quantised from the weights alone") for line in said
    )
    assert "no model that transformers knows" in provenance(tmp_path / "m.rac")["uncalibrated"]
    with pytest.warns(UserWarning, match="from the weights alone"):
        rac.pack(src, tmp_path / "n.rac", **FAST)
    with pytest.raises(SourceError, match="transformers"):
        rac.pack(src, tmp_path / "o.rac", **FAST, calibrate="auto")
    with pytest.raises(SourceError, match="transformers"):
        rac.pack(src, tmp_path / "o.rac", **FAST, align="triangular")


def test_a_weight_that_is_no_number_is_named(folder, tmp_path, capsys):
    src = tmp_path / "hf"
    shutil.copytree(folder, src)
    weights = st.load_file(src / "model.safetensors")
    name = next(n for n in weights if n.endswith("up_proj.weight"))
    weights[name][3, 4] = float("nan")
    st.save_file(weights, src / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text("ab " * 200)
    argv = ["pack", str(src), "-o", str(tmp_path / "m.rac"), "--bits", "5", "--cache", "none", "--effort", "fast"]
    assert main([*argv, "--calibrate", str(tmp_path / "text.txt"), "--tokens", "256"]) == 2
    assert f"hold NaN or infinity; so do the weights of {name!r}; --calibrate none" in capsys.readouterr().err
    assert main([*argv, "--calibrate", "none"]) == 0  # the way out that is named


def test_what_a_text_needs_is_looked_for_before_the_pack(folder, tmp_path, capsys):
    src, text, out = tmp_path / "hf", tmp_path / "text.txt", tmp_path / "m.rac"
    shutil.copytree(folder, src)
    argv = ["pack", str(src), "-o", str(out), "--bits", "5", "--calibrate", "none", "--measure", str(text)]
    text.write_text("ab")
    assert main(argv) == 2 and "the text has 2 tokens" in capsys.readouterr().err
    for path in src.glob("tokenizer*"):
        path.unlink()
    assert main(argv) == 2 and "no tokenizer that transformers can load" in capsys.readouterr().err
    assert not out.exists()


def test_a_sentence_encoder_is_calibrated_unasked(tmp_path, capsys):
    """On the mix, in sequences of three lengths, each with its part of the text; the file says which."""
    models.bert().bert.save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text(json.dumps([{"path": "1_Pooling", "type": "x.Pooling"}]))
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    how = ["--bits", "5", "--effort", "fast", "--tokens", "384", "--cache", str(tmp_path / "cache")]
    assert main(["pack", str(tmp_path / "model"), "-o", str(tmp_path / "a.rac"), *how]) == 0
    said = capsys.readouterr().err
    assert "calibrated on the built-in mix; --calibrate none" in said
    assert "LOAD REPORT" not in said
    assert "calibrating with 2 parameters that the files lack, drawn at random: pooler.dense.bias, pooler" in said
    (used,) = provenance(tmp_path / "a.rac")["calibrate"]
    assert used["name"] == "auto" and used["lengths"] == [16, 64, 256] and used["tokens"] == 384
    assert len(list((tmp_path / "cache").glob("*/state.json"))) == 3
    assert main(["pack", str(tmp_path / "model"), "-o", str(tmp_path / "b.rac"), *how, "--calibrate", "auto"]) == 0
    assert (tmp_path / "a.rac").read_bytes() == (tmp_path / "b.rac").read_bytes()
    assert main(["pack", str(tmp_path / "model"), "-o", str(tmp_path / "c.rac"), *how, "--no-backward"]) == 0
    assert provenance(tmp_path / "c.rac")["calibrate"][0]["backward"] is False
    capsys.readouterr()
    assert main(["pack", str(tmp_path / "model"), "-o", str(tmp_path / "d.rac"), *how, "--calibrate", "none"]) == 0
    assert provenance(tmp_path / "d.rac")["calibrate"] == "none"
