"""Which tensors are quantised: what is an embedding or an output layer, and why others stay lossless."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import rac
from rac.encode.align.recipe import quantisable
from rac.encode.pack import pack
from rac.encode.sources import open_source
from rac.encode.sources.tables import by_name

TABLES = (
    "model.embed_tokens.weight",
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "shared.weight",
    "lm_head.weight",
    "lm_heads.0.weight",
    "model.embed_tokens_per_layer.weight",
    "token_embd.weight",
    "output.weight",
    "head.weight",
    "lm_head.decoder.weight",
    "cls.predictions.decoder.weight",
    "extra.safetensors::model.embed_tokens.weight",
    "embed",
)
LAYERS = (
    "lm_head.dense.weight",  # roberta
    "model.altup_unembed_projections.0.weight",  # gemma3n
    "time_embedding.linear_1.weight",  # diffusers
    "time_embed.0.weight",
    "embeddings.patch_embeddings.projection.weight",
    "encoder.embeddings_project.weight",  # electra
    "encoder.embedding_hidden_mapping_in.weight",  # albert
    "encoder.pos_conv_embed.conv.weight",
    "context_embedder.weight",
    "layers.0.shared_expert.up_proj.weight",
    "layers.0.self_attn.head.weight",
)


@pytest.mark.parametrize("name", TABLES)
def test_tables_by_name(name):
    assert by_name(name, (32000, 64))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_sound_like_tables(name):
    assert not by_name(name, (512, 64))


def test_convolutions_are_no_tables():
    assert not by_name("vision_model.embeddings.patch_embedding.weight", (768, 3, 16, 16))
    assert not by_name("patch_embed.weight", (768, 3, 16, 16))
    assert by_name("embeddings.position_embeddings", (1, 197, 768))


def folder(path, config, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(vocabulary):
    return {
        "cls.classes.weight": gaussian(vocabulary, 64),
        "layer.0.weight": gaussian(256, 64, seed=1),
        "layer.1.weight": gaussian(256, 64, seed=2),
    }


@pytest.mark.parametrize(
    ("config", "lossless"),
    [
        ({"vocab_size": 300, "hidden_size": 64}, {"cls.classes.weight"}),
        (
            {"text_config": {"vocab_size": 300}, "vision_config": {"hidden_size": 64}},
            {"cls.classes.weight"},
        ),
        ({"vocab_size": 300, "intermediate_size": 300}, set()),  # says nothing
        ({"vocab_size": True, "hidden_size": 64}, set()),
        ("no JSON", set()),
        ("[" * 100_000, set()),
    ],
)
def test_a_configuration_tells_the_output_layer(tmp_path, config, lossless):
    source = open_source(folder(tmp_path / "m", config, model(300)))
    assert {t.name for t in source.tensors if not quantisable(t)} == lossless
    assert all(quantisable(t, embeddings=True) for t in source.tensors)


def test_as_many_rows_as_tokens_by_coincidence(tmp_path):
    tensors = {f"layer.{i}.weight": gaussian(256, 64, seed=i) for i in range(6)}
    source = open_source(folder(tmp_path / "m", {"vocab_size": 256}, tensors))
    assert all(quantisable(t) for t in source.tensors)


def test_what_stays_lossless_and_why(tmp_path):
    tensors = {
        "a.weight": gaussian(256, 64),
        "b.weight": gaussian(256, 64, seed=1),
        "embed_tokens.weight": gaussian(300, 64, seed=2),
        "norm.weight": gaussian(256, 64, seed=3),
        "steps": np.arange(9),
        "bias": gaussian(64),
        "zero.weight": np.zeros((256, 64), np.float32),
        "sign.weight": np.sign(gaussian(256, 64, seed=4)),
        "tiny.weight": gaussian(256, 64, seed=5) * np.float32(1e-20),
        "mask.weight": np.where(gaussian(256, 64) > 0, np.float32(-3e38), gaussian(256, 64)),
        "nan.weight": np.where(gaussian(256, 64) > 3, np.float32(np.nan), gaussian(256, 64)),
    }
    src = folder(tmp_path / "m", {}, tensors)
    done = pack(src, tmp_path / "m.rac", bits=4, effort="fast", keep=["b.*"], embeddings=False)
    found = {one.why.split(" (")[0]: (one.names, one.weights) for one in done.lossless}
    n = 256 * 64
    assert found == {
        "embeddings or output layers": (("embed_tokens.weight",), 300 * 64),
        "kept by --keep": (("b.weight",), n),
        "norms, biases or routers by their name": (("norm.weight",), n),
        "all zeros": (("zero.weight",), n),
        "with NaN or infinity": (("nan.weight",), n),
        "smaller that way": (("sign.weight",), n),
        "with nothing above 1e-14": (("tiny.weight",), n),
        "with numbers above 1e+18": (("mask.weight",), n),
        "vectors or small": (("bias",), 64),
        "of I64": (("steps",), 9),
    }
    assert [f.name for f in done.fidelity] == ["a.weight"]
    back = rac.load_file(tmp_path / "m.rac")
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors if name != "a.weight")
    again = pack(src, tmp_path / "m.rac", bits=4, effort="fast", keep=["b.*"], embeddings=False, force=True)
    assert again.lossless == done.lossless
