"""Memory of the encoder for each number of a second moment and each weight, and that pieces change no bit."""

from __future__ import annotations

import numpy as np
import pytest

from rac.calibrate.layers import Layer
from rac.encode.quantise import tensor, trellis
from rac.encode.quantise.trellis import Effort, Scales, quantise
from rac.linalg.triangular import blocks, damped, triangular
from rac.native.product import cholesky
from support.memory import peak


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def second(n, tokens):
    x = normal(n, tokens, n) * np.geomspace(1, 9, n, dtype=np.float32)
    return x.T @ x / np.float32(tokens)


def test_a_factor_takes_nine_bytes_for_each_number_and_half_of_it_when_it_is_done():
    s = second(1400, 200)
    assert peak(lambda: triangular(s)) <= 9 * s.size
    found = triangular(s)
    assert found.feed.base.nbytes <= 4 * s.size + 8


@pytest.mark.parametrize("n", [1, 2, 63, 65, 200])
def test_in_place_it_has_the_bits_of_the_definition(n, tmp_path):
    s = second(n, n // 2 + 1)
    order = np.argsort(np.diag(s.astype(np.float64)), kind="stable")
    lower = cholesky(damped(s, 0.03)[np.ix_(order, order)])
    feed = np.triu((lower / np.diag(lower)).T, 1).astype(np.float32)
    np.save(tmp_path / "s.npy", s)
    for given in (s, np.load(tmp_path / "s.npy", mmap_mode="r"), s.astype(np.float64)):
        found = triangular(given, 0.03)
        assert np.array_equal(found.order, order)
        assert np.array_equal(found.weight, np.diag(lower))
        assert np.array_equal(found.feed, feed)
    each = blocks([s, s], 0.03)
    assert np.array_equal(each.feed, [feed, feed])
    assert np.array_equal(each.weight, [np.diag(lower)] * 2)


def test_quantising_takes_eight_bytes_for_each_weight(monkeypatch):
    monkeypatch.setattr(trellis, "PIECE", 1 << 15)
    w, r = normal(0, 1600, 600), triangular(second(600, 900))
    few, scales = (Scales(np.zeros(n, np.int8), np.zeros(600, np.int8)) for n in (64, 1600))
    quantise(w[:64], "BF16", -1.0, few, Effort(4), r)  # finds what is found once in a process
    assert peak(lambda: quantise(w, "BF16", -1.0, scales, Effort(4), r)) <= 8 * w.size


@pytest.mark.parametrize(("states", "passes", "sparse"), [(32, 1, False), (16, 2, False), (1, 1, True), (1, 2, True)])
@pytest.mark.parametrize("fed", [False, True])
def test_pieces_change_nothing(monkeypatch, states, passes, sparse, fed):
    w = normal(1, 150, 90) * np.exp(normal(2, 90))
    w[normal(3, 150, 90) < 0] *= np.float32(not sparse)
    w[:, 7] *= 1e3  # outliers
    scales = Scales((np.arange(150) % 9).astype(np.int8), (np.arange(90) % 5).astype(np.int8))
    scales.cols[::11] = trellis.trellis_stage.DEAD
    r = triangular(second(90, 60)) if fed else None
    found = []
    for piece in (1 << 20, 1 << 10, 1):
        monkeypatch.setattr(trellis, "PIECE", piece)
        q = quantise(w, "BF16", -1.0, scales, Effort(states, passes, sparse=sparse), r)
        found.append((q.words.tobytes(), q.unit, q.outliers, q.dead))
    assert found == found[:1] * 3
    assert found[0][2]


@pytest.mark.parametrize("shape", [(40, 8), (70, 333), (5, 9000)])
def test_signal_to_noise_is_summed_as_the_whole(monkeypatch, shape):
    w, e = normal(4, *shape), normal(5, *shape) / 10
    s = second(shape[1], 50) if shape[1] < 400 else None
    layer = None if s is None else Layer(s, None)
    whole = tensor._ratio(w, w + e, layer)
    monkeypatch.setattr(tensor, "PIECE", 1)
    assert tensor._ratio(w, w + e, layer) == whole


def test_of_a_wide_matrix_some_outputs_are_measured(monkeypatch):
    w, e = normal(6, 900, 40), normal(7, 900, 40) / 10
    whole = tensor._ratio(w, w + e, layer := Layer(second(40, 90), None))
    monkeypatch.setattr(tensor, "PRODUCTS", 1 << 18)
    found = tensor._ratio(w, w + e, layer)
    assert found != whole
    assert found == pytest.approx(whole, abs=0.2)
    assert found == tensor._ratio(w[(at := np.arange(256) * 900 // 256)], (w + e)[at], layer)
