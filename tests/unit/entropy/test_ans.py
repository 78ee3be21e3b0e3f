"""ANS lanes through constriction: what its words are must never change."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest

from rac.entropy.ans import Models
from rac.errors import ChecksumError, FormatError

TABLE = np.array([[4, 3692, 400]], np.uint16)
SYMBOLS = [0, 2, 0, 0, 1, 0, 0, 0, 0, 1]
WORDS = [0x00B5C28F, 0xF00000D5, 0x0272C000]
"""Worked example 13.1 of format_spec/stages/lanes.md."""


def encode(frequencies, symbols):
    """The text of format_spec/stages/lanes.md, section 14, in plain integers."""
    starts = np.cumsum(frequencies) - frequencies
    x, words = 0, []
    for s in reversed(symbols):
        f, g = int(frequencies[s]) << 12, int(starts[s]) << 12
        if x >= f << 40:
            words.append(x % 2**32)
            x >>= 32
        x = (x // f << 24) + x % f + g
    while x:
        words.append(x % 2**32)
        x >>= 32
    return words[::-1]


def decode(frequencies, words, count):
    """Section 10 in plain integers; returns symbols, final state, words left."""
    starts = np.cumsum(frequencies) - frequencies
    owner = np.repeat(np.arange(len(frequencies)), frequencies)
    words = list(words)
    x = 0
    for _ in range(2):
        if words:
            x = x << 32 | words.pop(0)
    out = []
    for _ in range(count):
        q = x % 2**24
        s = int(owner[q >> 12])
        x = (x >> 24) * (int(frequencies[s]) << 12) + q - (int(starts[s]) << 12)
        if x < 2**32 and words:
            x = x << 32 | words.pop(0)
        out.append(s)
    return out, x, words


def test_version_is_the_one_whose_words_are_pinned():
    assert importlib.metadata.version("constriction").startswith("0.5.")


def test_exact_words():
    models = Models(TABLE)
    words = models.encode(np.array(SYMBOLS, np.int32), [(10, 0)])
    assert words.dtype == np.uint32
    assert words.tolist() == WORDS == encode(TABLE[0], SYMBOLS)
    assert models.decode(words, [(10, 0)]).tolist() == SYMBOLS
    assert decode(TABLE[0].astype(np.int64), WORDS, 10) == (SYMBOLS, 0, [])


@pytest.mark.parametrize("seed", range(6))
def test_words_are_those_of_the_text(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 256))
    f = np.ones(n, np.int64)
    f[rng.integers(0, n)] += 4096 - n - 1 if seed == 0 else 0
    while f.sum() < 4096:
        f[rng.integers(0, n)] += min(4096 - f.sum(), int(rng.integers(1, 200)))
    f[rng.integers(0, n)] += 4096 - f.sum()
    symbols = rng.choice(n, 700, p=f / 4096)
    words = Models(f[None].astype(np.uint16)).encode(symbols.astype(np.int32), [(700, 0)])
    assert words.tolist() == encode(f, symbols.tolist())
    assert decode(f, words.tolist(), 700) == (symbols.tolist(), 0, [])


def test_frequencies_of_zero_are_mapped_around():
    tables = np.zeros((2, 9), np.uint16)
    tables[0, [2, 7]] = 1, 4095
    tables[1, [0, 8]] = 4000, 96
    models = Models(tables)
    assert models.index[0, [2, 7]].tolist() == [0, 1]
    symbols, segments = np.array([7, 2, 7, 0, 8, 0]), [(3, 0), (0, 1), (3, 1)]
    places = np.concatenate([models.index[0][symbols[:3]], models.index[1][symbols[3:]]]).astype(np.int32)
    words = models.encode(places, segments)
    assert models.decode(words, segments).tolist() == symbols.tolist()


def test_no_symbols_and_no_words():
    models = Models(TABLE)
    assert models.encode(np.zeros(0, np.int32), [(0, 0)]).tolist() == []
    assert models.decode(np.zeros(0, np.uint32), [(0, 0)]).tolist() == []
    # a lane without words stays at state 0, where the first symbol costs nothing
    assert models.encode(np.zeros(50, np.int32), [(50, 0)]).tolist() == []
    assert models.decode(np.zeros(0, np.uint32), [(50, 0)]).tolist() == [0] * 50


def test_damage():
    models = Models(TABLE)
    words = np.array(WORDS, np.uint32)
    with pytest.raises(FormatError, match="zero word"):
        models.decode(np.append(np.uint32(0), words), [(10, 0)])
    with pytest.raises(FormatError, match="zero word"):
        models.decode(np.zeros(1, np.uint32), [(10, 0)])
    for segments in ([(9, 0)], []):
        with pytest.raises(ChecksumError, match="initial state"):
            models.decode(words, segments)
    with pytest.raises(ChecksumError, match="initial state"):
        models.decode(np.append(words, np.uint32(5)), [(10, 0)])
    for word in range(3):
        for bit in range(32):
            bad = words.copy()
            bad[word] ^= np.uint32(1 << bit)
            with pytest.raises(ChecksumError, match="initial state"):
                models.decode(bad, [(10, 0)])
