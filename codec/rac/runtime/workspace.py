"""The memory that the compressed layers of a model decode into, and the threads that decode ahead of them.

One buffer serves all layers: the weight of a layer is in it while the layer runs. What the running layer leaves free
holds the weights of the layers that came next the last time, which threads decode meanwhile; the order is learned
anew with every layer that runs. A guess that was wrong costs the work and nothing else. The thread that runs the
layers is one of those that decode: where it would wait, it takes what no other has begun.

Where one layer alone decides how large the buffer is, as the output layer of a language model does, its weight stays,
and the others have a buffer beside it of an eighth of that: decoding it for every token would save no more memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import RacError
from rac.machine import threads_of
from rac.runtime import made, record
from rac.runtime.device import MOST, Ahead

if TYPE_CHECKING:
    from rac.runtime.disk import Store
    from rac.runtime.layers import Compressed as Layer
    from rac.runtime.ranges import Key

Array = NDArray[Any]
AHEAD = 32 << 20
"""The buffer has room for two of the largest layers, up to so many bytes, and at least for one."""
PIECE = 4 << 20
"""Dense bytes from which on a layer is decoded in pieces, its rows of tiles, by several threads, or stays decoded."""
SHARE = 8
"""A weight stays where all others are smaller by this factor, and they have memory smaller by it."""
FAR = 8
"""Layers whose bytes are read ahead, where they are in a file."""
_ALIGN = 64


@dataclass(slots=True)
class _Slot:
    """A part of the buffer, and the layer whose weight is, or will be, in it."""

    layer: weakref.ref[Any]
    version: tuple[int, int] | None
    """None: decoding has failed."""
    start: int
    stop: int
    stored: made.Weight
    pieces: list[tuple[Future[None], partial[None]]]
    """What threads were asked to do. Who cancels one does it itself."""


@dataclass(slots=True)
class _Kept:
    """A weight that stays decoded."""

    layer: weakref.ref[Any]
    version: tuple[int, int] | None
    words: Array
    stored: made.Weight


class Workspace:
    """Shared by the layers of one model. One layer at a time runs, whatever the number of threads that call.

    `threads` decode, with the one that runs the layers; one per core up to 8 by default. None are started before the
    first layer runs. Where the records are in a file, `store` reads them.
    """

    def __init__(self, threads: int | None = None, store: Store | None = None) -> None:
        self._threads, self.store = threads_of(threads), store
        self._clear()

    def _clear(self) -> None:
        _alive.add(self)
        self._lock, self._busy = threading.RLock(), False
        self._largest, self._next_largest = 0, 0
        self._buffer = np.empty(0, np.uint8)
        self._pool: ThreadPoolExecutor | None = None
        self._slots: deque[_Slot] = deque()
        """The running layer, and then those that are decoded ahead."""
        self._kept: _Kept | None = None
        self.weights: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        """Weights that somebody has read and has still, by the identity of the record."""
        self.fused: tuple[tuple[int, int], Any] | None = None
        """The experts of one layer on a device, of a record that has them all, and the version of the record."""
        self._next: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[Any] | None = None
        self._ahead: dict[Any, Ahead] = {}
        """Buffers for layers that are decoded ahead, by device."""
        self._on_device = 0
        """Dense bytes of the largest layer that is decoded ahead there."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: the settings, and room for the same layers. Its buffer and threads are its own."""
        kept = ("_threads", "_largest", "_next_largest", "_on_device", "store")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._clear()
        self.__dict__ |= state

    @property
    def nbytes(self) -> int:
        """Bytes for weights once all layers have run."""
        return self._room + self._keeps * self._largest

    @property
    def _keeps(self) -> bool:
        """Whether the weight of the largest layer stays."""
        return self.store is None and self._largest >= PIECE and self._next_largest * SHARE <= self._largest

    @property
    def _room(self) -> int:
        """Bytes of the buffer once a layer has run."""
        if self._keeps:
            return max(self._next_largest, min(self._largest // SHARE, AHEAD))
        return max(self._largest, min(2 * self._largest, AHEAD))

    def expect(self, size: int) -> None:
        """A layer of `size` dense bytes will use this."""
        with self._lock:
            self._next_largest, self._largest = sorted((size, self._next_largest, self._largest))[1:]
            if size <= MOST:
                self._on_device = max(self._on_device, size)

    def only(self, size: int) -> None:
        """No layer that uses this has more than `size` dense bytes."""
        with self._lock:
            self._drop()
            self._largest, self._buffer = size, np.empty(0, np.uint8)

    def forget(self, layer: Layer) -> None:
        """The layer will not run any more."""
        with self._lock:
            self._drop()
            self._kept = None
            self._next.pop(layer, None)
            for before in [k for k, then in self._next.items() if then() is layer]:
                del self._next[before]
            if self._last and self._last() is layer:
                self._last = None

    def executor(self) -> ThreadPoolExecutor | None:
        """The threads besides the caller's; None where there are none. They end when the workspace goes."""
        with self._lock:
            if self._threads > 1 and self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads - 1, "rac-layers")
            return self._pool

    def close(self) -> None:
        """Stop the threads and give the memory back; the next layer that runs starts them again."""
        with self._lock:
            self._drop()
            if self._pool:
                self._pool.shutdown(cancel_futures=True)
            self.fused = self._kept = None
            self._pool, self._last, self._buffer, self._ahead = None, None, np.empty(0, np.uint8), {}

    @contextlib.contextmanager
    def weight(self, layer: Layer) -> Iterator[Array]:
        """The words (R, C) of the weight of a layer, valid inside; RacError where it is damaged."""
        with self._running():
            try:
                yield self._take(layer)
            except BaseException:
                self._drop()
                raise

    @contextlib.contextmanager
    def on_device(self, layer: Any) -> Iterator[Any]:
        """The weight of a layer whose record is on a device, valid inside for launches on the current stream."""
        with self._running():
            self._learn(layer)
            device = layer.record.device
            if device not in self._ahead:
                self._ahead[device] = Ahead(device)
            with self._ahead[device].weight(layer, self._after(layer), self._on_device) as weight:
                yield weight

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with self._lock:
            if self._busy:
                raise RuntimeError("a layer that runs inside another one cannot decode into the same workspace")
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _learn(self, layer: Layer) -> None:
        """This layer comes after the one that ran before."""
        if self._last and (last := self._last()) is not None:
            self._next[last] = weakref.ref(layer)
        self._last = weakref.ref(layer)

    def _after(self, layer: Layer) -> Layer | None:
        """The layer that came after this one the last time, if it is still there."""
        found = self._next.get(layer)
        return found() if found else None

    def _drop(self, count: int | None = None) -> None:
        """Forget the first `count` slots, by default all."""
        for _ in range(len(self._slots) if count is None else count):
            for done, _run in self._slots.popleft().pieces:
                if not done.cancel():
                    done.exception()  # wait until nobody writes to the buffer

    def _take(self, layer: Layer) -> Array:
        self._drop(min(1, len(self._slots)))  # the layer that ran before
        version = layer.version()
        if self._keeps and layer.dense_bytes == self._largest:
            return self._stays(layer, version)
        found = [i for i, slot in enumerate(self._slots) if slot.layer() is layer and slot.version == version]
        self._drop(found[0] if found else None)
        if not found:
            s, data = layer.stored()
            if s.tensor.nbytes > self._largest:
                self.expect(s.tensor.nbytes)
            if len(self._buffer) < self._room:
                self._buffer = np.empty(self._room, np.uint8)
            self._slots.append(self._slot(layer, version, s, data, 0))
        self._learn(layer)
        self._look_ahead()
        self._finish(self._slots[0])
        return self._words(self._slots[0].stored, self._slots[0].start)

    def _stays(self, layer: Layer, version: tuple[int, int] | None) -> Array:
        """The words of the largest layer, decoded where they are not yet; meanwhile others are decoded ahead."""
        kept = self._kept
        if kept is None or kept.layer() is not layer or kept.version != version or version is None:
            self._kept, (s, data) = None, layer.stored()
            words = s.room() if kept is None or kept.words.shape != s.shape else kept.words
            s.decode(data, words, pool=self.executor())
            kept = self._kept = _Kept(weakref.ref(layer), version, words, s)
        self._slots.appendleft(_Slot(kept.layer, version, 0, 0, kept.stored, []))  # it runs, and takes no room
        self._learn(layer)
        self._look_ahead()
        return kept.words

    def _slot(
        self, layer: Layer, version: tuple[int, int] | None, s: made.Weight, data: record.Bytes, start: int
    ) -> _Slot:
        """Ask threads for the weight of a layer."""
        grid, words, pool = s.tensor.grid, self._words(s, start), self.executor()
        runs = [partial(s.decode, data, words)]
        if pool and s.tensor.nbytes >= PIECE:
            each = ((words[i * grid.tr : (i + 1) * grid.tr], i, i + 1) for i in range(grid.down))
            runs = [partial(s.decode, data, *part) for part in each]
        pieces = [(pool.submit(run) if pool else Future[None](), run) for run in runs]
        return _Slot(weakref.ref(layer), version, start, start + s.tensor.nbytes, s, pieces)

    def _finish(self, slot: _Slot) -> None:
        """Decode what is left of the weight. RacError where it is damaged."""
        for done, run in slot.pieces:
            if done.cancel():
                run()
        for done, _ in slot.pieces:
            while not done.done() and self._help():
                pass
            if not done.cancelled():
                done.result()
        slot.pieces = []

    def _help(self) -> bool:
        """Do a piece of the layers to come that nobody has begun; False where there is none."""
        for slot in itertools.islice(self._slots, 1, None):
            for i, (done, run) in enumerate(slot.pieces):
                if done.cancel():
                    del slot.pieces[i]
                    try:
                        run()
                    except RacError:  # the layer will say so when it runs
                        slot.version = None
                    return True
        return False

    def _words(self, s: made.Weight, start: int) -> Array:
        return self._buffer[start : start + s.tensor.nbytes].view(f"<u{s.tensor.word}").reshape(s.shape)

    def _look_ahead(self) -> None:
        """Ask for the next layers, as far as there is room; not for many, since each will be in a cache for a while."""
        known = {id(slot.layer()) for slot in self._slots}
        tail = self._slots[-1].layer()
        while self._threads > 1 and len(self._slots) <= 2 * self._threads and tail is not None:
            tail = self._after(tail)
            if tail is None or id(tail) in known or (version := tail.version()) is None:
                return
            if self._keeps and tail.dense_bytes == self._largest:
                known.add(id(tail))
                continue
            if (start := self._free(tail.dense_bytes)) is None:
                break
            try:
                found = tail.here()
            except RacError:  # it will say so itself
                return
            if found is None:  # not read yet
                break
            s, data = found
            self._slots.append(self._slot(tail, version, s, data, start))
            known.add(id(tail))
        if self.store is not None:
            self._read_ahead(known)

    def _read_ahead(self, known: set[int]) -> None:
        """Have the bytes of the layers read that come behind those that are decoded ahead."""
        found: list[list[Key]] = []
        tail = self._slots[-1].layer()
        while tail is not None and len(found) < FAR and (tail := self._after(tail)) is not None:
            if id(tail) in known:
                break
            known.add(id(tail))
            filed = tail.filed("weight") if tail.version() is not None else None
            found += [filed.keys()] if filed is not None else []
        if self.store is not None and found:
            self.store.want(found)

    def _free(self, size: int) -> int | None:
        """The lowest place where `size` bytes are free, which caches may still hold; None: there is none."""
        starts = sorted((0, *(-(-slot.stop // _ALIGN) * _ALIGN for slot in self._slots)))
        fits = (a for a in starts if all(a + size <= x.start or a >= x.stop for x in self._slots))
        return next((a for a in fits if a + size <= len(self._buffer)), None)


_alive: weakref.WeakSet[Workspace] = weakref.WeakSet()


def _forked() -> None:
    """Begin anew in a forked process: the threads, and whoever held a lock, have stayed with the parent."""
    for workspace in list(_alive):
        workspace.__setstate__(workspace.__getstate__())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
