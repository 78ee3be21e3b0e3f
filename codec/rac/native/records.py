"""Records of whole tensors that lie side by side in memory: heads and words in C. Twins: rac/tensor.py, rac/stages."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library
from rac.native.prototypes import Array

CODERS = {"raw/1": (0, 8), "zstd/1": (1, 8), "lanes/1": (2, 2)}
"""Stages that a record may have, alone: number in src/records.h, and bytes of the widest words. Of wider ones planes
are mostly in Zstandard frames, and declined."""
_ROW = struct.Struct("<5qQQq2i")


class Row(NamedTuple):
    """A record, as its row of the index states it, and where its words go; the fields of a `Stored`."""

    stated: int  # of `Run.text`: dtype, name and shape, as its head has them,
    stated_size: int  # and bytes of that
    at: int  # in `Run.data`
    head: int
    payload: int
    check: int
    out: int  # address of `size` bytes,
    size: int
    word: int
    coder: int


class Run(NamedTuple):
    """Records that are decoded together; tiles have `tile` bytes at most."""

    rows: list[Row]
    text: bytes
    data: Array  # (n,) uint8 as they lie in the file
    tile: int


def decode_records(run: Run, expand: Callable[[Array, int], bytes | None], memory: Array) -> NDArray[np.bool_]:
    """Which of the records were checked and decoded: (n,). The others are declined, as all but plain ones are.

    Whatever is wrong with one that is declined, its twin says; without kernels all are. `expand` gives the content of a
    Zstandard frame, of so many bytes, None where it is damaged; `memory` (n,) uint8 is for tables, of several records
    where it suffices.
    """
    n, lib = len(run.rows), library()
    state = np.zeros(n, np.uint8)
    if lib is None:
        return state.view(bool)
    rows = b"".join([_ROW.pack(*row) for row in run.rows])
    frames, place = np.empty((2 * n, 4), np.int64), np.zeros(n, np.int64)
    common = rows, n, run.text, run.data, len(run.data), run.tile
    found = lib.rac_heads(*common, state, frames)
    content, total, last = list[bytes](), 0, -1
    for at, size, holds, record in frames[: max(0, found)].tolist():
        if record != last:
            place[record], last = total, record
        whole = expand(run.data[at : at + size], holds)
        if whole is None:
            state[record] = 0
            continue
        content.append(whole)
        total += len(whole)
    if found >= 0:
        lib.rac_records(*common, state, place, b"".join(content), total, memory, len(memory))
    return state.view(bool)
