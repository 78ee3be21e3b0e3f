"""Launches of GPU kernels, and the memory that they work on, laid out in numpy."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import LimitError

Array = NDArray[Any]
FOREVER = 1 << 30
"""Rows of the piece behind the last one of a tile, which no lane decodes."""
GRID = 65535
"""Programs along the second axis of a grid."""
STEPS = ("tables", "lanes", "found", "place", "added", "trellis", "outliers", "groups", "product")
"""Kernels in the order in which they run; `found` and `added` are both escapes."""


@dataclass(frozen=True, slots=True)
class Call:
    """One launch: its kernel, what that is compiled for, and the memory that it reads codes from or writes to."""

    step: str
    options: tuple[tuple[str, Any], ...]
    source: str = ""
    to: str = "out"


@dataclass(frozen=True, slots=True)
class Launch:
    """A call, where in `aux` its jobs are and their bytes, its grid, and the number of jobs."""

    call: Call
    jobs: int
    size: int
    grid: tuple[int, int]
    n: int


def _grid(call: Call, rows: Array) -> tuple[int, int]:
    o = dict(call.options)
    if call.step == "lanes":
        return len(rows) // (o["BLOCK"] // o["SPAN"]), 1
    if call.step == "place":
        return len(rows), int((-(-rows[:, 6] // o["ROWS"]) * -(-rows[:, 7] // o["COLS"])).max())
    if call.step == "trellis":
        return len(rows), int((-(-rows[:, 9] // o["COLS"])).max())
    if call.step in ("product", "groups"):
        return len(rows), int((-(-rows[:, 9] // o["ROWS"]) * -(-rows[:, 10] // o["COLS"])).max())
    return (-(-len(rows) // o["BLOCK"]) if call.step == "outliers" else len(rows)), 1


def power_of_two(n: int) -> int:
    """`n` rounded up to a power of two."""
    return 1 << max(0, n - 1).bit_length()


def up(n: int, a: int) -> int:
    """`n` rounded up to a multiple of `a`."""
    return -(-n // a) * a


class Layout:
    """Memory of kernels that are launched together, and their jobs."""

    def __init__(self, buffer: Array | None = None) -> None:
        """`buffer` (bytes,) uint8 takes `aux` as long as it is large enough."""
        self.buffer = np.empty(1 << 16, np.uint8) if buffer is None else buffer
        self.aux = 0
        self.work = 0
        self.jobs: dict[Call, list[tuple[int, ...]]] = defaultdict(list)

    def put(self, *arrays: Array) -> int:
        """Offset in `aux` of arrays that follow each other."""
        start = self.aux
        for a in arrays:
            end = self.aux + a.nbytes
            if end > len(self.buffer):
                more = np.empty(max(end, 2 * len(self.buffer)), np.uint8)
                more[: self.aux] = self.buffer[: self.aux]
                self.buffer = more
            self.buffer[self.aux : end] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
            self.aux = end
        self.aux = up(self.aux, 16)
        return start

    def room(self, size: int, align: int = 16) -> int:
        """Offset in `work` of so many bytes."""
        start = up(self.work, align)
        self.work = start + size
        return start

    def seal(self) -> list[Launch]:
        """What is to be launched, in this order; ends the batch."""
        out = []
        for call in sorted(self.jobs, key=lambda c: (STEPS.index(c.step), repr(c))):
            rows = np.array(self.jobs[call], np.int64)
            if call.step == "lanes":
                rows = self._whole(rows, dict(call.options))
            grid = _grid(call, rows)
            if grid[1] > GRID:
                raise LimitError(f"{grid[1]} parts of a tile are more than a GPU takes")
            out.append(Launch(call, self.put(rows), rows.nbytes, grid, len(rows)))
        return out

    def _whole(self, rows: Array, options: dict[str, Any]) -> Array:
        """Jobs of lanes, the longest first, so that the tiles of a warp are alike; empty ones fill the last warp."""
        rows = rows[np.argsort(-rows[:, 6], kind="stable")]
        short = -len(rows) % (options["BLOCK"] // options["SPAN"])
        if not short:
            return rows
        nothing = rows[-1].copy()
        nothing[0], nothing[9] = self.put(np.zeros((options["LANES"], 3), np.uint32)), 0
        nothing[4] = self.put(np.array([(0, 0, 0, 0), (FOREVER, 0, 0, 0)], np.int32))
        return np.concatenate([rows, np.tile(nothing, (short, 1))])
