"""A scale found on some rows: what these stand for, one full pass, the budget met all the same, and what is not cut."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rac.calibrate.layers import Layer
from rac.encode import ties, workers
from rac.encode.align import recipe as rcp
from rac.encode.allocate import few as sampling
from rac.encode.allocate.budget import TOLERANCE, Search
from rac.encode.options import Budget
from rac.encode.pack import pack_source
from rac.encode.quantise.tensor import encode, size_of
from rac.encode.sources import from_arrays


def arrays(seed=0, rows=2560, cols=192):
    """Rows of very different sizes, in no order, as those of real layers are."""
    rng = np.random.default_rng(seed)
    made = {}
    for i, name in enumerate(("a.weight", "b.weight")):
        w = rng.standard_normal((rows, cols)) * np.exp(rng.standard_normal((rows, 1)))
        made[name] = (w * 10.0**-i * np.exp(rng.standard_normal(cols) / 3)).astype(np.float32)
    return made


def known(cols=192):
    x = np.random.default_rng(9).standard_normal((300, cols)).astype(np.float32) * np.geomspace(1, 9, cols)
    return Layer((x.T @ x).astype(np.float32), None)


def recipes(made):
    groups = ties.find(from_arrays(made).tensors)
    layers = {name: known() for name in made}
    return groups, [rcp.data_free(groups, (), "fast"), rcp.calibrated(groups, layers, (), "fast")]


@pytest.fixture
def sampled(monkeypatch):
    monkeypatch.setattr(sampling, "LEAST", 0)


@pytest.mark.parametrize("scale", [-2.0, -1.0])
def test_rows_stand_for_their_tensor(sampled, scale):
    groups, every = recipes(arrays())
    for recipe in every:
        some, whole = sampling.few(groups, recipe), replace(recipe, scale=scale)
        for g, part in zip(groups, some.groups, strict=True):
            e, full = encode(part, replace(some.recipe, scale=scale), False), encode(g, whole, False)
            assert part.tensor.shape == (128, 192)
            found = some.bytes_of(e, size_of(e, some.recipe))
            assert found == pytest.approx(
                size_of(full, recipe), rel=0.04
            )  # tiles of few numbers: the larger, the nearer


def test_rows_are_those_of_the_tensor(sampled):
    made = arrays()
    groups, (recipe, _) = recipes(made)
    part = pickle.loads(pickle.dumps(sampling.few(groups, recipe).groups[1].tensor))
    w = made["b.weight"][part.data.numbers]
    assert part.read(0, part.nbytes).tobytes() == w.tobytes()
    for a, b in ((0, 0), (1, 5), (768, 1536), (767, 1537), (5000, 5000)):
        assert part.read(a, b).tobytes() == w.tobytes()[a:b]
    assert (np.diff(part.data.numbers) > 0).all()


@pytest.mark.parametrize(("bits", "which"), [(2.0, 0), (3.0, 1)])
def test_few_full_passes_meet_the_budget(sampled, tmp_path, bits, which):
    made = arrays(1)
    groups, every = recipes(made)
    with workers.start(2) as pool:
        search = Search(groups, every[which], pool)
        recipe = search.meet(Budget(bits=bits))
    done = pack_source(from_arrays(made), tmp_path / "m.rac", recipe=recipe)
    assert bits * (1 - TOLERANCE) <= done.quantised_bits <= bits
    assert search.tried <= 3  # of large tensors one


@pytest.mark.parametrize("wrong", [0.9, 1e9])
def test_a_sample_that_misleads_costs_passes_and_no_more(sampled, monkeypatch, wrong):
    """The budget is met by what all weights take, whatever a sample has said."""
    groups, (recipe, _) = recipes(arrays(2, 640))
    real = sampling.Few.bytes_of
    monkeypatch.setattr(sampling.Few, "bytes_of", lambda self, e, size: wrong * real(self, e, size))
    with workers.start(1) as pool:
        search = Search(groups, recipe, pool)
        scale = search.meet(Budget(bits=3.0)).scale
    size = sum(size_of(encode(g, replace(recipe, scale=scale), False), recipe) for g in groups)
    assert 3 * (1 - TOLERANCE) <= 8 * size / sum(np.prod(g.tensor.shape) for g in groups) <= 3
    assert search.tried <= 6


def test_what_needs_all_its_rows_keeps_them(sampled):
    groups, (plain, calibrated) = recipes(arrays())
    a = calibrated.aligned["a.weight"]
    turned = replace(a, layer=replace(a.layer, transposed=True))
    experts = replace(a, layer=replace(a.layer, experts=(known(), known())))
    for other in (turned, experts, replace(a, rank=2), replace(a, few=None)):
        some = sampling.few(groups, replace(calibrated, aligned=dict(calibrated.aligned) | {"a.weight": other}))
        assert some.groups[0] is groups[0]
        assert some.groups[1] is not groups[1]
        e = encode(groups[1], replace(plain, scale=-1.0), False)
        assert replace(some, times={e.name: 1.0}).bytes_of(e, 777) == 777


def test_few_weights_are_no_sample():
    groups, (recipe, _) = recipes(arrays())
    assert sampling.few(groups, recipe) is None
