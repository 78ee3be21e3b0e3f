"""Frequency tables: normalisation, and the code that they are written in."""

from __future__ import annotations

import numpy as np
import pytest

from rac import native
from rac.entropy import tables
from rac.errors import FormatError
from support import kernels

SPEC = np.array([[1024, 1024, 1536, 512], [2560, 1024, 511, 1]], np.uint16)
SPEC_BYTES = bytes.fromhex("00 10 03 00 20 40 04 03 80 05 00 40 60 78 08 12 03 ff")
"""Worked example 13.2 of format_spec/stages/lanes.md, order -2."""


@pytest.fixture(params=kernels.ALL)
def kernel(request):
    with kernels.using(request.param):
        yield


def random_tables(seed, count=5):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 256))
    counts = (rng.pareto(0.5, (count, n)) * 50).astype(np.int64) * (rng.random((count, n)) < rng.random())
    return np.stack([tables.normalise(c) for c in counts])


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 1], [2048, 2048]),
        ([5, 0], [4095, 1]),
        ([0, 5], [1, 4095]),
        ([0, 0, 9, 0], [0, 1, 4095, 0]),
        ([0, 0], [2048, 2048]),
        ([3, 1], [3072, 1024]),
        ([1 << 50, 1], [4095, 1]),
        ([1, 1, 1], [1366, 1365, 1365]),
    ],
)
def test_normalise_exactly(counts, expected):
    assert tables.normalise(np.array(counts)).tolist() == expected


def test_normalise():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(2, 257))
        counts = (rng.pareto(rng.uniform(0.1, 3), n) * rng.integers(1, 10**6)).clip(0, 1 << 40).astype(np.int64)
        counts *= rng.random(n) < rng.random()
        f = tables.normalise(counts)
        assert f.dtype == np.uint16
        assert int(f.sum()) == 4096
        assert int(f.max()) <= 4095
        assert (f[counts > 0] > 0).all()
        if np.count_nonzero(counts) > 1:
            assert (f[counts == 0] == 0).all()


def test_code_of_the_text(kernel):
    assert tables.to_bytes(SPEC, -2) == SPEC_BYTES
    assert tables.from_bytes(SPEC_BYTES, 2, 4, -2).tolist() == SPEC.tolist()


def test_round_trip(kernel):
    for seed in range(12):
        f = random_tables(seed)
        for order in (-8, -2, -1, 0, 1, 8):
            data = tables.to_bytes(f, order)
            assert (tables.from_bytes(data, *f.shape, order) == f).all()


def test_C_and_python_write_the_same():
    all_tables = [random_tables(seed) for seed in range(12)]
    fast = [tables.to_bytes(f, order) for f in all_tables for order in range(-8, 9)]
    with native.using(None):
        assert [tables.to_bytes(f, order) for f in all_tables for order in range(-8, 9)] == fast


def test_size_without_writing():
    for seed in range(5):
        f = random_tables(seed)
        bits, data = native.golomb(f, 0)
        assert len(data) == -(-bits // 8)


def test_damage(kernel):
    for bad, match in (
        (SPEC_BYTES[:-1], "cut off"),
        (SPEC_BYTES + b"\0", "bits follow"),
        (b"", "cut off"),
        (bytes(18), "cut off"),
        (b"\xff" * 18, "sum to 4096|bits follow"),
    ):
        with pytest.raises(FormatError, match=match):
            tables.from_bytes(bad, 2, 4, -2)
    spare = tables.to_bytes(SPEC[:1], -1)
    used = native.golomb(SPEC[:1], -1)
    if used is not None and used[0] % 8:
        with pytest.raises(FormatError, match="bits follow"):
            tables.from_bytes(spare[:-1] + bytes([spare[-1] | 1]), 1, 4, -1)


def test_every_bit_flip_is_judged_alike():
    def outcome(data):
        try:
            return tables.from_bytes(data, 2, 4, -2).tolist()
        except FormatError as e:
            return str(e)

    flips = []
    for i in range(8 * len(SPEC_BYTES)):
        bad = bytearray(SPEC_BYTES)
        bad[i // 8] ^= 1 << i % 8
        flips.append(bytes(bad))
    fast = [outcome(b) for b in flips]
    with native.using(None):
        slow = [outcome(b) for b in flips]
    assert [isinstance(a, str) for a in fast] == [isinstance(a, str) for a in slow]
    assert [a for a in fast if not isinstance(a, str)] == [a for a in slow if not isinstance(a, str)]


def test_lookup(kernel):
    f = random_tables(3)
    code = np.random.default_rng(0).permutation(256).astype(np.uint8)[: f.shape[1]]
    entries = tables.lookup(f, code)
    assert (entries.shape, entries.dtype) == ((5, 4096), np.uint32)
    for row, e in zip(f, entries, strict=True):
        owner = np.repeat(np.arange(len(row)), row)
        start = np.cumsum(row.astype(np.int64)) - row
        assert (e & 255 == code[owner]).all()
        assert (e >> 20 == row[owner]).all()
        assert ((e >> 8) & 4095 == np.arange(4096) - start[owner]).all()
