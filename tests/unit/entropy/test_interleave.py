"""The words of several lanes in one sequence."""

from __future__ import annotations

import numpy as np
import pytest

from rac.entropy import ans
from rac.errors import ChecksumError

FREQ = np.array([[4, 3692, 400]], np.uint16)
SEGMENTS = np.array([[17, 0]])
STREAMS = [[0x1, 0x11C0, 0x31000000], [0x28F5, 0xC2F50000, 0]]
WORDS = [0x1, 0x11C0, 0x28F5, 0xC2F50000, 0x31000000, 0]
"""Worked example 13.4 of format_spec/stages/lanes.md."""


def test_the_example_of_the_text():
    streams = [np.array(s, np.uint32) for s in STREAMS]
    assert ans.merge(streams, FREQ, SEGMENTS).tolist() == WORDS
    split = ans.split(np.array(WORDS, np.uint32), np.array([3, 3], np.uint16), FREQ, SEGMENTS)
    assert [s.tolist() for s in split] == STREAMS


def test_lanes_without_words():
    none = [np.zeros(0, np.uint32)] * 3
    assert ans.merge(none, FREQ, SEGMENTS).tolist() == []
    assert [s.tolist() for s in ans.split(none[0], np.zeros(3, np.uint16), FREQ, SEGMENTS)] == [[], [], []]


def test_words_that_nobody_takes():
    words, counts = np.array([*WORDS, 7], np.uint32), np.array([4, 3], np.uint16)
    with pytest.raises(ChecksumError, match="initial state"):
        ans.split(words, counts, FREQ, np.array([[3, 0]]))
