"""What a dry run says of the time: operations of the kernels by shape, all else by weight."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from rac.encode import estimate as est
from rac.encode.options import Budget, Calibration, Lossy
from rac.encode.quantise.tensor import FEWEST, PRODUCTS
from rac.encode.sources import SourceTensor
from rac.encode.ties import Group


def group(*shape: int, name: str = "w") -> Group:
    return Group(SourceTensor(name, "F32", shape, np.zeros(0, np.uint8)), (), {})


@pytest.mark.parametrize(
    ("shape", "work"),
    [
        ((600, 400), est.Work(240_000, 400**3, 600 * 400**2 / 2, 2 * 600 * 400**2, 400**2)),
        ((2, 600, 400), est.Work(480_000, 2 * 400**3, 2 * 600 * 400**2 / 2, 4 * 600 * 400**2, 2 * 400**2)),  # experts
        ((40_000, 4096), est.Work(40_000 * 4096, 4096**3, 40_000 * 4096**2 / 2, 2 * PRODUCTS, 4096**2)),
        (
            (40_000, 16_384),
            est.Work(40_000 * 16_384, 16_384**3, 40_000 * 16_384**2 / 2, 2 * FEWEST * 16_384**2, 16_384**2),
        ),
    ],
)
def test_operations_follow_shapes(shape, work):
    assert est.Work.of([group(*shape)]) == work


def test_wide_matrices_cost_more_than_the_sample_shows(monkeypatch):
    """A sample of narrow ones says nothing of the factors of wide ones, which go with the cube."""
    monkeypatch.setattr(est.Speed, "here", classmethod(lambda cls: cls(1e-9, 1e-10)))
    narrow, wide = est.Work.of([group(4096, 512)]), est.Work.of([group(512, 4096)])
    assert narrow.weights == wide.weights
    own = 1e-9 * narrow.factors, 1e-10 * narrow.fed
    took = 0.5 + own[0], 2.0 + own[1], 1.2  # recipe, a pass, passes
    by_weight = 0.5 + (1.2 + est.MEASURED) * 2.0
    for every in (narrow, wide):
        products = 1e-9 * every.factors + 1e-10 * (1.2 * every.fed + every.measured)
        assert est._cores(took, narrow, every, known=True) == pytest.approx(by_weight + products)
    assert est._cores(took, narrow, wide, known=False) == pytest.approx(took[0] + (1.2 + est.MEASURED) * took[1])


def test_speeds_are_those_of_kernels():
    """Seconds of a multiply-add on any machine: not of a matrix, nor of nothing."""
    s = est.Speed.here()
    assert 1e-13 < s.factor < 1e-6
    assert 1e-13 < s.product < 1e-6


def test_inputs_that_are_not_known_yet_have_one_recursion_for_each_width():
    layers = est._known([group(8, 300, name="a"), group(9, 300, name="b"), group(8, 310, name="c")])
    assert len({id(layer.factors) for layer in layers.values()}) == 1
    assert layers["a"].key == layers["b"].key != layers["c"].key
    assert layers["a"].second is layers["b"].second
    assert len(layers["b"].sensitivity) == 9
    a, b = est._Moment.of(40), est._Moment.of(40)
    assert a.key == b.key != est._Moment.of(41).key
    assert np.linalg.matrix_rank(a()) == 40


def test_a_calibration_grows_with_tokens_beyond_what_finds_the_blocks(monkeypatch):
    """What finds the chain of blocks is run over one sequence, whatever the text."""
    ticks = itertools.count()  # a product of 1024^3 multiply-adds takes one
    monkeypatch.setattr(est, "time", SimpleNamespace(monotonic=lambda: 0, process_time=lambda: next(ticks)))
    kinds = {(True, "F32", (400, 300)): [group(400, 300)]}
    tables = {(False, "F32", (500, 300)): [group(500, 300, name="lm_head.weight")]}

    def cores(tokens: int, rest: dict) -> float:
        return est._calibration(kinds, rest, Lossy(Budget(bits=3.0), Calibration(("text",), tokens=tokens))).cores

    one = est.BESIDE / 1024**3
    for tokens, found in ((512, 512), (1024, 1024), (40_960, 1024)):
        products = (3 * 120_000 + 300**2 / 2) * tokens + 2 * 120_000 * found
        assert cores(tokens, {}) == pytest.approx(one * products)
        assert cores(tokens, tables) == pytest.approx(one * (products + 2 * 150_000 * tokens))
