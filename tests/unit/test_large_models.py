"""tools/large_models.py: what is computed of large models, from shapes that are known and a pack that was measured."""

from __future__ import annotations

import pytest

from large_models import MODELS, Costs, Work, blocks, llama

STAGES = ("forward", "backward", "ends", "moments", "triangular", "rates", "feedback", "search", "coding", "measuring")


def found(n: int) -> dict:
    """A pack of so many blocks, as lossy_at_scale.py writes it: every stage took some seconds for each block."""
    every = {name: n * (i + 1.0) for i, name in enumerate((*STAGES, "rest"))}
    some = {"search": 2.0 * n, "feedback": 1.0 * n}
    core = sum(every.values()) + sum(some.values())
    return {"blocks": n, "tokens": 4096, "core": core, "all": every, "sample": some}


def test_shapes_are_those_of_the_models():
    assert [m.weights for m in MODELS[:2]] == [6_979_321_856, 68_451_041_280]
    assert MODELS[2].weights == pytest.approx(1.027e12, rel=1e-3)
    eight = Work.of(MODELS[0], 1)
    assert eight.weights == MODELS[0].weights
    assert eight.forward == 3 * MODELS[0].weights
    assert eight.triangular == 32 * (3 * 4096**3 + 14336**3)
    assert eight.moments == 32 * (6 * 4096**2 + 14336**2)


def test_a_pack_computed_from_itself_is_itself():
    for n in (1, 4):
        pack = found(n)
        hours = Costs.measured(pack, blocks(pack)).hours(blocks(pack), 4096)
        assert 3600 * sum(hours.values()) == pytest.approx(pack["core"])


def test_a_model_that_was_run_as_a_whole_has_two_of_three_multiply_adds():
    pack = found(1)
    run = [pack["all"].pop(name) for name in ("forward", "backward", "ends")]
    pack["all"] |= {"whole": 20.0, "chain": 3.0}
    pack["core"] += 23 - sum(run)
    hours = Costs.measured(pack, blocks(pack)).hours(blocks(pack), 4096)
    assert 3600 * hours["calibration"] == pytest.approx(30)
    assert 3600 * sum(hours.values()) == pytest.approx(pack["core"] + 10)


def test_blocks_and_tokens_and_widths_count():
    costs = Costs.measured(found(2), blocks(found(2)))
    two, four = (costs.hours(llama("", n, 4096, 14336), 4096) for n in (2, 4))
    assert four == pytest.approx({name: 2 * hours for name, hours in two.items()})
    more = costs.hours(llama("", 2, 4096, 14336), 40960)
    grown = {name for name in two if more[name] != pytest.approx(two[name])}
    assert grown == {"calibration", "moments"}
    wide = costs.hours(llama("", 2, 8192, 28672), 4096)
    assert wide["triangular"] == pytest.approx(8 * two["triangular"])
