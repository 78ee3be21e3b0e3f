"""The decode loop in numba, its only door; compiled once and cached on disk."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def ans_decode(luts: Any, words: Any, counts: Any, segments: Any, out: Any) -> bool:  # pragma: no cover
    """Twin of the lanes of rac_tiles in decode.c."""
    lanes = len(counts)
    st = np.zeros(lanes, np.uint64)
    left = counts.astype(np.int64)
    at = 0
    for i in range(lanes):
        for _ in range(min(2, left[i])):
            st[i] = st[i] << np.uint64(32) | np.uint64(words[at])
            at += 1
            left[i] -= 1
    o = 0
    for k in range(len(segments)):
        todo = segments[k, 0]
        table = segments[k, 1]
        while todo > 0:
            for i in range(min(lanes, todo)):
                x = st[i]
                e = luts[table, (x >> np.uint64(12)) & np.uint64(4095)]
                out[o + i] = e & np.uint32(255)
                x = ((x >> np.uint64(24)) * np.uint64(e >> 20) + np.uint64((e >> 8) & 4095)) << np.uint64(12) | (
                    x & np.uint64(4095)
                )
                if x >> np.uint64(32) == 0 and left[i]:
                    x = x << np.uint64(32) | np.uint64(words[at])
                    at += 1
                    left[i] -= 1
                st[i] = x
            o += min(lanes, todo)
            todo -= lanes
    bad = False
    for i in range(lanes):
        bad |= st[i] != 0 or left[i] != 0
    return bad
