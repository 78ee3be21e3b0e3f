"""Round to nearest and GPTQ: against the paper's equations as they stand there, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from rac.errors import SourceError
from rac.methods.gptq import gptq, rtn
from rac.stages.groups import storable, values


def layer(rows=12, cols=70, seed=0, tokens=400):
    """(weights, Hessian) of inputs that hang together, with some large ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols)) @ rng.standard_normal((cols, cols)) * rng.lognormal(0, 1, cols)
    return rng.standard_normal((rows, cols)) * rng.lognormal(0, 0.3, (rows, 1)), 2 / tokens * x.T @ x


def proxy(w, stored, hessian):
    """tr(E H E^T) of E = w - stored (R, C): what GPTQ makes small, the squared error of the outputs."""
    e = w - stored
    return float(np.vdot(e @ hessian, e))


def plain_grid(part, bits, symmetric):
    """Scale and zero of one row of a group."""
    low, high = min(part.min(), 0), max(part.max(), 0)
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = float(storable((high - low) / (2**bits - 1)))
    return scale, 2 ** (bits - 1) if symmetric else min(max(round(-low / scale), 0), 2**bits - 1)


def plain_round(x, scale, zero, bits):
    return min(max(round(x / scale) + zero, 0), 2**bits - 1)


def plain_gptq(w, hessian, bits, group, symmetric=False, order=None, static=True):
    """Equations (2) and (3) of the paper, element by element: columns leave the inverse by Gaussian elimination."""
    w, (rows, cols) = w.astype(float).copy(), w.shape
    order = list(range(cols)) if order is None else list(order)
    inverse = np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(cols))
    codes, grid = np.zeros((rows, cols), int), {}
    if static:
        grid = {
            (r, g): plain_grid(w[r, g * group : (g + 1) * group], bits, symmetric)
            for r in range(rows)
            for g in range(-(-cols // group))
        }
    for at, q in enumerate(order):
        for r in range(rows):
            if not static and q % group == 0:
                grid[r, q // group] = plain_grid(w[r, q : q + group], bits, symmetric)
            scale, zero = grid[r, q // group]
            codes[r, q] = plain_round(w[r, q], scale, zero, bits)
            error = (w[r, q] - (codes[r, q] - zero) * scale) / inverse[q, q]
            for p in order[at:]:
                w[r, p] -= error * inverse[q, p]
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 70), (4, 16), (8, 7)])
def test_rtn_is_that_of_the_definition(bits, group, symmetric):
    w, _ = layer()
    found = rtn(w, bits, group, symmetric=symmetric)
    for r in range(len(w)):
        for at in range(0, w.shape[1], group):
            part = w[r, at : at + group]
            scale, zero = plain_grid(part, bits, symmetric)
            assert found.scales[r, at // group] == scale and found.zeros[r, at // group] == zero
            assert_array_equal(found.codes[r, at : at + group], [plain_round(x, scale, zero, bits) for x in part])


def test_rtn_is_off_by_half_a_step_at_most():
    w, _ = layer(40, 130)
    found = rtn(w, 5, 64)
    # a step more at the ends of the range, where the zero was rounded
    assert (np.abs(w - values(found)) <= 1.01 * np.repeat(found.scales, 64, 1)[:, :130]).all()
    assert np.mean(np.abs(w - values(found)) <= 0.501 * np.repeat(found.scales, 64, 1)[:, :130]) > 0.98
    assert found.codes.shape == (40, 130) and found.scales.shape == found.zeros.shape == (40, 3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_finds_the_least_error_of_its_grids(symmetric):
    w = np.random.default_rng(1).standard_t(3, (50, 128))
    plain, best = (rtn(w, 3, 64, symmetric=symmetric, search=s) for s in (False, True))

    def errors(g):
        return np.square(w - values(g)).reshape(50, 2, 64).sum(2)

    assert (errors(best) <= errors(plain)).all() and errors(best).sum() < 0.9 * errors(plain).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group", "block"), [(70, 128), (16, 8), (32, 128), (24, 17)])
@pytest.mark.parametrize("way", ["static", "dynamic", "order"])
def test_gptq_is_that_of_the_equations(symmetric, group, block, way):
    w, h = layer()
    order = np.argsort(-np.diag(h), kind="stable") if way == "order" else None
    want = plain_gptq(w, h, 3, group, symmetric, order, way != "dynamic")
    how = {"act_order": way == "order", "static_groups": way != "dynamic"}
    found = gptq(w, h, 3, group, symmetric=symmetric, block=block, **how)
    assert_array_equal(found.codes, want)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_makes_the_error_of_the_outputs_smaller(bits):
    for seed in range(3):
        w, h = layer(64, 200, seed, 1000)
        nearest, static, ordered = (
            proxy(w, values(g), h)
            for g in (rtn(w, bits, 64), gptq(w, h, bits, 64, act_order=False), gptq(w, h, bits, 64))
        )
        assert ordered < static < 0.7 * nearest


def test_without_correlations_gptq_is_rtn():
    w, _ = layer()
    h = np.diag(np.random.default_rng(0).uniform(1, 2, 70))
    for order in (False, True):
        a, b = gptq(w, h, 4, 16, act_order=order), rtn(w, 4, 16)
        assert_array_equal(a.codes, b.codes)
        assert_array_equal(a.scales, b.scales)


def test_the_unit_of_the_hessian_does_not_matter():
    w, h = layer()
    for scale in (2.0**-20, 2.0**30):
        assert_array_equal(gptq(w, h, 4, 16).codes, gptq(w, scale * h, 4, 16).codes)


def test_dead_columns_are_zero():
    w, h = layer()
    dead = [0, 5, 33, 69]
    h[dead, :] = h[:, dead] = 0
    w[:, 5] = 1e4  # and say nothing about the grid
    for order in (False, True):
        found = gptq(w, h, 4, 16, act_order=order)
        assert (values(found)[:, dead] == 0).all() and found.scales.max() < 10
        live = np.delete(np.arange(70), dead)
        assert proxy(w[:, live], values(found)[:, live], h[np.ix_(live, live)]) == pytest.approx(
            proxy(w, values(found), h)
        )
    assert (values(gptq(w, np.zeros((70, 70)), 4, 16)) == 0).all()


def test_few_tokens():
    """A Hessian without full rank is made fit by its damping."""
    w, h = layer(tokens=5)
    assert np.linalg.matrix_rank(h) == 5
    assert proxy(w, values(gptq(w, h, 3, 35)), h) < 0.2 * proxy(w, values(rtn(w, 3, 35)), h)
    with pytest.raises(ValueError, match="positive definite"):
        gptq(w, -h - np.eye(70) + 2 * np.diag(np.diag(h) + 1), 3, damp=0)


def test_shapes_and_edges():
    assert_array_equal(values(rtn(np.zeros((3, 5)), 4, 2)), np.zeros((3, 5)))
    one = rtn(np.array([[3.0]]), 4, None)
    assert values(one)[0, 0] == pytest.approx(3, rel=1e-3) and one.group == 1
    assert rtn(np.ones((2, 5), np.float32), 4, 128).group == 5
    tiny = rtn(np.full((1, 4), 1e-9), 4)
    assert tiny.scales[0, 0] == np.float32(2.0**-14) and (values(tiny) == 0).all()
    exact = rtn(np.arange(16.0)[None] - 5, 4)
    assert_array_equal(values(exact), np.arange(16.0)[None] - 5)
    w = np.linspace(-3, 3, 60).reshape(2, 30)
    for bits in range(1, 9):
        assert int(rtn(w, bits, 7).codes.max()) <= 2**bits - 1
    w32 = w.astype(np.float32)
    assert_array_equal(gptq(w32, np.eye(30, dtype=np.float32), 4).codes, rtn(w32, 4).codes)


def test_what_is_refused():
    w, h = layer()
    for bad in (np.nan, np.inf):
        x = w.copy()
        x[1, 2] = bad
        for call in (lambda x=x: rtn(x, 4), lambda x=x: gptq(x, h, 4), lambda bad=bad: gptq(w, h * bad, 4)):
            with pytest.raises(SourceError, match="NaN"):
                call()
    with pytest.raises(SourceError, match="binary16"):
        rtn(w * 1e6, 4)
    for match, how in (
        ("bits", {"bits": 9}),
        ("bits", {"bits": 0}),
        ("group", {"group": 0}),
        ("Hessian", {"hessian": h[1:]}),
        ("static groups", {"group": 8, "static_groups": False}),
        ("damp", {"damp": -1}),
        ("block", {"block": 0}),
        ("matrix", {"w": w[0]}),
    ):
        with pytest.raises(ValueError, match=match):
            gptq(**{"w": w, "hessian": h, "bits": 4} | how)
