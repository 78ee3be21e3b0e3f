"""Second moments of experts that are many: leading directions and a diagonal in place of all of them."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import rac
from rac.calibrate import experts, moments
from rac.calibrate.file import load
from rac.calibrate.layers import Layer, Low, calibrate, joined
from rac.calibrate.leading import RANK, Leading
from rac.calibrate.place import Device
from rac.errors import SourceError

IDS = np.random.default_rng(0).integers(3, 90, 330)


def inputs(tokens, n=96, seed=0):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((tokens, n)).astype(np.float32))
    return x * torch.logspace(0.5, -1.5, n)


def dense(leading):
    part = leading.array
    return part[:-1].T @ part[:-1] + np.diag(part[-1])


def close(a, b, part=1e-5):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=part * float(np.abs(b).max()))


@pytest.mark.parametrize("tokens", [0, 1, RANK, 2 * RANK])
def test_few_tokens_are_held_as_they_are(tokens):
    x = inputs(tokens)
    found = Leading.of(x)
    assert np.array_equal(found.array[:-1], x.numpy())
    assert not found.array[-1].any()


def test_of_many_the_leading_directions_and_the_diagonal_stay():
    x = inputs(1000)
    found, second = Leading.of(x), (x.T @ x).numpy()
    assert found.rows.shape[0] <= 2 * RANK
    assert found.least().rows.shape[0] <= RANK
    for one in (found, found.least()):
        close(np.diag(dense(one)), np.diag(second))
        assert np.linalg.norm(dense(one) - second) < 0.02 * np.linalg.norm(second)
    best = np.linalg.eigvalsh(second)[-8:]
    close(np.linalg.eigvalsh(dense(found.least()))[-8:], best, 1e-2)
    again = Leading.of(x)
    assert np.array_equal(again.array, found.array)


def test_sums_go_through_files_and_orders():
    parts = [Leading.of(inputs(150, seed=seed)) for seed in range(3)]
    total = parts[0].plus(parts[1]).plus(parts[2])
    stored = [Leading.from_array(one.array) for one in parts]
    assert np.array_equal(stored[0].plus(stored[1]).plus(stored[2]).array, total.array)
    close(dense(parts[2].plus(parts[1]).plus(parts[0])), dense(total), 0.02)


def test_what_is_not_finite_shows():
    x = inputs(300)
    x[200, 3] = torch.inf
    assert not np.isfinite(Leading.of(x).array).all()


def test_a_low_second_moment_is_what_it_says():
    part, shared = np.ones((3, 5), np.float32), np.full((5, 5), 2, np.float32)
    assert np.array_equal(Low(part)(), np.full((5, 5), 2) + np.eye(5))
    assert np.array_equal(Low(part, shared, 0.5)(), np.full((5, 5), 3) + np.eye(5))
    twice = Low(part, shared, 0.5).times(2, 2 * shared)
    close(twice(), 2 * Low(part, shared, 0.5)())
    assert Layer(twice, None).inputs == 5
    assert Layer(twice, None).key == ""
    with pytest.raises(SourceError, match="4 inputs for 5"):
        Low(part, shared[:4, :4], 0.5)()


@pytest.mark.parametrize("dense_ones", [True, False])
def test_experts_go_towards_all_where_these_have_something_in_common(dense_ones):
    """Tokens of a common space are alike; neurons of an expert's own are not, and its diagonal is all that is known."""
    rng, n, rows = np.random.default_rng(0), 48, 40
    mix = rng.standard_normal((n, n)).astype(np.float32) * np.geomspace(3, 0.1, n, dtype=np.float32)[:, None]
    for apart in (False, True):
        order = [rng.permutation(n) if apart else np.arange(n) for _ in range(6)]
        x = [torch.from_numpy((rng.standard_normal((rows, n)).astype(np.float32) @ mix)[:, at]) for at in order]
        sums = {f"w[{e}]": (one.T @ one).numpy() if dense_ones else Leading.of(one) for e, one in enumerate(x)}
        weights = dict.fromkeys(sums, float(rows))
        if not dense_ones:
            sums["w"], weights["w"] = sum((one.T @ one).numpy() for one in x), 6.0 * rows
        assert (experts.alike([sums[f"w[{e}]"] for e in range(6)]) > experts.ALIKE) == (not apart)
        found = {name: s for name, s, _ in experts.settled("w", [rows] * 6, sums, weights, {})}
        second = found["w[2]"] if dense_ones else found["w[2]"]()
        own, mean = (x[2].T @ x[2]).numpy(), sum((one.T @ one).numpy() for one in x) / 6
        other = np.diag(np.diag(own)) if apart else mean
        close(second, (own * rows + other * n) / (rows + n), 1e-4)
        close(found["w[]"], mean, 1e-4)


def test_an_expert_without_tokens_has_the_mean_of_all():
    x = inputs(80, 32)
    sums = {"w": (x.T @ x).numpy(), "w[0]": Leading.of(x), "w[1]": Leading.of(x)}
    weights = {"w": 80.0, "w[0]": 40.0, "w[1]": 40.0}
    found = {name: s for name, s, _ in experts.settled("w", [40, 40, 0], sums, weights, {})}
    close(found["w[2]"]() * 80, (x.T @ x).numpy())


def mixtral(folder):
    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
    many = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**small, **many)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("fisher", [True, False])
def test_large_experts_are_nearly_what_small_ones_are(tmp_path, monkeypatch, fisher, device):
    """32 and 48 inputs have no more directions than are kept, so that nothing is lost but bits."""
    folder = mixtral(tmp_path)
    how = {"tokens": 320, "context": 64, "fisher": fisher, "device": device}
    own = calibrate(folder, IDS, **how)
    monkeypatch.setattr(moments, "OWN", 0)
    less = calibrate(folder, IDS, **how, cache=tmp_path / "cache")
    assert own.keys() == less.keys()
    low = [name for name, layer in less.items() if isinstance(layer.moment, Low)]
    assert len(low) == 2 * 4 * 3
    for name, layer in own.items():
        close(less[name].second, layer.second, 1e-3)
        assert less[name].inputs == layer.inputs
    keys = [less[name].key for name in low]
    assert all(keys)
    assert len(set(keys)) == 2 * 4 * 2  # gate and up have one input
    again = calibrate(folder, IDS, **how, cache=tmp_path / "cache")
    carried = pickle.loads(pickle.dumps(again[low[0]]))
    assert np.array_equal(carried.second, less[low[0]].second)
    assert carried.key == less[low[0]].key
    mean = joined([less, less])[low[0]]
    close(mean.second, less[low[0]].second)
    less.save(tmp_path / "a.calibration")
    there = load(tmp_path / "a.calibration")
    assert all(np.array_equal(there[name].second, less[name].second) for name in low)
    assert isinstance(there[low[0]].moment, Low)


def test_second_moments_of_experts_take_what_their_directions_take(tmp_path, monkeypatch):
    """Of 4 experts of 256 inputs: RANK + 1 numbers for each input and expert, and once the second moment of all."""
    monkeypatch.setattr(moments, "OWN", 0)
    x = [inputs(500, 256, seed=e) for e in range(4)]
    sums = moments.Sums(fused={"m.w": 4}, turned={"m.w": False})
    sums.second = {f"m.w[{e}]": Leading.of(one) for e, one in enumerate(x)}
    sums.second["m.w"] = sum((one.T @ one).numpy() for one in x)
    sums.rows = {f"m.w[{e}]": 500 for e in range(4)} | {"m.w": 2000}
    folder = moments.Folder(tmp_path, "a")
    folder.state["layers"] = {}
    sums.save(folder, "0", 2000, outputs=False)
    sizes = [p.stat().st_size for p in folder.path.glob("second-*")]
    assert len(sizes) == 5
    assert sum(sizes) <= 4 * 256**2 + 4 * 4 * 256 * (RANK + 1) + 5 * 128


class Mixed(nn.Module):
    """Experts of one parameter, each of which sees some of the tokens."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 96, 64, generator=generator) / 5)

    def forward(self, x):
        return torch.stack([nn.functional.linear(x[e::3], self.experts[e]) for e in range(3)])


@pytest.mark.parametrize("loss", [None, "energy"])
def test_experts_of_any_module(tmp_path, monkeypatch, loss):
    batches = [inputs(90, 64, seed=seed) for seed in range(2)]
    how = {"forward": lambda m, x: m(x), "loss": None if loss is None else lambda out, _: out.square().sum()}
    own = rac.calibrate(Mixed(), batches, **how)["experts"]
    monkeypatch.setattr(moments, "OWN", 0)
    found = rac.calibrate(Mixed(), batches, **how)
    less = found["experts"]
    close(less.second, own.second, 1e-3)
    for a, b in zip(less.experts, own.experts, strict=True):
        assert isinstance(a.moment, Low)
        close(a.second, b.second, 1e-3)
    found.save(tmp_path / "a.calibration")
    there = load(tmp_path / "a.calibration")["experts"]
    assert all(np.array_equal(a.second, b.second) for a, b in zip(there.experts, less.experts, strict=True))


def test_a_damaged_file_of_them_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "OWN", 0)
    path = tmp_path / "a.calibration"
    rac.calibrate(Mixed(), [inputs(90, 64)], forward=lambda m, x: m(x), loss=None).save(path)
    low = load(path)["experts"].experts[0].moment
    data = bytearray(path.read_bytes())
    data[low.part.offset + low.part.size - 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="damaged calibration"):
        _ = load(path)["experts"].experts[0].second


def test_on_a_device_they_come_back():
    place = Device("cpu:0")
    found = Leading.of(place.to(inputs(300)))
    assert math.isclose(float(found.array.sum()), float(Leading.of(inputs(300)).array.sum()), rel_tol=1e-4)
    place.close()
