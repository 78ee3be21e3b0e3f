"""Calibration: what the blocks find one by one is what the whole model finds; interrupted, cached, refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rac.calibrate import chain as calibration_blocks
from rac.calibrate import endings
from rac.calibrate import passes as calibration_stream
from rac.calibrate import text as calibration_text
from rac.calibrate.experts import settled  # noqa: E402
from rac.calibrate.layers import Layer, calibrate, joined  # noqa: E402
from rac.calibrate.moments import Collector  # noqa: E402
from rac.calibrate.tables import Tables  # noqa: E402
from rac.errors import MissingDependencyError, RacError, SourceError  # noqa: E402
from support import models  # noqa: E402

IDS = np.random.default_rng(0).integers(3, 90, 330)
SMALL = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**more):
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **SMALL,
        **more,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **SMALL)
    return transformers.GPT2LMHeadModel(config)


def opt():
    """Linear layers before and after its blocks."""
    config = transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=512,
        **SMALL,
    )
    return transformers.OPTForCausalLM(config)


def gemma():
    """Blocks whose arguments differ: a sliding window in some of them."""
    config = transformers.Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=512,
        **SMALL,
    )
    return transformers.Gemma3ForCausalLM(config)


MIXTURE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    **SMALL,
}


def mixtral():
    """Experts fused in the model, one by one in the files."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **MIXTURE))


def granite():
    """Experts fused in the files too, under another name."""
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(num_local_experts=4, **MIXTURE))


def gpt_oss():
    """Experts stored (in, out), multiplied with @."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(num_local_experts=4, head_dim=8, rope_parameters=rope, **MIXTURE)
    )


def bert():
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        vocab_size=97,
    )
    return transformers.BertModel(config)


def t5():
    config = transformers.T5Config(
        d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, **SMALL
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture
def saved(tmp_path):
    def save(make, dtype="float32"):
        torch.manual_seed(0)
        folder = tmp_path / f"{make.__name__}-{dtype}"
        make().to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return save


def run(folder, **more):
    said = []
    more = {"tokens": 320, "context": 64, "note": lambda *a: said.append(a), **more}
    return calibrate(folder, more.pop("text", IDS), **more), said


TABLES = ("embed", "head", "shared", "relative_attention_bias")


def layers(found):
    """What a calibration found, less tables."""
    return {name: layer for name, layer in found.items() if not any(word in name for word in TABLES)}


def whole(monkeypatch, folder, **more):
    def refuse(*_):
        raise calibration_blocks.UnfitError("asked for")

    with monkeypatch.context() as m:
        m.setattr(calibration_blocks.Chain, "__init__", refuse)
        found, said = run(folder, **more)
    assert any("asked for" in what for what, _, _ in said)
    return found


def equal(a, b, tolerance=1e-4):
    assert set(a) == set(b)
    for name in a:
        for x, y in ((a[name].second, b[name].second), (a[name].sensitivity, b[name].sensitivity)):
            assert (x is None) == (y is None)
            if x is not None:
                np.testing.assert_allclose(x, y, rtol=10 * tolerance, atol=tolerance * x.max())


@pytest.mark.parametrize("make", [llama, gpt2, opt, gemma, mixtral, granite, gpt_oss])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_find_what_the_whole_model_finds(saved, monkeypatch, make, dtype):
    folder = saved(make, dtype)
    found, said = run(folder)
    assert not [what for what, _, of in said if not of]
    assert found.tokens == 320 and len(found.digest) == 32
    # a table of numbers that the model makes itself may be rounded to the stored type
    equal(whole(monkeypatch, folder), found, 1e-4 if dtype == "float32" or make is not gemma else 2e-2)
    done = [d for _, d, of in said if of]
    assert done == sorted(done) and said[-1][1] == said[-1][2]


@pytest.mark.parametrize("make", [llama, gpt2, gpt_oss])
def test_more_positions_than_logits_are_made_at_once(saved, monkeypatch, make):
    """GPT-2 gives its output the shape of its input."""
    folder = saved(make)
    found, said = run(folder, context=320)
    assert not [what for what, _, of in said if not of]
    monkeypatch.setattr(endings.Predictions, "at_once", 1000)
    equal(run(folder, context=320)[0], found, 1e-4)


def test_a_model_that_reads_no_text(saved):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = saved(lambda: transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)))
    with pytest.raises(SourceError, match=r"ViTModel .*it reads images.* rac.calibrate .*`--calibrate none` works"):
        run(folder)


def test_positions_that_begin_behind_the_padding(saved):
    """RoBERTa has two positions fewer than it says."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {**SMALL, **sizes, "pad_token_id": 1, "max_position_embeddings": 66}
    folder = saved(lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**settings)))
    found, said = run(folder, context=1024)
    assert not [what for what, _, of in said if not of]
    assert found.tokens == 320  # five times 64


def backward(model, seed):
    """What `run` does, with autograd alone."""
    generator = torch.Generator().manual_seed(seed)
    for s in range(5):
        logits = model(input_ids=torch.from_numpy(IDS[None, s * 64 : s * 64 + 64])).logits[0]
        at = torch.rand(64, 1, generator=generator)
        labels = (torch.softmax(logits.detach(), -1).cumsum(-1) < at).sum(-1)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()


def test_second_moment_and_sensitivity_are_what_they_say(saved):
    folder = saved(llama)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    inputs, gradients = [], []
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda m, a, out: (inputs.append(a[0]), out.register_hook(gradients.append))[0])
    backward(model, 0)
    x, g = torch.cat(inputs).reshape(320, -1).detach(), torch.cat(gradients).reshape(320, -1)
    found = run(folder)[0]["model.layers.1.mlp.down_proj.weight"]
    weight = g.norm(dim=1, keepdim=True)
    second = (x * weight / weight.mean()).T @ x / 320
    np.testing.assert_allclose(found.second, second.numpy(), rtol=1e-3, atol=1e-3 * float(second.max()))
    np.testing.assert_allclose(found.sensitivity, (g.double() ** 2).mean(0).numpy(), rtol=1e-3)


def granted():
    """Rows that are multiplied after they were read, logits that are divided after they were made."""
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            embedding_multiplier=12.0,
            logits_scaling=0.5,
            tie_word_embeddings=False,
            **SMALL,
        )
    )


class Positions(torch.nn.Embedding):
    """A table that is told how many tokens there are, as LED's (a torch.Size) and Pegasus' (a tuple)."""

    def forward(self, shape):
        return super().forward(torch.arange(shape[1]))


@pytest.mark.parametrize("shape", [torch.Size((1, 3)), (1, 3)])
def test_a_table_that_is_given_no_ids_tells_nothing(shape):
    positions, words = Positions(8, 4), torch.nn.Embedding(8, 4)
    found = Collector({}, outputs=False)
    with Tables(found, {"positions": positions, "words": words}, {}):
        positions(shape)
        words(torch.tensor([[1, 1, 2]]))
    assert {name: n.tolist() for name, n in found.sums.squares.items()} == {"words:read": [0, 2, 1, 0, 0, 0, 0, 0]}


@pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=True), gpt2, granted])
def test_errors_of_tables_cost_what_they_are_said_to(saved, make):
    """Half the cost of random errors is the divergence that they make, nats a token, of each role and of both."""
    make.__name__ = "model"
    folder = saved(make)
    found = run(folder)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(IDS[:320].reshape(5, 64))
    tables = {id(m.weight): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        own = model(ids).logits.log_softmax(-1)
        for m in tables.values():
            name = next(n for n, p in model.named_parameters() if p is m.weight)
            layer = found[name if name in found else name.removeprefix("transformer.")]
            kl = cost = 0.0
            for seed in range(4):
                torch.manual_seed(seed)
                before, error = m.weight.clone(), 0.02 * m.weight.std() * torch.randn_like(m.weight)
                m.weight += error
                kl += float((own.exp() * (own - model(ids).logits.log_softmax(-1))).sum()) / 320
                m.weight.copy_(before)
                e = error.double().numpy()
                cost += 0.5 * float((e @ layer.second * e).sum(1) @ layer.sensitivity)
            assert 0.6 < kl / cost < 1.6, (name, kl, cost)


def test_transposed_weights_and_names_of_files(saved):
    folder = saved(gpt2)
    from safetensors.torch import load_file, save_file

    weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})  # as the published GPT-2 has them
    found = run(folder)[0]
    assert set(found) <= set(weights)
    layer = found["h.0.mlp.c_fc.weight"]
    assert layer.transposed and layer.second.shape == (32, 32) and layer.sensitivity.shape == (128,)


def test_experts(saved, monkeypatch):
    folder = saved(mixtral)
    model = transformers.MixtralForCausalLM.from_pretrained(folder, experts_implementation="eager")
    experts = model.model.layers[1].mlp.experts
    seen, gradients, real = {}, {}, torch.nn.functional.linear

    def linear(x, w, bias=None):
        out = real(x, w, bias)
        which = [e for e in range(4) if w.data_ptr() == experts.gate_up_proj[e].data_ptr()]
        if which:
            seen.setdefault(which[0], []).append(x.detach())
            out.register_hook(gradients.setdefault(which[0], []).append)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    backward(model, 0)
    monkeypatch.undo()
    found = run(folder)[0]
    x = {e: torch.cat(v) for e, v in seen.items()}
    g = {e: torch.cat(v) for e, v in gradients.items()}
    assert sorted(x) == [0, 1, 2, 3]
    weight = {e: v.norm(dim=1, keepdim=True) for e, v in g.items()}
    every = sum((x[e] * weight[e]).T @ x[e] for e in x) / sum(w.sum() for w in weight.values())
    for e, n in ((e, len(v)) for e, v in x.items()):
        own = (x[e] * weight[e]).T @ x[e] / weight[e].sum()
        second = (own * n + every * 32) / (n + 32) * n / 320
        for k, rows in (("w1", slice(48)), ("w3", slice(48, 96))):
            layer = found[f"model.layers.1.block_sparse_moe.experts.{e}.{k}.weight"]
            np.testing.assert_allclose(layer.second, second.numpy(), rtol=1e-3, atol=1e-3 * float(second.max()))
            square = (g[e].double() ** 2).mean(0).numpy()[rows]
            np.testing.assert_allclose(layer.sensitivity, square, rtol=1e-3)
    assert found[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"].second.shape == (48, 48)


def test_experts_that_the_files_hold_fused(saved):
    found = run(saved(granite))[0]
    layer = found["model.layers.0.block_sparse_moe.input_linear.weight"]
    assert layer.second.shape == (32, 32) and layer.sensitivity.shape == (4 * 96,)
    assert [one.sensitivity.shape for one in layer.experts] == [(96,)] * 4
    mean = np.mean([one.second for one in layer.experts], 0)
    assert not np.allclose(mean, layer.experts[0].second, rtol=0.1)
    np.testing.assert_allclose(np.trace(mean), np.trace(layer.second), rtol=0.5)
    twice = joined([found, found])["model.layers.0.block_sparse_moe.input_linear.weight"]
    np.testing.assert_allclose(twice.experts[3].second, layer.experts[3].second, rtol=1e-6)
    found = run(saved(gpt_oss))[0]
    layer = found["model.layers.0.mlp.experts.down_proj"]
    assert layer.transposed and [one.second.shape for one in layer.experts] == [(48, 48)] * 4
    assert all(one.transposed for one in layer.experts)


def test_expert_without_a_token():
    sums, squares = {"p[0]": np.eye(2, dtype=np.float32) * 30}, {"p[0]": np.array([40.0, 80.0])}
    found = {name: rest for name, *rest in settled("p", [20, 0], sums, {"p[0]": 10.0}, squares)}
    assert list(found) == ["p[]", "p[0]", "p[1]"]
    np.testing.assert_allclose(found["p[1]"][0], np.eye(2) * 3)  # as if one token had come: what all are on average
    np.testing.assert_allclose(found["p[0]"][0], np.eye(2) * 60, rtol=1e-6)
    for name in ("p[0]", "p[1]"):
        np.testing.assert_allclose(found[name][1], [2, 4])
    np.testing.assert_allclose(found["p[]"][1], np.array([2, 4, 2, 4]) * np.repeat([20, 1], 2) / 10.5)


def test_encoder_forward_alone_has_moments_alone(saved, monkeypatch):
    folder = saved(bert)
    found, said = run(folder, context=1024, fisher=False)
    assert found.tokens == 256 and not [what for what, _, of in said if not of]  # two of its 128
    assert "pooler.dense.weight" in found
    assert not any(v.sensitivity is not None for name, v in found.items() if "embeddings" not in name)
    often = found["embeddings.word_embeddings.weight"].sensitivity  # how often rows are read: smoothed, and no moments
    count = np.bincount(IDS[:256], minlength=97)
    assert often.min() > 0 and np.corrcoef(often, count)[0, 1] > 0.99
    second = found["embeddings.word_embeddings.weight"].second
    assert np.array_equal(second, second[0, 0] * np.eye(32, dtype=np.float32))
    assert not found["encoder.layer.0.output.dense.weight"].transposed
    equal(whole(monkeypatch, folder, context=1024, fisher=False), found)


MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def pools(folder, config=MEAN):
    """Say that a folder's encoder pools."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    modules = [
        {"path": "", "type": "x.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoder_has_sensitivities_of_what_it_makes(saved, monkeypatch, dtype, pooling):
    """Of its embedding, where its folder says how it pools, else of all that comes out: blocks as the whole model."""
    folder = saved(bert, dtype)
    if pooling:
        pools(folder)
    found, said = run(folder, tokens=256)
    assert not [what for what, _, of in said if not of]
    told = {name for name, layer in found.items() if layer.sensitivity is None}
    assert told == {"pooler.dense.weight"}
    assert all(layer.finite and layer.sensitivity.max() > 0 for name, layer in found.items() if name not in told)
    tables = {name for name, layer in found.items() if layer.slope}
    assert "embeddings.word_embeddings.weight" in tables and all("embeddings" in name for name in tables)
    equal(whole(monkeypatch, folder, tokens=256), found, 1e-4 if dtype == "float32" else 2e-2)


def test_how_a_folder_pools_decides(saved, tmp_path):
    folder, cache = saved(bert), tmp_path / "cache"
    digests = set()
    for config in (None, MEAN, {"pooling_mode_cls_token": True}):
        if config:
            pools(folder, config)
        digests.add(run(folder, cache=cache)[0].digest)
    assert len(digests) == 3


def test_encoder_and_decoder_run_as_a_whole(saved):
    found, said = run(saved(t5))
    assert any("encoder and a decoder" in what for what, _, _ in said)
    assert any("MB: its weights, what it makes of 64 tokens" in what for what, _, _ in said)
    assert {name.split(".")[0] for name in found} == {"encoder", "decoder", "shared"}
    assert all(np.isfinite(v.sensitivity).all() and v.finite for v in found.values())


def test_encoder_and_decoder_without_a_head(saved):
    """Nothing is predicted: hidden states are what comes out."""

    config = transformers.T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, **SMALL)
    found, _ = run(saved(lambda: transformers.T5Model(config)))
    assert all(v.sensitivity.max() > 0 for v in layers(found).values())
    assert any("EncDecAttention" in name for name in found) and found["shared.weight"].sensitivity.min() > 0


def test_stored_types_stay_as_they_are_in_a_run_of_the_whole(saved):
    """What the float32 copy of a BF16 model finds, without one."""
    from rac.calibrate.wide import Wide

    folder = saved(t5, "bfloat16")
    found, _ = run(folder)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    name, ids = "decoder.block.1.layer.2.DenseReluDense.wi", torch.from_numpy(IDS[None, :64])
    seen = []
    model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(a[0].detach()))
    with torch.no_grad():
        exact = model(input_ids=ids, decoder_input_ids=ids).logits
    narrow = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad(), Wide():
        logits = narrow(input_ids=ids, decoder_input_ids=ids).logits
    np.testing.assert_allclose(logits.numpy(), exact.numpy(), rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert found[f"{name}.weight"].second.shape == (32, 32)


def test_positions_are_found_by_running(saved):
    """MPNet counts them from behind its padding token, as its configuration does not say."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MPNetConfig(**sizes, vocab_size=97, max_position_embeddings=66, pad_token_id=0)
    found, said = run(saved(lambda: transformers.MPNetModel(config)), context=1024)
    assert found.tokens == 320 and not [what for what, _, of in said if not of]


def test_the_part_that_reads_text(saved):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text, vision = {**small, **SMALL}, {**small, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    found, _ = run(saved(lambda: transformers.CLIPModel(config)))
    assert all(name.startswith("text_model.") for name in found)
    assert found.missing["vision_model.encoder.layers.0.mlp.fc1.weight"] == "vision tower"


def test_a_language_model_that_sees(saved):
    """Names of the files are not those of the modules; the language model gets gradients as others do."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.LlamaConfig(**small, num_key_value_heads=2, max_position_embeddings=512, **SMALL)
    vision = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=8)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    found, said = run(saved(lambda: transformers.LlavaForConditionalGeneration(config)))
    assert not [what for what, _, of in said if not of] and len(layers(found)) == 14 and len(found) == 16
    assert all(layer.sensitivity is not None for layer in found.values())
    assert all("language_model" in name for name in layers(found))
    parts = {part for name, part in found.missing.items() if "embed" not in name and "head" not in name}
    assert parts == {"vision tower", "projector"}


def test_cross_attention_without_an_encoder(saved):
    config = transformers.BartConfig(
        d_model=32,
        decoder_ffn_dim=48,
        decoder_layers=2,
        decoder_attention_heads=4,
        max_position_embeddings=512,
        **SMALL,
    )
    found, _ = run(saved(lambda: transformers.BartForCausalLM(config)))
    assert found.missing["model.decoder.layers.1.encoder_attn.k_proj.weight"] == "cross attention"
    assert "model.decoder.layers.1.self_attn.k_proj.weight" in found


def test_forward_alone(saved):
    folder = saved(llama)
    both, alone = run(folder)[0], run(folder, fisher=False)[0]
    name = "model.layers.2.self_attn.o_proj.weight"
    assert np.corrcoef(both[name].second.ravel(), alone[name].second.ravel())[0, 1] > 0.9  # tokens count alike there
    assert alone[name].sensitivity is None and both.digest != alone.digest


def test_second_call_reads_the_cache(saved, tmp_path, monkeypatch):
    folder = saved(llama)
    first, _ = run(folder, cache=tmp_path / "cache")
    monkeypatch.setattr(calibration_stream, "find", None)
    second, said = run(folder, cache=tmp_path / "cache")
    equal(first, second, 0)
    assert not said and not list((tmp_path / "cache" / first.digest).glob("hidden-*"))
    with pytest.raises(TypeError):
        run(folder, cache=tmp_path / "cache", tokens=300)


def test_temporary_folder_goes_with_the_result(saved, tmp_path, monkeypatch):
    import gc
    import tempfile

    folder = saved(llama)
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    found, _ = run(folder)
    layer = found["model.layers.0.mlp.up_proj.weight"]
    del found
    gc.collect()
    assert layer.second.shape == (32, 32) and list((tmp_path / "t").iterdir())
    del layer
    gc.collect()
    assert not list((tmp_path / "t").iterdir())


@pytest.mark.parametrize("when", [1, 3, 5, 12, 14, 19, 23, 26])
def test_interrupted_goes_on_after_the_last_finished_block(saved, tmp_path, monkeypatch, when):
    folder, cache = saved(llama), tmp_path / "cache"
    monkeypatch.setattr(calibration_stream, "_ROWS", 128)  # three batches a step, 26 with the five labelled sequences
    expected = run(folder)[0]
    marks = []

    def stop(*what):
        marks.append(what)
        if len(marks) == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, cache=cache, note=stop)
    assert not list(cache.glob("*/*.part"))
    equal(expected, run(folder, cache=cache)[0], 0)


def test_interruption_repeats_no_finished_step(saved, tmp_path, monkeypatch):
    folder, cache = saved(llama), tmp_path / "cache"
    forward = calibration_stream.Passes._forward

    def failing(self, i):
        if i == 2:
            raise KeyboardInterrupt
        forward(self, i)

    with monkeypatch.context() as m:
        m.setattr(calibration_stream.Passes, "_forward", failing)
        with pytest.raises(KeyboardInterrupt):
            run(folder, cache=cache)
    seen = []
    monkeypatch.setattr(calibration_stream.Passes, "_forward", lambda self, i: (seen.append(i), forward(self, i)))
    found = run(folder, cache=cache)[0]
    assert seen == [2]
    equal(run(folder)[0], found, 0)


KILLED = """
import os, signal, sys
import numpy as np
from rac.calibrate import layers as calibrate
from rac.calibrate import folder as calibration_cache
commit, left = calibration_cache.Folder.commit, [int(sys.argv[3])]
def killing(self, *args, **more):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, *args, **more)
calibration_cache.Folder.commit = killing
ids = np.random.default_rng(0).integers(3, 90, 330)
calibrate.calibrate(sys.argv[1], ids, tokens=320, context=64, cache=sys.argv[2])
"""


@pytest.mark.parametrize("when", [2, 6])
def test_killed_goes_on(saved, tmp_path, when):
    folder, cache = saved(llama), tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", KILLED, folder, cache, str(when)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    found, said = run(folder, cache=cache)
    assert not [what for what, _, of in said if not of]
    equal(run(folder)[0], found, 0)
    assert not list(cache.glob("*/*.part"))


def test_two_processes_with_one_cache(saved, tmp_path, monkeypatch):
    folder, cache = saved(llama), tmp_path / "cache"
    held, free = threading.Event(), threading.Event()
    find = calibration_stream.find

    def slow(*args):
        held.set()
        assert free.wait(60)
        find(*args)

    monkeypatch.setattr(calibration_stream, "find", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, folder, cache=cache)
        assert held.wait(60)
        said = []
        second = pool.submit(run, folder, cache=cache, note=lambda *a: (said.append(a), free.set()))
        equal(first.result()[0], second.result()[0], 0)
    assert [what for what, _, _ in said] == ["another process is calibrating the same: waiting for it"]


def test_finished_calibration_needs_no_lock(saved, tmp_path, monkeypatch):
    folder, cache = saved(llama), tmp_path / "cache"
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "filelock", None)
        with pytest.raises(MissingDependencyError, match="rac-codec"):
            run(folder, cache=cache)
    first = run(folder, cache=cache)[0]
    monkeypatch.setitem(sys.modules, "filelock", None)
    equal(first, run(folder, cache=cache)[0], 0)


def spoil(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_damage(saved, tmp_path):
    folder, cache = saved(llama), tmp_path / "cache"
    expected, _ = run(folder, cache=cache)
    place = cache / expected.digest
    kept = {k: np.array(v.second) for k, v in expected.items()}
    # cut off: found when opened
    file = next(place.glob("second-*"))
    file.write_bytes(file.read_bytes()[:-4])
    found, _ = run(folder, cache=cache)
    assert all(np.array_equal(kept[k], found[k].second) for k in kept)
    # changed: a sensitivity is found when opened, a second moment when it is read
    file = next(place.glob("sensitivity-*"))
    spoil(file)
    found, said = run(folder, cache=cache)
    assert any("damaged" in what for what, _, _ in said)
    for file in place.glob("second-*"):
        spoil(file)
    found, _ = run(folder, cache=cache)
    with pytest.raises(SourceError, match="damaged"):
        _ = found["model.layers.0.mlp.up_proj.weight"].second
    (place / "state.json").write_text("{")
    found, _ = run(folder, cache=cache)
    assert all(np.array_equal(kept[k], found[k].second) for k in kept)


def test_damaged_work_file_starts_again(saved, tmp_path, monkeypatch):
    folder, cache = saved(llama), tmp_path / "cache"
    backward = calibration_stream.Passes._backward

    def failing(self, i):
        if i == 1:
            raise KeyboardInterrupt
        backward(self, i)

    with monkeypatch.context() as m:
        m.setattr(calibration_stream.Passes, "_backward", failing)
        with pytest.raises(KeyboardInterrupt):
            run(folder, cache=cache)
    file = next(cache.glob("*/hidden-0001.npy"))
    spoil(file)
    found, said = run(folder, cache=cache)
    assert any("damaged" in what for what, _, _ in said)
    equal(run(folder)[0], found, 0)


def test_own_text(saved, tmp_path):
    folder = saved(llama)
    found, said = run(folder, text=None, cache=tmp_path / "cache", context=32, tokens=100)
    ids = np.load(tmp_path / "cache" / found.digest / "ids.npy")
    assert ids.shape == (3, 32) and found.tokens == 96 and (ids[:, 0] == 1).all()
    assert ("writing its own text", 96, 96) in said
    shutil.rmtree(tmp_path / "cache")
    run(folder, text=None, cache=tmp_path / "cache", context=32, tokens=100)
    np.testing.assert_array_equal(ids, np.load(tmp_path / "cache" / found.digest / "ids.npy"))
    with pytest.raises(SourceError, match="causal"):
        run(saved(bert), text=None)


def test_own_text_in_pieces(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_text, "PIECE", 24)
    found, said = run(saved(llama), text=None, cache=tmp_path / "cache", context=70, tokens=150)
    ids = np.load(tmp_path / "cache" / found.digest / "ids.npy")
    assert ids.shape == (2, 70) and (ids[:, [0, 24, 48]] == 1).all() and (ids[:, 1:24] != ids[:, 25:48]).any()
    assert ("writing its own text", 144, 144) in said


def test_batches_of_own_text_are_not_the_same(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_text, "_CACHE_BYTES", 1)  # one sequence at a time
    found, _ = run(saved(llama), text=None, cache=tmp_path / "cache", context=32, tokens=100)
    ids = np.load(tmp_path / "cache" / found.digest / "ids.npy")
    assert len(ids) == len({tuple(row) for row in ids}) == 3


def test_not_finite_is_told(saved):
    folder = saved(llama)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found, _ = run(folder, fisher=False)
    assert found["model.layers.1.mlp.up_proj.weight"].finite
    assert not found["model.layers.1.mlp.down_proj.weight"].finite


def test_model_whose_blocks_look_at_each_other_runs_as_a_whole(saved, monkeypatch):
    """Blocks that get something that depends on the text are found out, and the result is right all the same."""
    folder = saved(llama)
    expected = whole(monkeypatch, folder)
    run_block = calibration_blocks.Chain.run
    monkeypatch.setattr(calibration_blocks.Chain, "run", lambda self, i, h: run_block(self, i, h) + (i == 1))
    found, said = run(folder)
    assert any("model.layers.1 alone" in what for what, _, _ in said)
    equal(expected, found, 0)


def tokenizer(folder):
    words = {"<unk>": 0, **{w: i + 3 for i, w in enumerate("abcdefghij")}}
    about = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(about))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_text(saved):
    folder = saved(llama)
    with pytest.raises(SourceError, match=r"no tokenizer.json.*--calibrate none"):
        run(folder, text="a b c " * 100)
    tokenizer(folder)
    assert run(folder, text="a b c d " * 100)[0].tokens == 320
    found, said = run(folder, text="a b c d " * 40, context=256)
    assert found.tokens == 160 and any("has 160 tokens, 320 were asked for" in what for what, _, _ in said)
    for text, n in (("", 0), ("a b " * 60, 120)):
        with pytest.raises(SourceError, match=f"has {n} tokens, at least 128"):
            run(folder, text=text, context=256)


def test_refused(saved, tmp_path):
    with pytest.raises(SourceError, match="folder"):
        run(tmp_path / "none")
    folder = saved(llama)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RacError, match="no model that transformers can load"):
        run(folder)
    weights.unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="no model that transformers can load"):
        run(folder)
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(SourceError, match="no model that transformers knows"):
        run(folder)


def test_calibrations_joined():
    one, other = np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32)
    found = joined(
        [{"a": Layer(one, np.array([1.0, 2.0])), "b": Layer(one, None)}, {"a": Layer(other, np.array([3.0, 4.0]))}]
    )
    np.testing.assert_array_equal(found["a"].second, [[1, 0.5], [0.5, 1]])
    np.testing.assert_array_equal(found["a"].sensitivity, [2, 3])
    np.testing.assert_array_equal(found["b"].second, one)
    assert found["b"].sensitivity is None and list(found) == ["a", "b"]
    np.testing.assert_array_equal(one, np.eye(2))
    assert not joined([{"a": Layer(one, None)}, {"a": Layer(one, None, finite=False)}])["a"].finite


def test_layer_takes_an_array():
    layer = Layer(np.eye(3, dtype=np.float32), None)
    assert layer.second.shape == (3, 3) and layer.finite and not layer.transposed


def named(saved, make, rows=None):
    """What a model's files hold of matrices, and what a calibration of it finds."""
    from safetensors.torch import load_file

    folder = saved(make)
    weights = load_file(folder / "model.safetensors")
    found = run(folder)[0]
    assert set(found) <= set(weights)
    return {k for k, v in weights.items() if v.dim() > 1 and "embed" not in k and "head" not in k}, found


def test_names_that_transformers_changes_and_rows_that_it_cuts(saved):
    """`Wqkv` of the files is three layers of the module, `self_attn.q_proj` and so on."""
    config = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 97}

    def nomic():
        return transformers.NomicBertModel(transformers.NomicBertConfig(**config, type_vocab_size=2))

    stored, found = named(saved, nomic)
    assert any("Wqkv" in name for name in stored) and set(layers(found)) == stored


def test_experts_multiplied_all_at_once(saved):
    """Llama 4 multiplies the tokens of all experts in one product."""
    sizes = {
        **MIXTURE,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
    }

    def llama4():
        return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes))

    stored, found = named(saved, llama4)
    layer = found["model.layers.0.feed_forward.experts.gate_up_proj"]
    assert len(layer.experts) == 4 and layer.transposed and layer.experts[1].second.shape == (32, 32)
    assert layer.experts[0].sensitivity.shape == (96,) and stored - set(found) == {
        f"model.layers.{i}.feed_forward.router.weight" for i in range(2)
    }


def test_what_the_loss_does_not_depend_on_counts_by_its_inputs(saved):
    def pooled():
        return transformers.BigBirdForCausalLM(
            transformers.BigBirdConfig(
                **{k: v for k, v in MIXTURE.items() if "experts" not in k and "key_value" not in k},
                attention_type="original_full",
                is_decoder=True,
            )
        )

    found = run(saved(pooled))[0]
    assert found["bert.pooler.weight"].sensitivity is None and found["bert.pooler.weight"].second.trace() > 0
    assert found["bert.encoder.layer.0.output.dense.weight"].sensitivity is not None


def test_loops_over_positions_are_cut_at_once():
    """The scan of Mamba takes its steps one by one: the same numbers and gradients, in linear time."""
    from rac.calibrate import wide

    x = torch.randn(2, 3, 40, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for mode in (wide.Wide, torch.no_grad):
        leaf = x.clone().requires_grad_(True)
        with mode() if mode is wide.Wide else torch.enable_grad():
            a, state, cut = leaf * 2, torch.zeros(2, 3, 4), 0
            for i in range(40):
                piece = a[:, :, i]
                cut += type(piece.grad_fn).__name__ == "UnbindBackward0"
                state = (state + piece).tanh()
            state.sum().backward()
        found.append((state.detach(), leaf.grad, cut))
    (one, g, cuts), (other, h, none) = found
    assert torch.equal(one, other) and torch.equal(g, h) and (cuts, none) == (39, 0)


def test_mamba_backward_is_what_autograd_alone_finds(saved):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SMALL)
    folder = saved(lambda: transformers.MambaForCausalLM(config))
    model, gradients = transformers.MambaForCausalLM.from_pretrained(folder), []
    layer = model.backbone.layers[0].mixer.in_proj
    layer.register_forward_hook(lambda m, a, out: out.register_hook(gradients.append) and None)
    backward(model, 0)
    square = (torch.cat(gradients).reshape(320, -1).double() ** 2).mean(0).numpy()
    found = run(folder)[0]["backbone.layers.0.mixer.in_proj.weight"]
    np.testing.assert_allclose(found.sensitivity, square, rtol=1e-3)


def test_blocks_that_return_lists_or_more(saved):
    """Bloom and GPT return attention weights beside the hidden state, GPT in a list."""
    bloom = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL)
    gpt = transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=512, **SMALL)
    for make in (lambda: transformers.BloomForCausalLM(bloom), lambda: transformers.OpenAIGPTLMHeadModel(gpt)):
        found, said = run(saved(make))
        assert not [what for what, _, of in said if not of] and len(layers(found)) == 8


def test_only_what_failed_to_be_written_is_called_that(tmp_path):
    """An error of the work, or of telling about it, is no full disk."""
    from rac.calibrate.folder import Folder
    from rac.errors import OutputError

    folder = Folder(tmp_path, "x")
    with pytest.raises(BrokenPipeError), folder.sink("a.npy", (4,)) as append:
        append(np.zeros(2, np.float32))
        raise BrokenPipeError("the terminal is gone")
    assert not list((tmp_path / "x").iterdir())
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(OutputError, match="cannot be written"):
        folder.put("a.npy", np.zeros(2, np.float32))


def test_a_model_with_code_of_its_own(saved, tmp_path):
    folder = saved(llama)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise RuntimeError('this was run')")
    with pytest.raises(SourceError, match=r"code of its own, which is not run here; rac\.calibrate .*calibrate none"):
        run(folder)


@pytest.mark.parametrize(("front", "count", "context"), [([], 3, 8), ([7], 3, 8), ([7, 9], 3, 8)])
def test_every_sequence_begins_with_what_is_put_in_front(front, count, context):
    ids = np.arange(100, 124)
    found = calibration_text.sequences(ids, 24, context, front)
    assert found.shape == (count, context)
    assert np.all(found[:, : len(front)] == front)
    body = found[:, len(front) :]
    assert np.array_equal(body.reshape(-1), ids[: body.size])


def test_a_short_text_is_one_sequence_with_what_is_put_in_front():
    assert calibration_text.sequences(np.arange(5), 4, 4, [7]).tolist() == [[7, 0, 1, 2]]
    assert calibration_text.sequences(np.arange(130), 1024, 1024, [7]).shape == (1, 131)


def test_a_calibration_runs_over_sequences_that_begin_with_begin_of_text(tmp_path):
    models.write("llama", tmp_path)
    plain = calibrate(tmp_path, models.TEXT, tokens=256, context=64)
    models.tokenizer(begin=True).save_pretrained(tmp_path)
    found = calibrate(tmp_path, models.TEXT, tokens=256, context=64)
    first, *ids = models.tokenizer(begin=True)(models.TEXT).input_ids
    assert np.array(found.ids())[:, 0].tolist() == [first] * 4
    assert np.array(found.ids())[:, 1:].reshape(-1).tolist() == ids[: 4 * 63]
    assert np.array(plain.ids()).reshape(-1).tolist() == ids[:256]
