"""One tile to its unit bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.encode.analyse import LEVELS, Plan, gather, sequence, shuffle
from rac.entropy.ans import Models
from rac.quantize import lossless as ll

Array = NDArray[Any]


class TileEncoder:
    """Encodes the tiles of one tensor under its plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._models = Models(plan.freq) if plan.freq is not None else None

    def encode(self, words: Array, i: int) -> bytes:
        """Unit of tile `i`, whose words (h, w) are given."""
        plan = self.plan
        if plan.method == "raw/1":
            return np.ascontiguousarray(words).tobytes()
        if plan.method == "zstd/1":
            return zstd.compress(shuffle(words), LEVELS[plan.level].zstd)
        return self._lanes(words, i)

    def _lanes(self, words: Array, i: int) -> bytes:
        p, models = self.plan.lanes, self._models
        assert p is not None and models is not None  # noqa: S101
        order, base, sym = sequence(self.plan, i)
        flat = gather(order, words)
        steps = ll.lane_steps_all(order.segments, p.lanes)
        ends = np.cumsum(steps.sum(1))
        starts = ends - steps.sum(1)
        by_lane = native.to_lanes(sym, p.lanes, order.segments, starts, models.index)
        where = order.segments[:, 1].tolist()
        streams = [
            models.encode(by_lane[a:b], list(zip(mine, where, strict=True)))
            for a, b, mine in zip(starts, ends, steps.tolist(), strict=True)
        ]
        escapes = self._escapes(flat, base, p) if p.escapes else b""
        sizes, total = [], 0
        for (bits, low), size in zip(p.planes(), ll.plane_sizes(len(flat), p), strict=True):
            sizes.append((bits, low, total))
            total += ll.up16(size)
        return ll.build_tile(streams, escapes, native.planes(flat, p.zero, p.sign, p.shift, sizes, total))

    def _escapes(self, flat: Array, base: Array, p: ll.Lanes) -> bytes:
        pos = np.flatnonzero(base >= p.first_escape)
        top = native.tops(flat[pos], p.zero, p.sign, p.shift).astype(np.int64)
        out: bytes = (top - np.array(p.escapes, np.int64)[base[pos] - p.first_escape]).astype(np.uint8).tobytes()
        return out
