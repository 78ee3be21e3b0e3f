"""Instructions of the kernels for NEON, counted in the emulator: no more than were counted before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import instructions
from support import arm

STATED = json.loads(instructions.RATCHET.read_text())
MORE = 1.03


@pytest.mark.skipif(bool(arm.missing()), reason=str(arm.missing()))
@pytest.mark.parametrize("name", instructions.WORK)
def test_no_more_than_before(name):
    """`python tools/instructions.py --write` after a change for the better, or for a reason."""
    if STATED["compiler"] != instructions.version():
        pytest.skip(f"was counted with {STATED['compiler']}")
    found = instructions.count(name, ["neon"])
    assert found  # what is counted still runs
    for row, of in found.items():
        assert of["neon"] <= MORE * STATED["per weight"][row]["neon"], row


@pytest.mark.parametrize("row", ["decode default, BF16", "decode 3 bits to BF16"])
def test_neon_against_avx2(row):
    """The figures as they were counted last."""
    of = STATED["per weight"][row]
    assert of["neon"] <= 1.5 * of["avx2"]


def test_the_page_has_the_figures_as_they_were_counted_last():
    page = Path(__file__).parents[3].joinpath("docs", "benchmarks.md").read_text(encoding="utf-8")
    table = page.split("| NEON / AVX2 |", 1)[1].splitlines()[2:]
    expected = [
        f"| {row} | {of['avx2']:,.2f} | {of['avx512']:,.2f} | {of['neon']:,.2f} | {of['neon'] / of['avx2']:.2f} |"
        for row, of in STATED["per weight"].items()
    ]
    assert table[: len(expected)] == expected
