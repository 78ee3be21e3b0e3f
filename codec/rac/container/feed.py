"""Bytes in the order of the file, for readers that go forward: from memory, from a stream, or read ahead by threads.

A feed hands out views of its buffers. Who takes one gives it back when it is done with it, from any thread, and only
then is the buffer filled again: nothing is copied but what lies across two buffers.
"""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rac import system
from rac.container.access import Access, guarded
from rac.errors import SourceError, TruncatedError

PIECE = 1 << 20  # bytes that a claim of a length is worth before they arrive
SLOT = 4 << 20  # bytes of one read of a file, and of one buffer
WINDOW = 1 << 14  # bytes of one read of small pieces
SPARE = 4  # buffers beside those that are being filled
JOIN = 5.0  # seconds that closing waits for a read that cannot be interrupted
Ranges = Sequence[tuple[int, int]]
Trace = Callable[[str, float, float, int], None]
"""Called with ("read" | "copy" | "decode", start, end in seconds of time.monotonic, bytes)."""


class Readable(Protocol):
    """Anything with `read`."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; empty at the end."""


class Feed:
    """Bytes one after another."""

    name: str

    def take(self, size: int) -> tuple[memoryview, Held | None]:
        """The next `size` bytes, fewer only at the end, and what to give back when they are done with."""
        raise NotImplementedError

    def idle(self, size: int = 1) -> bool:
        """True where `take(size)` would have to wait, as far as that is known."""
        return False

    def close(self) -> None:
        """End the threads, let go of the buffers."""


class Memory(Feed):
    """A feed of bytes that are there already."""

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<bytes>") -> None:
        self.name, self._data, self._at = name, memoryview(data).cast("B"), 0

    def take(self, size: int) -> tuple[memoryview, None]:
        """Views of them."""
        out = self._data[self._at : self._at + size]
        self._at += len(out)
        return out, None


class Near(Feed):
    """A file in the page cache or bytes in memory: what is small is read when asked, the rest by who decodes it.

    Nothing is read ahead: whoever decodes a piece reads it into a buffer that is still in the processor's cache.
    """

    def __init__(self, access: Access) -> None:
        self.name, self.access = access.name, access
        self._at = 0
        self._window, self._start = memoryview(b""), 0
        access.ahead()

    def go(self, at: int) -> None:
        """On from there."""
        self._at = at

    def take(self, size: int) -> tuple[memoryview, None]:
        """A view of bytes in memory, or of a few kilobytes that were read around them."""
        at = self._at
        size = max(0, min(size, self.access.size - at))
        self._at += size
        if (view := self.access.view(at, size)) is not None:
            return view, None
        if at < self._start or at + size > self._start + len(self._window):
            self._window = memoryview(bytearray(min(max(WINDOW, size), self.access.size - at)))
            self._start = at
            self.access.read_into(at, self._window)
        return self._window[at - self._start : at - self._start + size], None

    def later(self, size: int) -> int:
        """Offset of the next `size` bytes, which are not read; TruncatedError where the file ends before."""
        at = self._at
        self._at += size
        if self._at > self.access.size:
            raise TruncatedError("the file ends early", file=self.name, offset=self.access.size)
        return at


class Plain(Feed):
    """A stream, read when asked and no further; no thread."""

    def __init__(self, stream: Readable, name: str) -> None:
        self.name, self._stream, self._at = name, stream, 0

    def take(self, size: int) -> tuple[memoryview, None]:
        """Asked for in pieces, so that a false length allocates nothing."""
        out = bytearray()
        while len(out) < size:
            with guarded(SourceError, self.name, self._at + len(out)):
                got = self._stream.read(min(PIECE, size - len(out)))
            if not got:
                break
            out += got
        self._at += len(out)
        return memoryview(out), None


class Held:
    """A buffer of a ring; who took a view of it gives it back."""

    __slots__ = ("_ring", "data", "done", "filled", "uses")

    def __init__(self, ring: _Ring, data: memoryview) -> None:
        self._ring, self.data, self.filled, self.done, self.uses = ring, data, 0, False, 1

    def give(self) -> None:
        """One use less."""
        self._ring.give(self)


class _Ring(Feed):
    """Buffers that threads fill in the order of the file, at most `size` bytes and `count` of them.

    More would not help: who reads slower than the threads do finds a few full buffers, and memory that is touched for
    the first time costs more than the copy into it.
    """

    def __init__(self, name: str, size: int, slot: int, count: int, trace: Trace | None) -> None:
        self.name, self._slot, self._most = name, slot, min(size // slot, count)
        self._trace = trace
        self._made, self._free, self._queue = 0, list[Held](), deque[Held]()
        self._at = 0
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []

    def idle(self, size: int = 1) -> bool:
        """True where fewer than `size` bytes that were not taken are here; half of what the buffers hold is enough."""
        with self._change:
            here = -self._at
            for slot in self._queue:
                here += slot.filled
                if not slot.done:
                    break
            else:
                if self._ended:
                    return False
            return not self._error and here < min(size, self._most * self._slot // 2)

    def _start(self, threads: int) -> None:
        for _ in range(threads):
            thread = threading.Thread(target=self._work, name="rac-read", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        try:
            self._fill()
        except BaseException as e:
            with self._change:
                self._error = self._error or e
                self._change.notify_all()

    def _fill(self) -> None:
        raise NotImplementedError

    def _next(self) -> Held | None:
        """A free buffer, put into the queue; None when all is over. Called with the lock."""
        while not self._free and self._made >= self._most and not self._stopped:
            self._change.wait()
        if self._stopped:
            return None
        if self._free:
            slot = self._free.pop()
            slot.filled, slot.done, slot.uses = 0, False, 1
        else:
            slot = Held(self, memoryview(bytearray(self._slot)))
            self._made += 1
        self._queue.append(slot)
        return slot

    def give(self, slot: Held) -> None:
        """A use of a buffer is over."""
        with self._change:
            slot.uses -= 1
            if not slot.uses:
                self._free.append(slot)
                self._change.notify_all()

    def take(self, size: int) -> tuple[memoryview, Held | None]:
        """A view, or a copy of what lies across buffers; it grows with what arrives."""
        if not size:
            return memoryview(b""), None
        apart: bytearray | None = None
        with self._change:
            while True:
                while not self._queue and not self._ended and not self._error:
                    self._change.wait()
                if not self._queue:
                    if self._error:
                        raise self._error
                    return memoryview(apart or b""), None
                slot = self._queue[0]
                want = size - len(apart or b"")
                while slot.filled - self._at < want and not slot.done and not self._error:
                    self._change.wait()
                if slot.filled - self._at < want and not slot.done and self._error:
                    raise self._error
                got = min(want, slot.filled - self._at)
                view = slot.data[self._at : self._at + got]
                self._at += got
                whole = apart is None and got == size
                if whole:
                    slot.uses += 1
                else:
                    apart = apart or bytearray()
                    apart += view
                if slot.done and self._at == slot.filled:  # read to its end
                    self._queue.popleft()
                    self._at = 0
                    self.give(slot)
                if whole:
                    return view, slot
                if apart is not None and len(apart) == size:
                    return memoryview(apart), None

    def close(self) -> None:
        """Stop the threads. One that hangs in a read of a foreign object ends with that read."""
        with self._change:
            self._stopped = self._ended = True
            self._change.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(JOIN)
        self._queue.clear()
        self._free.clear()


class RangeRing(_Ring):
    """Ranges of a file, each (offset, size), in their order; several reads in flight."""

    def __init__(self, access: Access, ranges: Ranges, size: int, trace: Trace | None = None) -> None:
        total = sum(n for _, n in ranges)
        slot = max(1, min(SLOT, size // 4, total))
        super().__init__(access.name, size, slot, access.parallel + SPARE, trace)
        self._access = access
        self._pieces = deque((a, min(slot, at + n - a)) for at, n in ranges for a in range(at, at + n, slot))
        for at, n in ranges:
            if at < 0 or at + n > access.size:
                raise TruncatedError(f"{n} bytes are needed, the file has {access.size}", file=access.name, offset=at)
        self._ended = not self._pieces
        if len(self._pieces) == 1:  # a thread would cost more than the read
            self._fill()
        else:
            self._start(min(access.parallel, len(self._pieces), self._most))

    def _fill(self) -> None:
        while True:
            with self._change:
                slot = self._next() if self._pieces else None
                if slot is None or not self._pieces:
                    if slot is not None:  # another thread took the last piece while this one waited
                        self._free.append(self._queue.pop())
                    return
                at, size = self._pieces.popleft()
            start = time.monotonic()
            self._access.read_into(at, slot.data[:size])
            if self._trace:
                self._trace("read", start, time.monotonic(), size)
            with self._change:
                slot.filled, slot.done = size, True
                self._ended = self._ended or not self._pieces
                self._change.notify_all()


class StreamRing(_Ring):
    """A stream, read ahead by one thread: a file object, a pipe, a socket; anything with `read` or `recv`."""

    def __init__(self, stream: Any, name: str, size: int, trace: Trace | None = None) -> None:
        super().__init__(name, size, max(1, min(SLOT, size // 4)), 2 * SPARE, trace)
        self._read = _reader(stream, name)
        self._stream = stream
        # to wait on, where all that has arrived can be seen at it
        raw = stream.raw if isinstance(stream, io.BufferedReader) else stream
        seen = isinstance(raw, io.FileIO | socket.socket) and system.waits_on_files()
        self._file: int | None = raw.fileno() if seen else None
        if self._file is not None:
            system.widen(self._file, PIECE)
        self._wakers = os.pipe() if self._file is not None else None
        # the first read is made here: it empties the buffer of a buffered reader, of which select knows nothing
        self._first = self._more(0, time.monotonic())
        if not self._ended:
            self._start(1)

    def _more(self, at: int, start: float) -> int:
        """Read once into the last buffer, from `at` on; returns where its bytes end. Makes the buffer where at is 0."""
        with self._change:
            slot = self._queue[-1] if at else self._next()
        if slot is None:
            return -1
        got = self._read(slot.data[at:])
        if self._trace:
            self._trace("read", start, time.monotonic(), got)
        with self._change:
            slot.filled = at + got
            self._ended = self._ended or not got
            slot.done = not got or slot.filled == len(slot.data)
            self._change.notify_all()
        return slot.filled if got and slot.filled < len(slot.data) else 0 if got else -1

    def _fill(self) -> None:
        at = self._first
        while at >= 0 and not self._stopped:
            start = time.monotonic()
            if not self._ready():
                return
            at = self._more(at, start)

    def _ready(self) -> bool:
        """Wait until there is something to read; False when it is all over."""
        if self._file is None or self._wakers is None:
            return True
        pending = getattr(self._stream, "pending", None)  # bytes that a TLS socket holds already
        if callable(pending) and pending():
            return True
        waker = self._wakers[0]
        return waker not in system.ready(self._file, waker)

    def close(self) -> None:
        """Stop the thread; the stream stays open."""
        self._stopped = True
        if self._wakers:
            os.write(self._wakers[1], b"x")  # interrupts a read that waits
        super().close()
        if self._wakers and not any(t.is_alive() for t in self._threads):
            for fd in self._wakers:
                os.close(fd)
            self._wakers = None


def _reader(stream: Any, name: str) -> Callable[[memoryview], int]:
    """A function that fills a view as far as one read goes, 0 at the end."""
    at = 0
    into = next((f for n in ("readinto1", "readinto", "recv_into") if (f := getattr(stream, n, None))), None)
    read = next((f for n in ("read1", "read", "recv") if (f := getattr(stream, n, None))), None)
    if into is None and read is None:
        raise SourceError(f"a {type(stream).__name__} has neither read nor recv", file=name)

    def fill(out: memoryview) -> int:
        nonlocal at
        with guarded(SourceError, name, at, (OSError, ValueError)):  # ValueError: closed under us
            if into is not None:
                got = into(out)
                if got is None:
                    raise BlockingIOError("the stream does not wait for its bytes; make it blocking")
            else:
                data = read(min(PIECE, len(out)))  # type: ignore[misc]
                if isinstance(data, str):
                    raise SourceError("gives text; open it in binary mode", file=name)
                got = len(data)
                out[:got] = data
        at += got
        return int(got)

    return fill
