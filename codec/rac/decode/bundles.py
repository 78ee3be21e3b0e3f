"""Small tensors that lie side by side in a file: each bundle of them is read once and decoded in two calls of a kernel.

What one tensor costs in Python is otherwise as much as decoding it takes. The kernel knows plain records only and
declines all others, and all that is wrong; these are read as if there were no bundles, so errors are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from rac import native
from rac.container import msg, zstd
from rac.container.access import Access
from rac.container.feed import Trace
from rac.cpu.work import scratch
from rac.decode.jobs import Room, Task
from rac.errors import FormatError, RacError
from rac.native.prototypes import Array
from rac.records import Entry, Limits
from rac.registry import DTYPES, RECORD_TENSOR

FEW = 1 << 16  # bytes of records that are not worth another thread
DENSE = 8 << 20  # bytes of the tensors of a bundle
TABLES = 2 << 20  # bytes of the memory for look-up tables and the like; a record that needs more is declined
DEPTH = 4  # levels of nesting of the heads that the kernel knows


class Bundle(Task):
    """Records that lie side by side, and the memory that they are decoded to."""

    def __init__(self, access: Access, entries: Sequence[Entry], limits: Limits, vain: list[Bundle]) -> None:
        """`vain`: takes those in, of many of a file, of which more than half was declined."""
        super().__init__(None)
        self.entries, self._access, self._tile, self._vain = entries, access, limits.tile, vain
        self.nbytes = sum(e.nbytes for e in entries)
        self.words = list[Array | None]()
        """Bytes (n,) of each tensor, once it is decoded; None where it was declined."""

    @property
    def short(self) -> bool:
        """Whether it is decoded as soon as it is met: another thread would come too late."""
        return sum(e.size for e in self.entries) <= FEW and self.nbytes <= 4 * FEW

    def seat(self, room: Room, trace: Trace | None) -> None:
        """Take memory for the tensors; without it all are declined."""
        self.trace = trace
        try:
            for e in self.entries:
                part = room.part(e.nbytes)
                self.words.append(np.empty(e.nbytes, np.uint8) if part is None else part)
        except MemoryError:
            self.words = [None] * len(self.entries)

    def run(self) -> None:
        """Read, check and decode."""
        start = time.monotonic()
        try:
            well = self._decode(self._read())
        except (RacError, MemoryError):  # comes up again, and then with its place
            well = [False] * len(self.entries)
        finally:
            self.give()
        self.words = [words if good else None for words, good in zip(self.words, well, strict=True)]
        if 2 * sum(well) < len(well):
            self._vain.append(self)
        if self.trace:
            self.trace("decode", start, time.monotonic(), self.nbytes)

    def _read(self) -> Array:
        """The bytes of all records, and nothing else."""
        start, first, last = time.monotonic(), self.entries[0], self.entries[-1]
        size = last.at + last.size - first.at
        if (view := self._access.view(first.at, size)) is None:
            view = self.buffer(size).data[:size]
            self._access.read_into(first.at, view)
            if self.trace:
                self.trace("read", start, time.monotonic(), size)
        return np.frombuffer(view, np.uint8)

    def _decode(self, data: Array) -> list[bool]:
        text, rows = bytearray(), list[native.Row]()
        for e, words in zip(self.entries, self.words, strict=True):
            if words is None:
                return [False] * len(self.entries)
            stated = msg.members({"dtype": e.dtype, "name": e.name, "shape": e.shape})
            place = len(text), len(stated), e.at - self.entries[0].at, e.head_size, e.payload_size, e.check
            word, (coder, _) = DTYPES[e.dtype].word, native.CODERS[e.method]
            rows.append(native.Row(*place, native.address(words), len(words), word, coder))
            text += stated
        memory = scratch.take(TABLES)
        try:
            run = native.Run(rows, bytes(text), data, self._tile)
            return [bool(good) for good in native.decode_records(run, _expanded, memory)]
        finally:
            scratch.give([memory])


def _expanded(frame: Array, size: int) -> bytes | None:
    try:
        return zstd.decompress(frame.data, size)
    except FormatError:
        return None


def _plain(e: Entry, limits: Limits) -> bool:
    """Whether it looks like a record that the kernel knows, and may be decoded among others."""
    if e.type != RECORD_TENSOR or e.flags or e.method not in native.CODERS or e.aliases or e.dtype not in DTYPES:
        return False
    kind, size = DTYPES[e.dtype], math.prod(e.shape) * DTYPES[e.dtype].word
    if kind.word > native.CODERS[e.method][1] or kind.bits != 8 * kind.word or not 0 < size <= DENSE:
        return False
    within = e.head_size <= limits.head and size <= limits.free_alloc + limits.expansion * e.payload_size
    return within and limits.depth >= DEPTH


def cut(access: Access, entries: Sequence[Entry], limits: Limits, most: int) -> Iterator[Bundle | list[Entry]]:
    """Bundles of at most `most` stored bytes, and what cannot be in one; in order.

    Where most of one was declined no more are made: what was read for it was read in vain.
    """
    vain = list[Bundle]()
    for plain, group in _groups(entries, limits, most):
        yield Bundle(access, group, limits, vain) if plain and not vain else group


def _groups(entries: Sequence[Entry], limits: Limits, most: int) -> Iterator[tuple[bool, list[Entry]]]:
    """Neighbours, and whether they can be in a bundle."""
    group, was, dense = list[Entry](), False, 0
    for e in entries:
        plain = e.size <= most and _plain(e, limits)
        size = e.nbytes if plain else 0
        apart = plain and group and (group[-1].at + group[-1].size != e.at or e.at + e.size - group[0].at > most)
        if group and (plain != was or apart or dense + size > DENSE):
            yield was, group
            group, dense = [], 0
        group.append(e)
        was, dense = plain, dense + size
    if group:
        yield was, group
