"""Jobs of decoding, the threads that do them, and memory for what they make."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

from rac import native
from rac.container.access import Access, InFile
from rac.container.feed import Held, Trace
from rac.cpu.work import Place, Work, scratch
from rac.decoder import Decoder
from rac.errors import RacError
from rac.grid import Box
from rac.native.prototypes import Array
from rac.tensor import Tensor, empty

LARGE = 4 << 20  # bytes from which on numpy asks for large pages
HUGE = 16 << 20  # bytes from which on a part of one more such page does not matter
PAGE = 2 << 20  # bytes of a large page
ALONE = 8  # small tensors that have memory of their own: of a few, each is asked for by itself
FIRST = 2 << 20  # bytes that are taken at first for small tensors; each time twice as many
LET_GO = 1e-6  # seconds; enough for a thread that waits for the interpreter's lock to get it
PILE = 64  # jobs whose bytes nobody has read yet that may wait: heads come first, for only one thread reads them
GAP = 1 << 14  # bytes between two pieces that are read along: each read lets go of the interpreter's lock
ROUND = 1 << 18  # a buffer is a multiple of it, to be of use again


class Later(NamedTuple):
    """Bytes of a file that are read where they are decoded."""

    access: Access
    at: int
    size: int  # with the padding behind the last unit
    used: int  # without it
    check: Callable[[memoryview], None]  # FormatError where padding is not 0


class Opened:
    """A tensor's decoder, which the thread makes that needs it first: tables and lists take a tenth of all the work."""

    def __init__(self, make: Callable[[], Decoder]) -> None:
        self._make, self._lock = make, threading.Lock()

    def __call__(self) -> Decoder:
        """The decoder."""
        with self._lock:
            made = self._make()
            self._make = lambda: made
            return made


Tiles = tuple[Opened, range, Array | Later, Place]
Join = tuple[Opened, Array, Array, Box]


class Task:
    """What one thread does in one go."""

    def __init__(self, trace: Trace | None) -> None:
        self.held = list[Held]()
        self.scratch = 0  # bytes of intermediate words
        self.done: Future[None] | None = None
        self.wrong = dict[Opened, RacError]()  # of tensors that are damaged, where others of the same job are not
        self.trace = trace
        self._buffer: Array | None = None

    def run(self) -> None:
        """Do it, and give the buffers back."""
        raise NotImplementedError

    def buffer(self, size: int) -> Array:
        """Memory (n,) of `size` bytes or more, the same each time, until it is given back."""
        if self._buffer is None:
            self._buffer = scratch.take(-(-size // ROUND) * ROUND)
        return self._buffer

    def go(self) -> None:
        """`run`, what comes of it to `done`."""
        assert self.done is not None  # noqa: S101
        try:
            self.run()
        except BaseException as e:
            self.done.set_exception(e)
            if not isinstance(e, Exception):  # Ctrl-C
                raise
        else:
            self.done.set_result(None)

    def finished(self) -> bool:
        """True where it was given out, and is done."""
        return self.done is not None and self.done.done()

    def give(self) -> None:
        """Let go of everything."""
        if self._buffer is not None:
            scratch.give([self._buffer])
            self._buffer = None
        held, self.held = self.held, []
        for h in held:
            h.give()


class Job(Task):
    """Tiles that one thread checks and decodes in one go."""

    def __init__(self, trace: Trace | None) -> None:
        super().__init__(trace)
        self.tiles, self.joins = list[Tiles](), list[Join]()
        self.size = self.dense = 0
        self.file = ""

    def run(self) -> None:
        """Decode, and give the buffers back."""
        start = time.monotonic()
        try:
            with InFile(self.file):
                read = self._read()
                pieces = [next(read) if isinstance(data, Later) else data for _, _, data, _ in self.tiles]
            try:
                self._decode(pieces)
            except RacError:
                self._apart(pieces)
        finally:
            self.give()
        if self.trace:
            self.trace("decode", start, time.monotonic(), self.dense)

    def _decode(self, pieces: list[Array], only: Opened | None = None) -> None:
        """Check and decode what was read: all of it, or one tensor's."""
        work = Work()
        for (dec, tiles, data, place), piece in zip(self.tiles, pieces, strict=True):
            if only in (None, dec):
                used = piece
                if isinstance(data, Later):
                    data.check(piece.data)
                    used = piece[: data.used]
                work.add(dec(), tiles, used, place)
        for dec, found, dst, box in self.joins:
            if only in (None, dec):
                work.join(dec(), found, dst, box)
        work.run()

    def _apart(self, pieces: list[Array]) -> None:
        """Decode each tensor by itself, so that only those are lost that are damaged."""
        for dec in dict.fromkeys(dec for dec, *_ in self.tiles):
            try:
                with InFile(self.file):
                    self._decode(pieces, dec)
            except RacError as e:
                self.wrong[dec] = e.with_traceback(None)  # which would keep what was read

    def _read(self) -> Iterator[Array]:
        """The bytes that nobody has read yet, piece after piece, in one buffer, which the processor's cache holds."""
        runs = _side_by_side([piece for _, _, piece, _ in self.tiles if isinstance(piece, Later)])
        at, total = 0, sum(size for _, size in runs)
        for run, size in runs:
            access, first = run[0].access, run[0].at
            view = access.view(first, size)
            if view is None:
                start, view = time.monotonic(), self.buffer(total).data[at : at + size]
                access.read_into(first, view)
                at += size
                if self.trace:
                    self.trace("read", start, time.monotonic(), size)
            for piece in run:
                yield np.frombuffer(view[piece.at - first : piece.at - first + piece.size], np.uint8)

    def give(self) -> None:
        """Let go of everything."""
        self.tiles.clear()
        self.joins.clear()
        super().give()


def _side_by_side(late: list[Later]) -> list[tuple[list[Later], int]]:
    """Pieces with little but heads between them, and the bytes from the first of them to the end of the last."""
    out: list[tuple[list[Later], int]] = []
    end = -GAP
    for piece in late:
        if out and piece.access is out[-1][0][0].access and 0 <= piece.at - end <= GAP:
            run = [*out.pop()[0], piece]
        else:
            run = [piece]
        end = piece.at + piece.size
        out.append((run, end - run[0].at))
    return out


class Team:
    """Threads that decode jobs in the order in which they are given; who waits for one decodes others meanwhile."""

    def __init__(self, threads: int) -> None:
        """`threads`: those that are started; the caller's is another."""
        self._jobs = SimpleQueue[Task | None]()
        self._threads = [threading.Thread(target=self._work, name="rac-decode", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.go()
            del job  # or it would live until the next one comes

    def give(self, job: Task) -> None:
        """Have it done; here where jobs pile up. One that holds buffers of a feed must not keep others from them."""
        most = len(self._threads) if job.held else PILE
        self._jobs.put(job)
        time.sleep(LET_GO)
        while self._jobs.qsize() > most:
            self._help()

    def _help(self) -> bool:
        """Do the next job; False where there is none."""
        try:
            job = self._jobs.get_nowait()
        except Empty:
            return False
        if job is not None:
            job.go()
        return True

    def wait(self, job: Task) -> None:
        """Until it is done, well or not."""
        assert job.done is not None  # noqa: S101
        while not job.done.done() and self._help():
            pass
        job.done.exception()

    def close(self) -> None:
        """End the threads; jobs that nobody has begun are dropped."""
        with suppress(Empty):
            while (job := self._jobs.get_nowait()) is not None:
                job.give()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


class Room:
    """Memory for small tensors, some megabytes at a time, which the system hands out in large pages.

    A page that is touched for the first time costs as much as it takes to decode what goes into it. Who keeps one of
    these tensors keeps its neighbours' memory too, `most` bytes at most.
    """

    def __init__(self, most: int) -> None:
        self._most, self._next = most, FIRST
        self._left, self._alone = np.empty(0, np.uint8), ALONE

    def take(self, t: Tensor) -> Array:
        """The dense matrix of words (R, C) of a tensor, not yet filled; LimitError where memory is short."""
        memory = self.part(t.nbytes)
        return empty(t) if memory is None else memory.view(f"<u{t.word}").reshape(t.grid.rows, t.grid.cols)

    def part(self, nbytes: int) -> Array | None:
        """Memory (nbytes,); None where it is best asked for by itself."""
        size = -(-nbytes // 64) * 64
        if not size or (LARGE <= size < HUGE):  # numpy asks for large pages itself
            return None
        try:
            if size >= HUGE:
                return _aligned(size)[:nbytes]
            if self._alone or size > self._most:
                self._alone = max(0, self._alone - 1)
                return None
            if size > len(self._left):
                while self._next < min(size, self._most):
                    self._next *= 2
                self._left = _aligned(min(self._next, self._most))
                self._next *= 2
        except (MemoryError, ValueError):
            return None
        out, self._left = self._left[:nbytes], self._left[size:]
        return out


def _aligned(size: int) -> Array:
    """Memory (size,) from the start of a large page on, or there would be 512 small ones at each end."""
    out = np.empty(size + PAGE, np.uint8)
    start = -native.address(out) % PAGE
    return out[start : start + size]
