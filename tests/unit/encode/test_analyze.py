"""Measures against closed forms, bases that keep the product, bits at equal error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rac.errors import SourceError
from rac.linalg import hadamard
from rac.methods import rotations
from rac.study.analyze import bases as bs
from rac.study.analyze import bits as bt
from rac.study.analyze import measures as ms
from rac.study.analyze import svg
from rac.study.analyze.bases import read_rotations

pytest.importorskip("safetensors.numpy")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def moment(n, seed, samples=4):
    """Inputs that are strongly correlated; `samples` n of them."""
    x = normal(seed, samples * n, n) @ (normal(99, n, n) * np.geomspace(1, 30, n).astype(np.float32))
    return (x.T @ x / len(x)).astype(np.float32)


def rotation(n, seed):
    return np.linalg.qr(normal(seed, n, n))[0].astype(np.float32)


# measures


def test_kurtosis():
    w = normal(0, 400, 500)
    assert ms.kurtosis(w) == pytest.approx(3, abs=0.03)
    assert ms.kurtosis(5 * w + 7) == pytest.approx(ms.kurtosis(w), rel=1e-4)
    assert ms.kurtosis(np.array([-1.0, 1.0] * 50)) == 1
    uniform = np.random.default_rng(1).random((300, 300))
    assert ms.kurtosis(uniform) == pytest.approx(1.8, abs=0.02)
    assert math.isnan(ms.kurtosis(np.ones(9)))
    # rows of different size look like outliers of the whole, not of a row
    scaled = w * np.geomspace(0.1, 10, 400, dtype=np.float32)[:, None]
    assert ms.kurtosis(scaled) > 6
    assert ms.row_kurtosis(scaled) == pytest.approx(3 * 499 / 501, abs=0.03)
    assert ms.row_kurtosis(np.vstack([scaled, np.zeros(500, np.float32)])) == pytest.approx(ms.row_kurtosis(scaled))


def test_outliers():
    x = np.ones((10, 10), np.float32)
    assert ms.outlier_ratio(x) == 1
    x[:] = 0
    x[3, 4] = -7
    assert ms.outlier_ratio(x) == pytest.approx(10)


def test_ranks():
    for n in (1, 5, 40):
        values = ms.singular_values(np.eye(n))
        assert ms.effective_rank(values) == pytest.approx(n)
        assert ms.stable_rank(values) == pytest.approx(n)
    one = np.outer(np.arange(1, 9), np.arange(1, 30)).astype(np.float64)
    assert ms.effective_rank(ms.singular_values(one)) == pytest.approx(1, abs=1e-3)
    assert ms.stable_rank(ms.singular_values(one)) == pytest.approx(1)
    p = np.array([0.5, 0.25, 0.25])
    assert ms.effective_rank(p) == pytest.approx(2**1.5)
    assert ms.stable_rank(p) == pytest.approx(1.5)
    w = normal(1, 30, 70)
    want = np.linalg.svd(w, compute_uv=False)
    assert np.allclose(ms.singular_values(w), want, rtol=1e-4) and np.allclose(ms.singular_values(w.T), want, rtol=1e-4)


def test_energies():
    w = np.array([[3.0, 0, 1, 0], [4, 0, 0, 2]])
    assert ms.energies(w).tolist() == [25, 0, 1, 4]
    assert ms.gini(np.ones(7)) == 0
    assert ms.gini(np.eye(8)[0]) == pytest.approx(7 / 8)
    assert ms.gini(np.array([1.0, 2, 3, 4])) == pytest.approx(0.25)
    even, peak = ms.curve(np.ones(64)), ms.curve(np.eye(64)[5])
    assert np.allclose(even, np.linspace(0, 1, ms.CURVE + 1)) and np.allclose(peak, [0] + [1] * ms.CURVE)
    assert ms.top_share(np.arange(1.0, 11), 0.1) == pytest.approx(10 / 55)
    assert ms.top_share(np.arange(1.0, 11), 0.001) == pytest.approx(10 / 55)
    assert math.isnan(ms.gini(np.zeros(3))) and math.isnan(ms.top_share(np.zeros(3), 0.1))


def test_entropy_of_known_distributions():
    rng = np.random.default_rng(0)
    n = 200_000
    laws = {
        "normal": (rng.standard_normal(n), ms.GAUSSIAN),
        "uniform": (rng.random(n) - 0.5, math.log2(math.sqrt(12))),
        "laplace": (rng.laplace(size=n), math.log2(2 * math.e) - 0.5),
    }
    for name, (x, bits) in laws.items():
        assert ms.entropy(x[None])[0] == pytest.approx(bits, abs=0.02), name
        assert ms.entropy(1000 * x[None])[0] == pytest.approx(bits, abs=0.02)
    short = ms.entropy(rng.standard_normal((400, 192)))
    assert short.mean() == pytest.approx(ms.GAUSSIAN, abs=0.05)  # the correction of few samples
    assert np.isfinite(ms.entropy(np.round(rng.standard_normal((1, 5000)), 1))).all()  # ties
    assert np.isnan(ms.entropy(np.zeros((2, 50)))).all()


def test_histogram():
    counts = ms.histogram(normal(0, 100, 100))
    assert counts.sum() == 10_000 and len(counts) == len(ms.EDGES) - 1
    assert counts[:32].sum() == pytest.approx(5000, abs=200)
    x = np.zeros(1000)
    x[0] = 1
    assert ms.histogram(x)[-1] == 1  # beyond the last edge


# bases


@pytest.mark.parametrize("gain", [None, "some"])
def test_bases_keep_the_product_and_the_output(gain):
    """W x = V (T x): |W x|^2 over the inputs is the same in every basis, and so is what an error costs."""
    w, s = normal(0, 40, 48), moment(48, 1)
    g = np.linspace(0.2, 3, 48) if gain else None
    learned = bs.Rotations("mine", rotation(48, 5), {"3": rotation(16, 6)})
    for place in ({"reads": True}, {"values": True, "layer": "3"}, {}):
        made = bs.bases(bs.Matrix(w, bs.Inputs(48, s, s, g, 0.01), **place), [learned])
        assert [b.id for b in made] == [*list(bs.NAMES)[:3], "mine", *list(bs.NAMES)[3:]]
        want = float(np.einsum("ij,jk,ik->", w, s.astype(np.float64), w))
        for b in made:
            assert b.output(b.matrix) == pytest.approx(want, rel=1e-3), b.id
    if gain is None:
        for b in made[:4]:
            assert np.linalg.norm(b.matrix) == pytest.approx(np.linalg.norm(w), rel=1e-5)
            values = ms.singular_values(b.matrix)
            assert ms.effective_rank(values) == pytest.approx(ms.effective_rank(ms.singular_values(w)), rel=1e-5)


def test_hadamard_undone_is_the_weight():
    w = normal(0, 20, 48)
    (_, one, both, *_) = bs.bases(bs.Matrix(w, bs.Inputs(48, None, None, None, 0.01)))
    h = hadamard.matrix(48) * hadamard.signs(bs.SEED, 48)
    assert np.allclose(one.matrix @ h, w, atol=1e-5)
    rows = hadamard.matrix(20) * hadamard.signs(bs.SEED + 1, 20)
    assert np.allclose(rows.T @ both.matrix @ h, w, atol=1e-5)


def test_pca_is_diagonal_and_whitened():
    w, s = normal(0, 40, 48), moment(48, 1)
    made = {b.id: b for b in bs.bases(bs.Matrix(w, bs.Inputs(48, s, s, None, 0.0)))}
    p = made["pca"]
    off = p.second - np.diag(np.diag(p.second))
    assert np.abs(off).max() < 1e-4 * np.diag(p.second).max()
    assert np.allclose(np.diag(p.second), p.weight**2, rtol=1e-2, atol=1e-4 * p.weight.max() ** 2)
    want = np.linalg.svd(w @ np.linalg.cholesky(s.astype(np.float64)), compute_uv=False)
    assert np.allclose(ms.singular_values(p.whitened), want, rtol=1e-2, atol=1e-3 * want[0])
    assert p.entries == 48**2 and made["triangular"].entries == 0
    # steps of both come to the same volume: det L = det S^1/2
    assert np.log(p.weight).sum() == pytest.approx(np.log(made["triangular"].weight).sum(), rel=1e-4)


def test_without_inputs_there_is_nothing_to_follow():
    made = bs.bases(bs.Matrix(normal(0, 20, 32), bs.Inputs(32, None, None, None, 0.01)))
    assert [b.id for b in made] == ["original", "hadamard", "hadamard2"]
    assert made[1].second.shape == (32,) and made[1].cost == 1


def test_a_gain_near_0_is_not_fused():
    gain = np.ones(32)
    gain[3] = 0
    assert bs.Inputs(32, None, None, gain, 0.01).gain is None


def test_rotations_are_read(tmp_path):
    r2 = np.stack([rotation(4, 1), rotation(4, 2)])
    rotations.save(rotations.Rotations(rotation(8, 0), r2), tmp_path / "r.safetensors")
    r = read_rotations(str(tmp_path / "r.safetensors"), "x")
    assert r.name == "x" and r.r1.shape == (8, 8) and list(r.r2) == ["0", "1"]
    np.testing.assert_allclose(r.r2["1"], r2[1], atol=1e-6)
    wrong = bs.Rotations("x", rotation(8, 0), {})
    with pytest.raises(SourceError, match="R1 of rotation 'x' is of 8 inputs"):
        bs.bases(bs.Matrix(normal(0, 20, 32), bs.Inputs(32, None, None, None, 0.01), reads=True), [wrong])


# bits


def test_bits_at_equal_error_are_what_theory_says():
    """Gaussian weights: feedback and PCA gain log2 of arithmetic over geometric mean, a rotation gains nothing."""
    n = 128
    u, energy = rotation(n, 1), np.geomspace(1, 300, n)
    w, s = normal(0, 512, n), ((u * energy) @ u.T).astype(np.float32)
    made = {b.id: b for b in bs.bases(bs.Matrix(w, bs.Inputs(n, s, s, None, 1e-6)))}
    first = made["original"]
    ref = bt.reference(first, 5.0)  # at low rate weak directions get no bits, and the gain is less
    found = {key: bt.equal(b, ref, first) for key, b in made.items()}
    assert all(abs(f.off) <= bt.NEAR for f in found.values())
    own = ref.bits
    assert own == pytest.approx(5, abs=0.15)
    assert found["hadamard"].bits == pytest.approx(own, abs=0.03)
    gain = 0.5 * (math.log2(energy.mean()) - np.log2(energy).mean())
    assert gain > 0.8
    for key in ("pca", "triangular"):
        assert own - found[key].bits == pytest.approx(gain, abs=0.1), key
    assert found["triangular"].bits < found["hadamard-feedback"].bits < own


def test_bits_follow_the_error():
    """The correction of what is left of a difference, half a log2, is what another step really takes."""
    (b,) = bs.bases(bs.Matrix(normal(0, 512, 64), bs.Inputs(64, None, None, None, 0.01)))[:1]
    one, two = bt.reference(b, 4.0), bt.reference(b, 5.0)
    assert 0.5 * math.log2(one.error / two.error) == pytest.approx(two.bits - one.bits, abs=0.02)


# plots


def test_ticks_are_round_and_inside():
    assert svg.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert svg.ticks(2.31, 4.02) == [2.5, 3, 3.5, 4]
    assert svg.ticks(5, 5) == [5]


def test_lines_leave_gaps_and_escape():
    out = svg.lines([("b0", [(0, 1.0), (1, None), (2, 3.0)])], svg.Axes("a<b", "y"))
    path = out.split('class="line b0" d="')[1].split('"')[0]
    assert path.count("M") == 2 and "L" not in path and "a&lt;b" in out
    assert svg.lines([("b0", [(0, None)])], svg.Axes("x", "y")) == "<p>Nothing to plot.</p>"
    assert svg.lines([("b0", [(0, 5.0)])], svg.Axes("x", "y")).count("nan") == 0
