"""The reference symbol decoder: constriction, one lane at a time. Slow; the fast kernels are held to it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.entropy.ans import Models, Segment
from rac.quantize.lossless import Tile


def lane_segments(segments: NDArray[np.int64], lane: int, lanes: int) -> list[Segment]:
    """(symbols of this lane, table) per segment: symbol i of a segment belongs to lane i mod L."""
    return [(max(0, -(-(int(n) - lane) // lanes)), int(t)) for n, t in segments]


def lanes(tile: Tile, freq: NDArray[np.uint16], segments: NDArray[np.int64], n: int) -> NDArray[np.uint8]:
    """Symbols (n,) in sequence order of one tile; FormatError or ChecksumError on damage."""
    models = Models(freq)
    out = np.empty(n, np.uint8)
    count, at = len(tile.counts), 0
    for lane in range(count):
        words = tile.words[at : at + int(tile.counts[lane])]
        at += len(words)
        mine = lane_segments(segments, lane, count)
        symbols = models.decode(words, mine)
        done = start = 0
        for (steps, _), size in zip(mine, segments[:, 0], strict=True):
            out[start + lane : start + size : count] = symbols[done : done + steps]
            done, start = done + steps, start + int(size)
    return out
