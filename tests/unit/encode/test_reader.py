"""What of a model reads a text, how long it may be, and what parts of the model that leaves out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import arch_matrix
from rac.calibrate import reader
from rac.calibrate.layers import calibrate
from rac.errors import SourceError
from rac.models.predictions import positions


def test_positions_of_any_number():
    assert positions(SimpleNamespace(max_position_embeddings=-1), 64) == 64
    assert positions(SimpleNamespace(max_position_embeddings=32), 64) == 32


def test_the_language_model_reads_before_others_do():
    """The Q-Former of InstructBLIP reads text too, and is the larger one here."""
    found = reader.find(arch_matrix.model_of("instructblip"), False, 16, "here")
    assert (found.name, found.causal) == ("language_model", True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("mllama", {"language_model.model.layers.1.mlp.up_proj.weight": "cross attention"}),
        ("clip", {"text_projection.weight": "text projection", "visual_projection.weight": "vision tower"}),
        ("vits", {"decoder.conv_pre.weight": "convolutions"}),
        ("xlnet", {"transformer.layer.0.rel_attn.k": "products outside of linear layers"}),
        ("xclip", {"mit.encoder.layers.0.mlp.fc1.weight": "mit"}),
        ("musicgen", {"decoder.lm_heads.0.weight": "decoder"}),
    ],
)
def test_parts_that_a_text_leaves_out(kind, parts, tmp_path):
    arch_matrix.model_of(kind).save_pretrained(tmp_path)
    found = calibrate(tmp_path, torch.arange(3, 131).numpy(), tokens=128, context=64)
    assert found and parts.items() <= found.missing.items()


def test_a_tokenizer_that_cannot_take_the_text(tmp_path):
    """That of Gemma has an unknown token, and the file has none."""
    arch_matrix.model_of("siglip2").save_pretrained(tmp_path)
    arch_matrix.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="the tokenizer cannot take the text.*`--calibrate none` works"):
        calibrate(tmp_path, arch_matrix.TEXT, tokens=128)
