"""Columns of about one bit: no further from the bound than those of many."""

from __future__ import annotations

import numpy as np
import pytest

from rac.encode.quantise import trellis


@pytest.mark.parametrize("scale", [-1, -0.25, -0.125, 0, 0.125, 0.25])
def test_distance_from_the_bound(scale):
    w = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
    scales = trellis.Scales(np.zeros(1024, np.int8), np.zeros(256, np.int8))
    q = trellis.quantise(w, "F32", scale, scales, trellis.Effort(32))
    share = np.bincount(q.words.ravel()) / w.size
    share = share[share > 0]
    bits = -(share * np.log2(share)).sum()
    error = ((q.dense.view(np.float32) - w) ** 2).mean() / (w**2).mean()
    assert 0.7 < bits < 2.1
    assert bits + 0.5 * np.log2(error) < 0.066  # 0.094 where units are finer by half octaves only
