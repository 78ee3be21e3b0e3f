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
        if plan.rare is not None and self._models is not None:
            both = self._both_escape()
            for index, rare in zip(self._models.index, plan.rare, strict=True):
                index[: len(rare)][rare] = index[both]

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
        if self.plan.rare is not None:
            base = self._without_rare(order, base, sym)
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

    def _both_escape(self) -> int:
        """The pair of two first escapes."""
        p = self.plan.lanes
        assert p is not None  # noqa: S101
        return int(np.flatnonzero((p.pairs() == p.first_escape).all(1))[0])

    def _without_rare(self, order: ll.Order, base: Array, sym: Array) -> Array:
        """Base symbols in which both elements of a rare pair are escapes."""
        p, rare = self.plan.lanes, self.plan.rare
        assert p is not None and rare is not None  # noqa: S101
        first = coded = 0
        for n, (steps, table) in zip(order.sizes.tolist(), order.segments.tolist(), strict=True):
            at = first + 2 * np.flatnonzero(rare[table][sym[coded : coded + steps]])
            base[at] = p.first_escape
            base[(at + 1)[at + 1 < first + n]] = p.first_escape
            first, coded = first + n, coded + steps
        return base

    def _escapes(self, flat: Array, base: Array, p: ll.Lanes) -> bytes:
        pos = np.flatnonzero(base >= p.first_escape)
        top = native.tops(flat[pos], p.zero, p.sign, p.shift).astype(np.int64)
        out: bytes = (top - np.array(p.escapes, np.int64)[base[pos] - p.first_escape]).astype(np.uint8).tobytes()
        return out
