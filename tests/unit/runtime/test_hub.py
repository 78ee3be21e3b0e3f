"""Models by the id of a repository of the Hub, out of a local server."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")

import rac
from support import models
from support.hub import serving


def test_a_model_by_its_id(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    models.llama().save_pretrained(folder)
    rac.pack(folder, tmp_path / "m.rac")
    want = rac.load_model(tmp_path / "m.rac")
    with serving(monkeypatch, tmp_path) as hub:
        hub.add("org/name", {"m.rac": (tmp_path / "m.rac").read_bytes()})
        tokens = torch.arange(8)[None]
        for name in ("org/name", "hf://org/name/m.rac", "org/name@main"):
            model = rac.load_model(name)
            assert torch.equal(model(tokens).logits, want(tokens).logits)
        hub.requests.clear()
        rac.load_model("org/name", resident="compressed")
        assert not hub.asked("/cdn/")  # it was kept
        hub.add("org/empty", {"README.md": b""})
        with pytest.raises(rac.SourceError, match=r"has no .rac file"):
            rac.load_model("org/empty")
        with pytest.raises(rac.UnsupportedError, match="knows no tokenizer"):
            rac.load_tokenizer("org/name")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        model = rac.load_model("org/name")
        assert torch.equal(model(tokens).logits, want(tokens).logits)
