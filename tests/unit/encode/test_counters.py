"""Counters of tensors with more words than 32 bits count: the arithmetic, without the memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rac import native
from rac.encode.code import lanes, plan

COLS = 1 << 20
FEW = 64  # columns that the source really gives of each row


def source(grid, a, b):
    """Rows of a matrix of which only the first columns are there: 0 to 7 in turn times a power of two, and ones."""
    words = np.full((b - a, FEW), 0x3F80, "<u2")
    words[:, : FEW // 2] = (np.arange(FEW // 2) % 8 * 128 + 0x3C00).astype("<u2")
    return words


@pytest.fixture
def counted(monkeypatch):
    """Each word that is there is counted for all COLS // FEW like it, in 32 bits as the kernel does."""
    real = native.scan

    def scan(words, mask, shift, hist):
        some = np.zeros_like(hist)
        union = real(words, mask, shift, some)
        with np.errstate(over="ignore"):
            hist += some * hist.dtype.type(COLS // FEW)
        return union

    monkeypatch.setattr(native, "scan", scan)


def expected(base: int, rows: int) -> dict[int, int]:
    """Counts of the values of the words from bit `base` on."""
    each = COLS // FEW * rows
    found = {(0x3C00 + 128 * k) >> base: FEW // 16 * each for k in range(8)}
    found[0x3F80 >> base] = found.get(0x3F80 >> base, 0) + FEW // 2 * each
    return found


@pytest.mark.parametrize("rows", [1 << 11, 1 << 12, (1 << 13) + 5], ids=["2^31", "2^32", "more than 2^33"])
@pytest.mark.parametrize("level", ["default", "max"])
def test_words_are_counted_beyond_32_bits(rows, level, counted):
    view = plan.View(source, "BF16", (rows, COLS), plan.LEVELS[level])
    assert view.total == rows * COLS
    for again in (False, True):
        if again:
            view.count_all()  # with the bits of the mantissa
        assert {int(k): int(view.hist[k]) for k in np.flatnonzero(view.hist)} == expected(view.base, rows)
        assert int(view.hist.sum()) == view.total
    assert view.union == 0x3F80


def test_counts_of_parts_are_summed_beyond_32_bits():
    """What is counted of symbols that are made anew: each part in 32 bits, the sum in 64."""
    base = lanes.Base.__new__(lanes.Base)
    base._view = SimpleNamespace(grid=SimpleNamespace(rows=3))
    base.parts = lambda a, b: ((np.zeros(1, np.uint8), row, row + 1) for row in range(a, b))
    found = base.sum(lambda some, a, b: np.array([3 << 30, a], np.uint32))
    assert found.tolist() == [9 << 30, 3]


def test_words_that_are_all_alike_have_a_symbol(counted):
    """2^32 equal words would count as none in 32 bits, and the alphabet would be one of nothing."""

    def ones(grid, a, b):
        return np.full((b - a, FEW), 0x3F80, "<u2")

    view = plan.View(ones, "BF16", (1 << 12, COLS), plan.LEVELS["default"])
    assert int(view.hist[0x3F80 >> view.base]) == 1 << 32
    runs, _ = lanes._alphabet(view.hist, 1 + view.total // lanes.RARE[2], 16)
    assert 0x3F80 >> view.base in range(runs[-2], runs[-2] + runs[-1])
