"""One tile to its unit bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.encode.analyse import LEVELS, Plan, shuffle
from rac.entropy.ans import Models
from rac.quantize import lossless as ll

Array = NDArray[Any]


class TileEncoder:
    """Encodes the tiles of one tensor under its plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._models = Models(plan.freq) if plan.freq is not None else None

    def encode(self, words: Array, box: tuple[int, int, int, int]) -> bytes:
        """Unit of the tile `words` (h, w); `box` is its place in the grid."""
        plan = self.plan
        if plan.method == "raw/1":
            return np.ascontiguousarray(words).tobytes()
        if plan.method == "zstd/1":
            return zstd.compress(shuffle(words), LEVELS[plan.level].zstd)
        return self._lanes(words, box)

    def _lanes(self, words: Array, box: tuple[int, int, int, int]) -> bytes:
        plan, p = self.plan, self.plan.lanes
        assert p is not None and plan.lut is not None and plan.table is not None and self._models is not None  # noqa: S101
        r0, r1, c0, c1 = box
        order = ll.order(
            None if plan.rows is None else plan.rows[r0:r1],
            None if plan.cols is None else plan.cols[c0:c1],
            r1 - r0,
            c1 - c0,
            plan.table,
        )
        if order.rows is not None:
            words = words[order.rows]
        if order.cols is not None:
            words = words[:, order.cols]
            flat = np.concatenate([words[a:b, c:d].ravel() for a, b, c, d in order.blocks])
        else:
            flat = np.ascontiguousarray(words).reshape(-1)
        sym = native.symbols(flat, p.zero, p.sign, p.shift, plan.lut)
        steps = np.array([ll.lane_steps(order.segments, lane, p.lanes) for lane in range(p.lanes)], np.int64)
        ends = np.cumsum(steps.sum(1))
        starts = ends - steps.sum(1)
        by_lane = native.to_lanes(sym, p.lanes, order.segments, starts)
        where = order.segments[:, 1].tolist()
        streams = []
        for lane in range(p.lanes):
            segments = list(zip(steps[lane].tolist(), where, strict=True))
            streams.append(self._models.encode(by_lane[starts[lane] : ends[lane]], segments).astype("<u4").tobytes())
        escapes = [b""] * p.lanes
        if p.escapes:
            escapes = self._escapes(flat, sym, order.segments, p)
        return ll.build_tile(streams, escapes, ll.pack_planes(ll.split(flat, p), p))

    def _escapes(self, flat: Array, sym: Array, segments: Array, p: ll.Lanes) -> list[bytes]:
        pos = np.flatnonzero(sym >= p.first_escape)
        starts = np.concatenate([[0], np.cumsum(segments[:, 0])])
        lane = (pos - starts[np.searchsorted(starts, pos, side="right") - 1]) % p.lanes
        top = native.tops(flat[pos], p.zero, p.sign, p.shift).astype(np.int64)
        byte = (top - np.array(p.escapes, np.int64)[sym[pos].astype(np.int64) - p.first_escape]).astype(np.uint8)
        return [byte[lane == i].tobytes() for i in range(p.lanes)]
