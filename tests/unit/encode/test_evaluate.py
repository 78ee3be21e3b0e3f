"""What `rac compare` measures, on a small random Llama with a tokenizer of bytes."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from rac.calibrate.evaluate import Measure
from rac.cli import main
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.encode.pack import pack
from rac.errors import MismatchError, SourceError
from rac.study.compare import Reading, compare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
st = pytest.importorskip("safetensors.torch")

from rac.models import predictions
from rac.models.predictions import windows
from support import models

HEADS, WIDTH, INNER = 2, 128, 192
TEXT = "".join(chr(97 + i * i % 26) + " " * (i % 5 == 0) for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder."""
    root = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(root)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def state(folder):
    """Its tensors."""
    return st.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """Archives of the model: lossless, at 5 bits and at 2."""
    root = tmp_path_factory.mktemp("packed")
    pack(folder, root / "lossless.rac")
    for bits in (5, 2):
        pack(folder, root / f"{bits}.rac", bits=bits, effort="fast", calibrate="none")
    return [root / "lossless.rac", root / "5.rac", root / "2.rac"]


def test_rows_of_archives(folder, state, packed):
    own, lossless, five, two = compare(folder, packed, Reading(TEXT, 300, 64, snr=True))
    assert (own.kl, own.top1, own.snr, own.quantised_bits) == (0, 1, None, None)
    assert (lossless.kl, lossless.top1, lossless.perplexity) == (0, 1, own.perplexity)
    assert lossless.snr is None and lossless.weighted_snr is None and lossless.size == packed[0].stat().st_size
    assert lossless.bits == 8 * lossless.size / sum(t.numel() for t in state.values())
    assert 0 < five.kl < two.kl and five.top1 >= two.top1
    assert five.snr > two.snr + 10 and five.weighted_snr > two.weighted_snr + 10
    assert 4.9 < five.quantised_bits <= 5 and 1.9 < two.quantised_bits <= 2
    assert own.size > five.size > two.size


def test_all_files_are_opened_before_the_original_runs(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no.rac"):
        next(compare(folder, [tmp_path / "no.rac"], Reading(TEXT, 300, 64)))


def test_figures_are_those_of_the_definition(folder, state):
    changed = {n: t + 0.03 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in state.items()}
    measure = Measure(folder, TEXT, tokens=192, context=96)
    found = measure.figures(measure.load(changed, "changed"), "changed")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids[:192]).reshape(2, 96)
    with torch.no_grad():
        p = torch.log_softmax(model(ids).logits, -1)
        model.load_state_dict(changed, strict=False)
        q = torch.log_softmax(model(ids).logits, -1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.01)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=0.011)
    loss = -q[:, :-1].gather(2, ids[:, 1:, None]).mean()
    assert found.perplexity == pytest.approx(math.exp(loss), rel=0.01)


def test_nothing_held_gives_the_same(folder, packed, monkeypatch):
    held = list(compare(folder, packed[2:], Reading(TEXT, 128, 64)))
    monkeypatch.setattr("rac.calibrate.evaluate.hold", lambda: 0)
    assert list(compare(folder, packed[2:], Reading(TEXT, 128, 64))) == held
    assert torch.is_grad_enabled()


def test_weighted_snr_is_that_of_the_outputs(folder, packed):
    """The second moments give what the outputs of one layer give."""
    name = "model.layers.0.mlp.down_proj"
    measure = Measure(folder, TEXT, tokens=128, context=128)
    measure.moments()
    state = st.load_file(folder / "model.safetensors")
    state[name + ".weight"] = state[name + ".weight"] * 1.01  # energy / error of this layer: 40 dB
    one = measure.weighted_snr(measure.load(state, "one"))
    every = {n: t * 1.01 if "proj" in n else t for n, t in state.items()}
    assert measure.weighted_snr(measure.load({**every, name + ".weight": state[name + ".weight"]}, "all")) == (
        pytest.approx(40, abs=0.01)
    )
    assert one > 40


def test_safetensors_and_folders_compare_too(folder, state, tmp_path):
    st.save_file({n: t.to(torch.bfloat16) for n, t in state.items()}, tmp_path / "bf16.safetensors")
    _, same, half = compare(folder, [folder, tmp_path / "bf16.safetensors"])
    assert same.snr is None and half.snr > 45 and half.kl is None
    assert half.size < same.size


def test_gguf_under_its_own_names(folder, state, tmp_path):
    """Queries and keys are permuted in a GGUF file; Q8_0 is near the original only if that is undone."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_context_length(128), w.add_embedding_length(WIDTH), w.add_block_count(1), w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS), w.add_head_count_kv(HEADS), w.add_layer_norm_rms_eps(1e-6), w.add_vocab_size(256)
    w.add_rope_dimension_count(WIDTH // HEADS), w.add_rope_freq_base(10000.0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers.0.": "blk.0.",
    }
    for name, t in state.items():
        a = t.numpy()
        if "q_proj" in name or "k_proj" in name:
            a = a.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH).swapaxes(1, 2).reshape(a.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        kind = gguf.GGMLQuantizationType.Q8_0
        if a.ndim == 2 and "token_embd" not in name:
            w.add_tensor(name, gguf.quants.quantize(a, kind), raw_dtype=kind)
        else:
            w.add_tensor(name, np.ascontiguousarray(a))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    _, row = compare(folder, [tmp_path / "m.gguf"], Reading(TEXT, 128, 64))
    assert row.quantised_bits == 8.5 and row.snr > 40 and row.kl < 0.01
    pack(tmp_path / "m.gguf", tmp_path / "m.rac")
    own, again = compare(tmp_path / "m.gguf", [tmp_path / "m.rac"])
    assert again.snr is None and own.quantised_bits == 8.5 and again.quantised_bits < 9


def test_other_models_are_refused_by_a_tensor(folder, state, tmp_path):
    def refused(tensors, match, text=None):
        st.save_file(tensors, tmp_path / "m.safetensors")
        with pytest.raises(MismatchError, match=match):
            list(compare(folder, [tmp_path / "m.safetensors"], text and Reading(text, 64, 64)))

    first, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    refused({n: t for n, t in state.items() if n != first}, f"no tensor '{first}'")
    refused({**state, first: torch.ones(INNER, WIDTH + 16)}, rf"'{first}' is \[192, 144\], the original has")
    refused({n: t for n, t in state.items() if n != norm}, f"no tensor '{norm}'", TEXT)
    refused({**state, norm: torch.ones(WIDTH + 1)}, rf"'{norm}' is \[129\], the original has \[128\]", TEXT)
    refused(
        {**state, "model.layers.7.mlp.up_proj.weight": state[first] + 1}, r"'model.layers.7.mlp.up_proj.weight'", TEXT
    )


def test_texts_and_folders_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(SourceError, match="the text has 5 tokens, 8192 are asked for, one window needs 64"):
        next(compare(folder, [], Reading("short", context=64)))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(SourceError, match="no tokenizer"):
        next(compare(tmp_path, [], Reading(TEXT, context=64)))
    with pytest.raises(SourceError, match="needs the Hugging Face folder"):
        next(compare(folder / "model.safetensors", [], Reading(TEXT)))
    with pytest.raises(ValueError, match="window"):
        next(compare(folder, [], Reading(TEXT, 10, 64)))


def test_pack_to_a_divergence(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    goal = 0.02
    how = {"calibrate": str(text), "tokens": 256, "effort": "fast", "embeddings": False}  # tables are coarse steps here
    pack(folder, tmp_path / "m.rac", kl=goal, **how)
    _, row = compare(folder, [tmp_path / "m.rac"], Reading(TEXT, 256, 128))
    assert 0.9 * goal < row.kl <= goal * 1.001
    with pytest.raises(ValueError, match="text"):
        pack(folder, tmp_path / "n.rac", kl=goal, calibrate="none")


def test_the_model_writes_its_own_text(folder, tmp_path):
    done = pack(
        folder, tmp_path / "m.rac", snr=20, calibrate="self", tokens=256, effort="fast", cache=str(tmp_path / "cache")
    )
    assert {f.alignment for f in done.fidelity} == {"triangular"}
    assert 20 <= sum(f.snr for f in done.fidelity) / len(done.fidelity) <= 20.1


def test_several_texts(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["pack", folder, "-o", tmp_path / "m.rac", "--bits", "4", "--effort", "fast", "--tokens", "256"]
    arguments += ["--cache", tmp_path / "cache", "--calibrate", text, "--calibrate", "self"]
    assert main(list(map(str, arguments))) == 0
    used = Archive(FileAccess(tmp_path / "m.rac")).header["provenance"]["calibrate"]
    assert [u["tokens"] for u in used] == [256, 256] and used[1]["text"] == "self" and len(used[0]["text"]) == 32
    pack(
        folder,
        tmp_path / "n.rac",
        bits=4.0,
        effort="fast",
        tokens=256,
        cache=str(tmp_path / "cache"),
        calibrate=[str(text), "self"],
    )
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "n.rac").read_bytes()
    pack(folder, tmp_path / "o.rac", bits=4.0, effort="fast", tokens=256, cache=str(tmp_path / "cache"), calibrate=text)
    assert (tmp_path / "m.rac").read_bytes() != (tmp_path / "o.rac").read_bytes()


def test_pack_measures_and_reports(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["pack", folder, "-o", tmp_path / "m.rac", "--bits", "4", "--effort", "fast", "--cache", "none"]
    arguments += ["--calibrate", text, "--tokens", "256", "--measure", text, "--report", tmp_path / "r.json"]
    assert main(list(map(str, arguments))) == 0
    out = capsys.readouterr().out
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj\.weight +1 ", out)
    kl, perplexity = re.search(r"KL (\S+) nats.*perplexity (\S+) ", out).groups()
    report = json.loads((tmp_path / "r.json").read_text())
    assert 0 < float(kl) < 5 and float(perplexity) > 1
    assert report["quantised"] == len(report["tensors"]) == 8 and 3.9 < report["quantised_bits"] <= 4
    assert sum(t["size"] for t in report["tensors"]) * 8 == pytest.approx(
        report["quantised_bits"] * sum(t["shape"][0] * t["shape"][1] for t in report["tensors"])
    )


@pytest.mark.parametrize("begin", [False, True])
def test_windows_begin_with_begin_of_text_where_the_tokenizer_puts_it_in_front(begin):
    tokenizer, config = models.tokenizer(begin), transformers.LlamaConfig()
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    found = windows(tokenizer, TEXT, 256, 64, config, "")
    assert [len(window) for window in found] == [64] * 4
    body = 64 - begin
    assert [window[begin:] for window in found] == [ids[i * body : (i + 1) * body] for i in range(4)]
    assert not begin or {window[0] for window in found} == {tokenizer("a").input_ids[0]}


def test_what_an_encoder_puts_around_a_text_is_in_no_window():
    tokenizer = models.tokenizer(begin=True)
    around = tokenizers.processors.TemplateProcessing(single="! $0 !", special_tokens=[("!", 0)])
    tokenizer.backend_tokenizer.post_processor = around
    assert len(tokenizer("a").input_ids) == 3
    assert predictions.begin(tokenizer) == []
