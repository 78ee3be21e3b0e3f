"""Calibration, factors and feedback by the code of a device: on the processor against its own, on `meta` for shapes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import device_pack
import rac
from rac.calibrate import passes
from rac.calibrate.layers import calibrate
from rac.calibrate.moments import Collector
from rac.calibrate.place import Device, Held, Place, place_of
from rac.calibrate.wide import Wide
from rac.cli import main
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.encode import options
from rac.encode.allocate import budget
from rac.encode.quantise.trellis import Effort, Scales, quantise
from rac.errors import LimitError, MissingDependencyError
from rac.linalg.device import Errors, check, factor_of, feeds_of, triangular_on
from rac.linalg.factors import Factors
from rac.linalg.triangular import triangular
from support.models import llama

IDS = np.random.default_rng(0).integers(3, 90, 330)
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
AWAY = "cpu:0"  # to torch another name of the same processor


def opt():
    """Linear layers before and after its blocks."""
    config = transformers.OPTConfig(**SMALL, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16)
    return transformers.OPTForCausalLM(config)


def mixtral():
    """Experts fused in the model."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**SMALL, **heads, intermediate_size=48, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def saved(model, folder):
    torch.manual_seed(0)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def second(n=200):
    x = np.random.default_rng(0).standard_normal((150, n)).astype(np.float32) * np.geomspace(1, 9, n, dtype=np.float32)
    return x.T @ x / 150


@pytest.mark.parametrize("make", [llama, opt, mixtral])
@pytest.mark.parametrize("fisher", [True, False])
def test_a_device_finds_what_the_processor_finds(tmp_path, make, fisher):
    folder = saved(make(), tmp_path)
    how = {"tokens": 192, "context": 48, "fisher": fisher}
    here, there = (calibrate(folder, IDS, **how, device=device) for device in ("cpu", AWAY))
    assert here.keys() == there.keys()
    assert here.digest != there.digest
    for name, layer in here.items():
        scale = np.abs(layer.second).max()
        assert np.allclose(there[name].second, layer.second, rtol=1e-3, atol=1e-4 * scale)
        assert (layer.sensitivity is None) == (there[name].sensitivity is None)
        if layer.sensitivity is not None:
            assert np.allclose(there[name].sensitivity, layer.sensitivity, rtol=1e-2)


def test_what_is_no_chain_runs_on_the_processor_and_says_so(tmp_path, monkeypatch):
    folder, said = saved(llama(), tmp_path), []
    monkeypatch.setattr(passes, "_chained", lambda *_: (_ for _ in ()).throw(passes.UnfitError("made up")))
    calibrate(folder, IDS, tokens=96, context=48, note=lambda what, *_: said.append(what), device=AWAY)
    assert any("on the CPU: made up" in what for what in said)


def test_a_block_and_the_next_are_all_that_a_device_holds():
    """By shapes alone, of a block of 8 billion weights: nothing is computed, and nothing is allocated."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer

    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    place = Device("meta")
    held = Held(place)
    brought = held.brought([block])  # matrices as they are stored, the two norms in float32
    assert sum(x.numel() * x.element_size() for _, x in brought) == 2 * 218_103_808 + 4 * 2 * 4096
    assert all(p.dtype == torch.bfloat16 for p, _ in brought)
    linears = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    hidden = torch.empty(2, 1024, 4096, device="meta", requires_grad=True)
    turn = torch.empty(1, 1024, 128), torch.empty(1, 1024, 128)
    found = Collector(linears, outputs=False, place=place)
    with Wide(), held.use(brought):
        out = block(hidden, position_embeddings=place.kept(turn))
    out = out[0] if isinstance(out, tuple) else out
    assert (out.shape, out.device.type, out.dtype) == ((2, 1024, 4096), "meta", torch.float32)
    assert all(p.dtype == torch.bfloat16 for p, _ in brought)  # as before
    sums = sum(4 * total.numel() for total in found.sums.second.values())
    assert sums == 4 * (3 * 4096**2 + 14336**2)
    found._open.close()
    place.close()


def test_what_a_device_needs_is_counted_without_one():
    found = device_pack.need(256, 512, 16)
    weights = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512  # of query and output, key and value, feed-forward
    assert found.weights == 2 * weights + 4 * 2 * 256
    assert found.sums == 4 * (6 * 256**2 + 512**2)
    scores = 4 * 2 * 16 * 1024**2  # of attention, which has no fused kernel there
    assert 2 * found.weights + found.sums < found.block < 4 * scores
    assert 16 * 512**2 <= found.factor <= 16 * 512**2 + 8 * 1024


def test_the_next_is_read_while_one_is_used():
    log, place = [], place_of(AWAY)
    for i in place.ahead(lambda i: log.append(f"read {i}") or i, [0, 1, 2]):
        place._thread.submit(lambda: None).result()
        log.append(f"use {i}")
    assert log == ["read 0", "read 1", "use 0", "read 2", "use 1", "use 2"]
    assert place.soon(lambda: 7).result() == 7
    x = torch.ones(2)
    assert place.kept({"a": (x, 3)})["a"][0] is place.kept(x)
    place.close()
    assert Place().soon(lambda: 7) is None


def test_of_experts_one_is_in_float32_at_a_time():
    torch.manual_seed(0)
    block = mixtral().to(torch.bfloat16).model.layers[0]
    brought = {id(p): x for p, x in Held(Place()).brought([block])}
    moe = block.mlp
    kept = (moe.experts.gate_up_proj, moe.experts.down_proj, block.self_attn.q_proj.weight)
    assert all(brought[id(p)].data_ptr() == p.data_ptr() for p in kept)
    assert brought[id(block.input_layernorm.weight)].dtype == torch.float32
    largest = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if getattr(out, "dtype", None) == torch.float32:
                largest.append(out.numel())
            return out

    wide = torch.randn(3, 32)
    with Watch(), Wide(), Held(Place()).use(Held(Place()).brought([moe])), torch.no_grad():
        for w in moe.experts.gate_up_proj:
            torch.nn.functional.linear(wide, w)
    assert max(largest) <= 96 * 32 < moe.experts.gate_up_proj.numel()


class NoFloat64(TorchDispatchMode):
    """What mps says: "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} of a device that has no float64")
        return out


@pytest.mark.parametrize("make", [llama, opt, mixtral])
@pytest.mark.parametrize("fisher", [True, False])
def test_a_calibration_knows_no_float64(tmp_path, make, fisher):
    folder = saved(make(), tmp_path)
    with NoFloat64():
        found = calibrate(folder, IDS, tokens=96, context=48, fisher=fisher, device=AWAY)
    assert all(np.isfinite(layer.second).all() for layer in found.values())


def test_nor_do_factors_and_feedback_of_mps(monkeypatch):
    with NoFloat64():
        with pytest.raises(TypeError, match="float64"):  # the test itself: a device with float64 uses it
            triangular_on(second(), 0.03, AWAY)
        there = triangular_on(second(), 0.03, "mps")
        errors = Errors(there.feed, 8, AWAY)
        errors.put(100, 200, np.ones((100, 8), np.float32))
        assert errors.fed(0, 100).dtype == np.float32
    here = triangular(second(), 0.03)
    assert there.device == "mps"
    assert np.array_equal(there.weight, here.weight)
    assert np.array_equal(there.feed, here.feed)


def test_what_has_float64_is_brought_in_float32():
    place = Device(AWAY)
    assert place.to(torch.ones(2, dtype=torch.float64)).dtype == torch.float32
    assert place.wide(torch.nn.Parameter(torch.ones(2, dtype=torch.float64))).dtype == torch.float32
    assert place.to(torch.ones(2, dtype=torch.int64)).dtype == torch.int64
    place.close()


@pytest.mark.parametrize("step", ["_forward", "_backward", "_end"])
def test_where_memory_is_short_the_next_block_waits(tmp_path, monkeypatch, step):
    folder = saved(llama(), tmp_path)
    how = {"tokens": 96, "context": 48, "device": AWAY}
    expected, run, tries = calibrate(folder, IDS, **how), getattr(passes.Passes, step), []

    def short(self, i):
        tries.append(self._ahead)
        if self._ahead:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")
        run(self, i)

    monkeypatch.setattr(passes.Passes, step, short)
    found = calibrate(folder, IDS, **how)
    assert tries[:2] == [True, False]
    assert not any(tries[1:])
    for name, layer in expected.items():
        assert np.array_equal(found[name].second, layer.second)


@pytest.mark.parametrize("what", ["run", "end"])
def test_a_block_that_does_not_fit_is_one_line(tmp_path, monkeypatch, what):
    folder, said = saved(llama(), tmp_path), []

    def short(*_):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.01 GB)\nmore lines")

    monkeypatch.setattr(passes.Chain, what, short)
    with pytest.raises(LimitError) as e:
        calibrate(folder, IDS, tokens=96, context=48, note=lambda *a: said.append(a[0]), device=AWAY)
    assert "do not fit in the memory of cpu:0: MPS backend out of memory" in str(e.value)
    assert ("MB of weights" in str(e.value)) == (what == "run")
    assert "\n" not in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert not any("as a whole" in one for one in said)  # not the slow way without a word


def test_a_factor_that_does_not_fit_is_one_line(monkeypatch):
    def short(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", short)
    with pytest.raises(LimitError, match=r"the factor of 200 inputs, 0.0 GB: fewer --jobs, or --device cpu \(CUDA"):
        triangular_on(second(), 0.03, AWAY)
    monkeypatch.setattr(torch, "zeros", short)
    with pytest.raises(LimitError, match="errors of 8 x 64"):
        Errors(np.zeros((64, 64), np.float32), 8, AWAY)


def test_a_factor_of_a_device():
    s = second()
    here, there = triangular(s, 0.03), triangular_on(s, 0.03, AWAY)
    assert np.array_equal(here.order, there.order)
    assert np.allclose(here.weight, there.weight, rtol=1e-9)
    assert np.allclose(here.feed, there.feed, atol=1e-5)
    assert not np.tril(there.feed).any()
    with pytest.raises(np.linalg.LinAlgError, match="positive definite"):
        triangular_on(-s, 0.0, AWAY)
    kept = Factors(AWAY)
    kept.get("a", lambda: triangular_on(second(300), 0.03, AWAY))
    for one in (kept, pickle.loads(pickle.dumps(kept))):
        assert one.get("a", lambda: None).device == AWAY


def test_shapes_and_memory_of_a_factor():
    s = torch.empty(28672, 28672, dtype=torch.float64, device="meta")
    feeds = feeds_of(factor_of(s, 0.1))
    assert (feeds.shape, feeds.dtype) == ((28672, 28672), torch.float32)
    errors = Errors(np.zeros((64, 64), np.float32), 8, "cpu")
    errors.feed = torch.empty(28672, 28672, device="meta")
    errors.errors = torch.empty(28672, 8192, device="meta")
    assert errors.product(64, 128).shape == (64, 8192)


@pytest.mark.parametrize("rows", [40, 200])
def test_feedback_on_a_device_is_as_good(rows):
    w = np.random.default_rng(1).standard_normal((rows, 200)).astype(np.float32)
    s, scales = second(), Scales(np.zeros(rows, np.int8), np.zeros(200, np.int8))
    lost = []
    for r in (triangular(s), triangular_on(s, 0.01, AWAY), None):
        q = quantise(w, "F32", -1.0, scales, Effort(16), r)
        e = q.dense.view(np.float32) - w
        lost.append(float(((e @ s) * e).sum()))
    assert lost[1] == pytest.approx(lost[0], rel=0.02)
    assert lost[1] < 0.8 * lost[2]


@pytest.fixture
def away(monkeypatch):
    monkeypatch.setattr(options, "DEVICES", (*options.DEVICES, AWAY))
    monkeypatch.setattr(budget, "check", lambda device: None)


def test_a_pack_says_which_device_has_made_it(tmp_path, away):
    w = np.random.default_rng(0).standard_normal((256, 300)).astype(np.float32)
    save_file({"a.weight": w}, tmp_path / "m.safetensors")
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(300, 256, bias=False)})
    model["a"].weight.data = torch.from_numpy(w)
    rac.calibrate(model, [torch.randn(64, 300)], forward=lambda m, x: m["a"](x)).save(tmp_path / "c.calibration")
    snr = []
    for i, device in enumerate(("cpu", AWAY)):
        how = {"bits": 3, "calibration": str(tmp_path / "c.calibration"), "device": device, "effort": "fast"}
        snr.append(rac.pack(tmp_path / "m.safetensors", tmp_path / f"{i}.rac", **how).fidelity[0].snr)
        archive = Archive(FileAccess(tmp_path / f"{i}.rac"))
        assert archive.header["provenance"].get("device") == (None if device == "cpu" else device)
        archive.close()
    assert snr[1] == pytest.approx(snr[0], abs=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    save_file({"a.weight": np.ones((256, 300), np.float32)}, tmp_path / "m.safetensors")
    check("cpu")
    with pytest.raises(MissingDependencyError, match="sees no device 'cuda'"):
        check("cuda")
    (tmp_path / "t.txt").write_text("text")
    given = ["pack", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "m.rac"), "--device", "cuda"]
    assert main([*given, "--bits", "3", "--calibrate", str(tmp_path / "t.txt")]) != 0
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert main([*given, "--bits", "3", "--calibrate", "none"]) != 0
    assert "give --calibrate too" in capsys.readouterr().err
    with pytest.raises(ValueError, match="device"):
        rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac", device="cuda")
    with pytest.raises(ValueError, match="device must be one of"):
        rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac", bits=3, device="tpu")
    assert not (tmp_path / "m.rac").exists()
