"""One tile to its unit bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.encode.code.plan import LEVELS, Plan, gather, sequence, shuffle
from rac.entropy.ans import Models
from rac.entropy.interleave import merge
from rac.stages import bits as bt
from rac.stages.lanes import layout as ll

Array = NDArray[Any]


class TileEncoder:
    """Encodes the tiles of one tensor under its plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        p = plan.lanes
        if p is None or plan.freq is None:
            return
        self._same = np.tile(np.arange(256, dtype=np.uint8), (p.tables, 1))
        self._escaping = np.zeros((p.tables, 256), np.bool_)
        self._escaping[:, p.first_escaping : p.symbols] = True
        if plan.rare is not None:  # rare pairs are coded as two first escapes
            both = int(np.flatnonzero((p.pairs() == p.first_escape).all(1))[0])
            self._escaping[:, : p.symbols] |= plan.rare
            self._same[:, : p.symbols][plan.rare] = both
        self._model = native.symbol_model(plan.freq, self._same)

    def encode(self, words: Array, i: int) -> bytes | memoryview:
        """Unit of tile `i`, whose words (h, w) are given."""
        plan = self.plan
        if plan.method == "raw/1":
            return np.ascontiguousarray(words).tobytes()
        if plan.method == "bits/1":
            return bt.pack(words, plan.bits)
        if plan.method == "zstd/1":
            return zstd.compress(shuffle(words), LEVELS[plan.level].zstd)
        return self._lanes(words, i)

    def _lanes(self, words: Array, i: int) -> memoryview:
        p = self.plan.lanes
        assert p is not None  # noqa: S101
        order, sym = sequence(self.plan, i)
        flat = gather(order, words)
        coded, counts = native.encode_lanes(sym, p.lanes, order.segments, self._model) or self._reference(sym, order)
        escapes = self._escapes(order, sym, flat) if p.escapes else b""
        sizes, total = [], 0
        for (bits, low), size in zip(p.planes(), ll.plane_sizes(len(flat), p), strict=True):
            sizes.append((bits, low, total))
            total += ll.up16(size)
        raw = native.planes(flat, p.zero, p.sign, p.shift, sizes, total)
        planes: list[bytes | memoryview] = [
            raw[at : at + size].data for (*_, at), size in zip(sizes, ll.plane_sizes(len(flat), p), strict=True)
        ]
        if p.packed:
            planes = [self._smaller(plane) for plane in planes]
        return ll.build_tile(coded, counts, escapes, planes, p)

    def _reference(self, sym: Array, order: ll.Order) -> tuple[Array, Array]:
        """`native.encode_lanes` through constriction, lane by lane; slow."""
        p, freq = self.plan.lanes, self.plan.freq
        assert p is not None  # noqa: S101
        assert freq is not None  # noqa: S101
        table = order.segments[:, 1]
        models, starts = Models(freq), np.cumsum(order.segments[:, 0]) - order.segments[:, 0]
        places = np.empty(len(sym), np.int32)
        for start, (n, t) in zip(starts, order.segments, strict=True):
            places[start : start + n] = models.index[t][self._same[t][sym[start : start + n]]]
        streams = []
        for lane, steps in enumerate(ll.lane_steps_all(order.segments, p.lanes)):
            mine = [places[s + lane : s + n : p.lanes] for s, n in zip(starts, order.segments[:, 0], strict=True)]
            todo = list(zip(steps.tolist(), table.tolist(), strict=True))
            streams.append(models.encode(np.ascontiguousarray(np.concatenate(mine)), todo))
        return merge(streams, freq, order.segments), np.array([len(s) for s in streams])

    def _smaller(self, plane: bytes | memoryview) -> bytes | memoryview:
        """The plane compressed where that pays for its time: low bits of float32 are often zero in whole rows."""
        packed = zstd.compress(plane, LEVELS[self.plan.level].planes)
        return packed if len(packed) < len(plane) - len(plane) // 128 else plane

    def _escapes(self, order: ll.Order, sym: Array, flat: Array) -> bytes:
        """Escape bytes in sequence order; few symbols have any."""
        p = self.plan.lanes
        assert p is not None  # noqa: S101
        at = native.find(sym, order.segments, self._escaping)
        ends = np.cumsum(order.segments[:, 0])
        k = np.searchsorted(ends, at, side="right")
        first = np.cumsum(order.sizes) - order.sizes
        element = (first[k] + (at - (ends - order.segments[:, 0])[k]) * p.per)[:, None] + np.arange(p.per)
        base = p.pairs()[sym[at]].astype(np.int64)
        if self.plan.rare is not None:
            base[self.plan.rare[order.segments[k, 1], sym[at]]] = p.first_escape
        use = (base >= p.first_escape) & (element < (first + order.sizes)[k][:, None])
        top = native.tops(flat[element[use]], p.zero, p.sign, p.shift).astype(np.int64)
        out: bytes = (top - np.array(p.escapes, np.int64)[base[use] - p.first_escape]).astype(np.uint8).tobytes()
        return out
