"""groups/1 for a GPU: a scale and a zero for each group."""

from __future__ import annotations

import numpy as np

from rac.gpu.layout import Call, Place, steps
from rac.gpu.stages.base import Codes, Tile
from rac.stages.groups import OpenGroups
from rac.stages.words import DTYPES

ROWS, COLS = 32, 256
"""Codes of a program."""


class Groups:
    """groups/1."""

    anywhere = False

    def lay(self, opened: OpenGroups, tile: Tile, codes: Codes, to: Place) -> None:
        """The numbers of a tile, in jobs of as many rows as a grid takes."""
        batch, (h, w), (r0, _, c0, _) = tile.batch, tile.shape, tile.box
        entries = batch.once((id(tile.dec), "groups"), lambda: _entries(tile, opened))
        lists, group, size = opened.scales.shape[1], opened.p.group, DTYPES[opened.dtype].itemsize
        first, left = divmod(c0, group)
        pairs = size == 2 and not (w % 2 or codes.at % 2 or to.stride % 2 or to.at % 4)
        options = {"TO": opened.dtype, "PAIRS": pairs, "SAME": not (group % 2 or left % 2), "ROWS": ROWS, "COLS": COLS}
        call = Call("groups", tuple(options.items()), codes.source, to.memory)
        for y, deep in steps(h, w, ROWS, COLS):
            fields = {"codes": codes.at + y * w, "code_stride": w, "bits_status": opened.p.bits | tile.status << 8}
            of_row = entries + 8 * ((r0 + y) * lists + first)
            fields |= {"entries": of_row, "lists": lists, "group": group, "left": left}
            batch.add(call, **fields, numbers=to.at + y * to.stride * size, stride=to.stride, h=deep, w=w)


def _entries(tile: Tile, s: OpenGroups) -> int:
    """Offset in `aux` of the groups of the matrix, (R, G, 2) float32: scale, 2^23 + zero."""
    biased = s.zeros.astype(np.float32) + np.float32(2**23)
    return tile.batch.put(np.stack(np.broadcast_arrays(s.scales, biased), axis=-1))
