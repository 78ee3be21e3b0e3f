"""The reference symbol decoder: constriction, one lane at a time. Slow; the fast kernels are held to it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.entropy.ans import Models, split
from rac.stages.lanes import layout


def lanes(tile: layout.Tile, freq: NDArray[np.uint16], segments: NDArray[np.int64], n: int) -> NDArray[np.uint8]:
    """Symbols (n,) in sequence order of one tile; FormatError or ChecksumError on damage."""
    models = Models(freq)
    out = np.empty(n, np.uint8)
    sizes, tables, count = segments[:, 0].tolist(), segments[:, 1].tolist(), len(tile.counts)
    streams = split(tile.words, tile.counts, freq, segments)
    for lane, (words, steps) in enumerate(zip(streams, layout.lane_steps_all(segments, count).tolist(), strict=True)):
        symbols = models.decode(words, list(zip(steps, tables, strict=True)))
        done = start = 0
        for k, size in zip(steps, sizes, strict=True):
            out[start + lane : start + size : count] = symbols[done : done + k]
            done, start = done + k, start + size
    return out
