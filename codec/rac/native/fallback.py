"""The decode loop in numba, its only door; compiled once and cached on disk."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def ans_decode(luts: Any, words: Any, counts: Any, segments: Any, out: Any) -> bool:  # pragma: no cover
    """Twin of rac_ans_decode in kernels.c."""
    lanes = len(counts)
    st = np.zeros(lanes, np.uint64)
    ptr = np.zeros(lanes, np.int64)
    end = np.zeros(lanes, np.int64)
    at = 0
    for i in range(lanes):
        ptr[i] = at
        at += counts[i]
        end[i] = at
        for _ in range(2):
            if ptr[i] < end[i]:
                st[i] = st[i] << np.uint64(32) | np.uint64(words[ptr[i]])
                ptr[i] += 1
    o = 0
    for k in range(len(segments)):
        left = segments[k, 0]
        table = segments[k, 1]
        while left > 0:
            for i in range(min(lanes, left)):
                x = st[i]
                e = luts[table, (x >> np.uint64(12)) & np.uint64(4095)]
                out[o + i] = e & np.uint32(255)
                x = ((x >> np.uint64(24)) * np.uint64(e >> 20) + np.uint64((e >> 8) & 4095)) << np.uint64(12) | (
                    x & np.uint64(4095)
                )
                if x >> np.uint64(32) == 0 and ptr[i] < end[i]:
                    x = x << np.uint64(32) | np.uint64(words[ptr[i]])
                    ptr[i] += 1
                st[i] = x
            o += min(lanes, left)
            left -= lanes
    bad = False
    for i in range(lanes):
        bad |= st[i] != 0 or ptr[i] != end[i]
    return bad
