"""The reference symbol decoder: constriction, one lane at a time. Slow; the fast kernels are held to it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.entropy.ans import Models, Segment, split
from rac.stages.lanes import layout


def lanes(tile: layout.Tile, freq: NDArray[np.uint16], segments: NDArray[np.int64], n: int) -> NDArray[np.uint8]:
    """Symbols (n,) in sequence order of one tile; FormatError or ChecksumError on damage."""
    models = Models(freq)
    out = np.empty(n, np.uint8)
    count = len(tile.counts)
    for lane, words in enumerate(split(tile.words, tile.counts, freq, segments)):
        mine: list[Segment] = list(
            zip(layout.lane_steps(segments, lane, count).tolist(), segments[:, 1].tolist(), strict=True)
        )
        symbols = models.decode(words, mine)
        done = start = 0
        for (steps, _), size in zip(mine, segments[:, 0], strict=True):
            out[start + lane : start + size : count] = symbols[done : done + steps]
            done, start = done + steps, start + int(size)
    return out
