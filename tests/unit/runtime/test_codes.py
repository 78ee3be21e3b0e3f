"""Models whose quantised weights are int8 codes: products, memory, copies, state dictionaries, adapters, refusals."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rac
from rac import native
from rac.decode.archive import RacFile
from rac.encode.pack import pack
from rac.errors import UnsupportedError
from rac.native.coded import Kind
from rac.runtime import record, running
from rac.runtime.codes import Coded, CodedEmbedding, CodedLinear, _buffers, codes
from rac.runtime.products import multiply, weight_of
from rac.runtime.replace import residency
from rac.stages.words import from_words, to_words
from support import models

GOLDEN = Path(__file__).parents[3] / "format_spec" / "golden" / "good"


def packed(root, kind, **how):
    models.write(kind, root / "hf")
    pack(root / "hf", root / "m.rac", bits=3, embeddings=True, calibrate="none", effort="fast", **how)
    return root / "m.rac"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(dense model in float32, archive at 3 bits)."""
    path = packed(tmp_path_factory.mktemp("codes"), "llama")
    return rac.load_model(path, dtype=torch.float32), path


def near(a, b, most=0.03):
    return float((a - b).detach().norm() / b.detach().norm()) < most


def test_weights_products_and_memory(small):
    dense, path = small
    model = rac.load_model(path, resident="codes", dtype=torch.float32)
    assert type(model.model.embed_tokens) is CodedEmbedding and type(model.lm_head) is CodedLinear
    assert model.lm_head.record is model.model.embed_tokens.record
    coded = {n: m for n, m in model.named_modules() if isinstance(m, Coded)}
    assert len(coded) == 12  # without what is too small to quantise
    for name, layer in coded.items():
        want = dense.get_submodule(name).weight
        assert torch.equal(layer.dense(), want.bfloat16())
        n = len(layer._buffers["weight_values"])
        assert layer.nbytes - layer.record.nbytes == 4 * sum(want.shape) + 20 * n and layer.record.shape == want.shape
        x = torch.randn(3, want.shape[1], generator=torch.Generator().manual_seed(1))
        if type(layer) is CodedLinear:
            assert near(layer(x), x @ want.T, 1e-6)
            many = x.repeat(32, 1)
            assert torch.equal(layer(many), layer(x).repeat(32, 1))  # whatever is multiplied beside it
            assert layer(x.bfloat16()).dtype == torch.bfloat16
            turned = x.repeat(2, 1, 1).transpose(0, 1)
            assert near(layer(turned), turned @ want.T, 1e-6) and layer(x[:0]).shape == (0, len(want))
            with pytest.raises(RuntimeError, match="the input is"):
                layer(x[:, 1:])
    assert near(models.logits(model), models.logits(dense), 1e-5)
    found = residency(model)
    assert found.records == 11 and found.held < 0.75 * found.instead and "are int8 codes" in str(found)


def test_rows_of_an_embedding(small):
    dense, path = small
    model = rac.load_model(path, resident="codes")
    ids = torch.tensor([[5, 0, 5], [7, 1, 2]])
    assert torch.equal(model.model.embed_tokens(ids).float(), dense.model.embed_tokens(ids))
    with pytest.raises(IndexError, match="out of range"):
        model.model.embed_tokens(torch.tensor([1 << 20]))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_other_models(tmp_path, kind):
    path = packed(tmp_path, kind)
    dense, model = (rac.load_model(path, resident=r, dtype=torch.float32) for r in ("dense", "codes"))
    for name, layer in model.named_modules():
        if isinstance(layer, Coded):
            assert near(layer.dense().float(), dense.get_submodule(name).weight, 0.004)
            assert layer.dense().shape == dense.get_submodule(name).weight.shape
    assert any(isinstance(m, Coded) and m.turned for m in model.modules()) is (kind == "gpt2")
    assert near(models.logits(model), models.logits(dense))


def found_in(path, name="w"):
    """(stored, bytes) of a tensor, by default the first, and the tensor."""
    with RacFile(path, framework="pt") as f:
        entry = next(e for e in f.archives[0].index.entries if e.type == 1 and name in (e.name, None))
        data = record.collect(f.archives[0], entry)
        return record.parse(data), data, f.read(entry.name)[1].float()


def numbers(c):
    """The weight that codes stand for, but for a part of low rank."""
    w = c.codes * c.columns * c.rows[:, None]
    w[c.places[:, 0], c.places[:, 1]] = c.values
    return from_words(to_words(w, "BF16"), "BF16") if c.kind == Kind.ROUNDED else w


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("turned", [False, True])
def test_numbers_that_eight_bits_do_not_hold(tmp_path, turned, dtype):
    r = np.random.default_rng(0)
    w = r.standard_normal((192, 256)).astype(np.float32)
    w[3, 5], w[3, 6], w[100, 5], w[9, 255] = 40, 3000, -60, 25
    rac.pack({"w": torch.from_numpy(w).to(getattr(torch, dtype))}, tmp_path / "w.rac", bits=3)
    s, data, dense = found_in(tmp_path / "w.rac")
    c = codes(s, data, turned)
    assert not isinstance(c, str) and len(c.places) >= 2 and (c.kind == Kind.ROUNDED) is (dtype == "bfloat16")
    assert not c.codes[c.places[:, 0], c.places[:, 1]].any() and (np.diff(c.places[:, 0]) >= 0).all()
    want = dense.numpy().T if turned else dense.numpy()
    assert np.allclose(numbers(c), want, rtol=2**-11, atol=1e-7)
    assert turned or dtype == "float16" or np.array_equal(numbers(c), want)
    x = torch.from_numpy(r.standard_normal((2, want.shape[1])).astype(np.float32))
    buffers = list(_buffers(c, torch.device("cpu")).values())
    y = multiply(x, weight_of(buffers[0], buffers[1:5], c.kind))
    assert np.allclose(y, x.double() @ torch.from_numpy(numbers(c)).double().T, rtol=1e-4, atol=1e-3)


def test_scales_out_of_range(tmp_path, monkeypatch):
    w = np.random.default_rng(0).standard_normal((128, 192)).astype(np.float32)
    for dtype, coded in (("bfloat16", False), ("float32", True)):
        rac.pack({"w": torch.from_numpy(w).to(getattr(torch, dtype))}, tmp_path / f"{dtype}.rac", bits=3)
        s, data, _ = found_in(tmp_path / f"{dtype}.rac")
        assert not isinstance(codes(s, data), str)
        for name, value in (("SMALLEST", 1.0), ("GREATEST", 1e-3)):
            with monkeypatch.context() as m:
                m.setattr(native.coded, name, value)
                found = codes(s, data)
            assert not isinstance(found, str) if coded else "very small or very great" in found


def test_low_rank_corrections_bases():
    s, data, dense = found_in(GOLDEN / "example-lowrank.rac", None)
    c = codes(s, data)
    assert not isinstance(c, str) and c.factors is not None and c.kind == Kind.EXACT
    assert np.allclose(numbers(c) + c.factors[0] @ c.factors[1], dense.numpy(), rtol=0.01, atol=1e-6)
    for file, why in (("example-trellis.rac", "no integers"), ("example-basis.rac", "in another basis")):
        s, data, _ = found_in(GOLDEN / file, None)
        assert why in codes(s, data)


def test_copies_states_and_data_types(small):
    dense, path = small
    model = rac.load_model(path, resident="codes", dtype=torch.float32)
    want = models.logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(models.logits(other), want) and other.lm_head.record is other.model.embed_tokens.record
    state = model.state_dict()
    assert state["lm_head.weight"].dtype == torch.int8
    file = io.BytesIO()
    torch.save(state, file)
    for b in other.state_dict().values():
        b.zero_()
    file.seek(0)
    other.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(models.logits(other), want)
    narrow = other.to(torch.bfloat16)
    assert torch.equal(narrow.lm_head._numbers("weight_rows"), model.lm_head._numbers("weight_rows"))
    assert narrow.lm_head.record.dtype == torch.int8 and near(models.logits(narrow).float(), want, 0.05)
    assert next(model.parameters()).dtype == torch.float32 and model.num_parameters() == dense.num_parameters()


def test_dequantize_and_save(small, tmp_path):
    dense, path = small
    model = rac.load_model(path, resident="codes", dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="weights that are codes, which files do not hold; load it resident="):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model = model.dequantize()
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert not [n for n, _ in model.named_buffers() if "weight" in n]
    assert near(models.logits(model), models.logits(dense), 1e-3)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(models.logits(again), models.logits(model))


@pytest.mark.filterwarnings("ignore")
def test_adapters(small):
    peft = pytest.importorskip("peft")
    _, path = small
    model = rac.load_model(path, resident="codes", dtype=torch.float32)
    ids = models.inputs(model)["input_ids"]
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_B" in n)
    merged = tuned.merge_and_unload()
    first = merged.model.layers[0]
    assert type(first.self_attn.q_proj) is torch.nn.Linear and type(first.self_attn.o_proj) is CodedLinear


def test_devices(small, tmp_path):
    _, path = small
    model = rac.load_model(path, resident="codes", device_map="auto")
    assert type(model.lm_head) is CodedLinear
    where = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    with pytest.raises(UnsupportedError, match='an offloader has cannot become codes; load it resident="compressed"'):
        rac.load_model(path, resident="codes", device_map=where, offload_folder=str(tmp_path))


def test_lossless_is_dense(tmp_path, caplog):
    models.write("llama", tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    with caplog.at_level(logging.INFO, "rac.runtime.model"):
        model = rac.load_model(tmp_path / "m.rac", resident="codes")
    assert not any(isinstance(m, Coded) for m in model.modules())
    assert "0 weights are int8 codes" in caplog.text and "lossless" in caplog.text
    assert torch.equal(models.logits(model), models.logits(rac.load_model(tmp_path / "m.rac")))


def test_packed_for_running(small):
    dense, path = small
    want = models.logits(dense)
    model = rac.load_model(path, dtype=torch.float32)
    said = running.run_as(model, "dense", torch.bfloat16)
    assert said.startswith("dense, float32") and "11 layers packed by oneDNN" in said
    assert (
        model.model.layers[0].mlp.up_proj.weight.numel() == 0
        and model.lm_head.weight is model.model.embed_tokens.weight
    )
    assert near(models.logits(model), want, 1e-4)
    coded = rac.load_model(path, resident="codes", dtype=torch.float32)
    assert "int8 codes" in running.run_as(coded, "codes", torch.bfloat16)


def test_one_operation_of_torch(small):
    layer = rac.load_model(small[1], resident="codes", dtype=torch.float32).model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, layer.in_features)
    made = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(made(x), layer(x))
    beside = layer._beside()
    torch.library.opcheck(torch.ops.rac.multiply.default, (x, layer.record, beside, layer._kind))


def test_words_for_running(small):
    """What the file has lossless in BF16 is multiplied as codes are, and the rest as always."""
    dense, path = small
    model = rac.load_model(path, resident="codes", dtype=torch.float32)
    model.other = torch.nn.Linear(128, 128)  # no numbers of BF16
    model.lm_head = torch.nn.Linear(dense.lm_head.in_features, dense.lm_head.out_features)
    model.lm_head.weight.data = dense.lm_head.weight.detach().clone()
    x = torch.randn(2, dense.lm_head.in_features)
    want = model.lm_head(x)
    assert "1 layers of BF16 words, 1 layers packed by oneDNN" in running.run_as(model, "codes", torch.bfloat16)
    assert near(model.lm_head(x), want, 1e-6)
    assert torch.equal(copy.deepcopy(model.lm_head)(x), model.lm_head(x))


def test_data_types_for_running(monkeypatch):
    monkeypatch.setattr(running, "has_units", lambda: False)
    assert running.dtype_for("dense", torch.bfloat16) == torch.float32 == running.dtype_for("codes", torch.float16)
    monkeypatch.setattr(running, "has_units", lambda: True)
    assert (
        running.dtype_for("dense", torch.bfloat16) == torch.bfloat16 == running.dtype_for("compressed", torch.bfloat16)
    )
    assert running.dtype_for("dense", torch.float32) == torch.float32 == running.dtype_for("codes", torch.bfloat16)
