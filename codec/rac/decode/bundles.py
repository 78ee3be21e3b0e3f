"""Small tensors that lie side by side in a file: each bundle of them is read once and decoded in two calls of a kernel.

What one tensor costs in Python is otherwise as much as decoding it takes. The kernel knows plain records only and
declines all others, and all that is wrong; these are read as if there were no bundles, so errors are the same.
"""

from __future__ import annotations

import functools
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

    def __init__(
        self, access: Access, entries: Sequence[Entry], sizes: Sequence[int], limits: Limits, vain: list[Bundle]
    ) -> None:
        """`sizes`: bytes of each tensor; `vain`: takes in those of which more than half was declined."""
        super().__init__(None)
        self.entries, self._access, self._tile, self._vain = entries, access, limits.tile, vain
        self._sizes, self.nbytes = sizes, sum(sizes)
        self._stored = entries[-1].at + entries[-1].size - entries[0].at
        self.words = list[Array | None]()
        """Bytes (n,) of each tensor, once it is decoded; None where it was declined."""

    @property
    def short(self) -> bool:
        """Whether it is decoded as soon as it is met: another thread would come too late."""
        return self._stored <= FEW and self.nbytes <= 4 * FEW

    def seat(self, room: Room, trace: Trace | None) -> None:
        """Take memory for the tensors; without it all are declined."""
        self.trace = trace
        try:
            for size in self._sizes:
                part = room.part(size)
                self.words.append(np.empty(size, np.uint8) if part is None else part)
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
        start, at, size = time.monotonic(), self.entries[0].at, self._stored
        if (view := self._access.view(at, size)) is None:
            view = self.buffer(size).data[:size]
            self._access.read_into(at, view)
            if self.trace:
                self.trace("read", start, time.monotonic(), size)
        return np.frombuffer(view, np.uint8)

    def _decode(self, data: Array) -> list[bool]:
        text, rows, first = bytearray(), list[native.Row](), self.entries[0].at
        for e, words in zip(self.entries, self.words, strict=True):
            if words is None:
                return [False] * len(self.entries)
            stated = msg.members({"dtype": e.dtype, "name": e.name, "shape": e.shape})
            place = len(text), len(stated), e.at - first, e.head_size, e.payload_size, e.check
            word, coder = DTYPES[e.dtype].word, native.CODERS[e.method][0]
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


def _plain(e: Entry, limits: Limits) -> int:
    """Bytes of a tensor that looks like one that the kernel knows, and may be decoded among others; else 0."""
    if e.type != RECORD_TENSOR or e.flags or e.method not in native.CODERS or e.aliases or e.dtype not in DTYPES:
        return 0
    word, most = _words(e.dtype, e.method)
    size = math.prod(e.shape) * word
    within = e.head_size <= limits.head and size <= limits.free_alloc + limits.expansion * e.payload_size
    return size if word <= most and size <= DENSE and within and limits.depth >= DEPTH else 0


@functools.cache
def _words(dtype: str, method: str) -> tuple[int, int]:
    """Bytes of a word, and of the widest that the kernel takes: none where words are not the elements."""
    kind = DTYPES[dtype]
    return kind.word, native.CODERS[method][1] if kind.bits == 8 * kind.word else 0


def cut(access: Access, entries: Sequence[Entry], limits: Limits, most: int) -> Iterator[Bundle | list[Entry]]:
    """Bundles of at most `most` stored bytes, and what cannot be in one; in order.

    Where most of one was declined no more are made: what was read for it was read in vain.
    """
    vain = list[Bundle]()
    for sizes, group in _groups(entries, limits, most):
        yield Bundle(access, group, sizes, limits, vain) if sizes and not vain else group


def _groups(entries: Sequence[Entry], limits: Limits, most: int) -> Iterator[tuple[list[int], list[Entry]]]:
    """Neighbours, and the bytes of each tensor where they can be in a bundle."""
    group, sizes, dense, start, end = list[Entry](), list[int](), 0, 0, 0
    for e in entries:
        stored = e.size
        size = _plain(e, limits) if stored <= most else 0
        apart = size and (e.at != end or e.at + stored - start > most or dense + size > DENSE)
        if group and (apart or bool(size) != bool(sizes)):
            yield sizes, group
            group, sizes, dense = [], [], 0
        if not group:
            start = e.at
        group.append(e)
        end = e.at + stored
        if size:
            sizes.append(size)
            dense += size
    if group:
        yield sizes, group
