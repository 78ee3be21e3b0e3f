"""Files behind a URL, by HTTP range requests that go on where a connection broke, or by fsspec, whose door this is."""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from rac.container.access import Access, NoRangesError
from rac.errors import MissingDependencyError, SourceError

RETRIES = 6  # attempts in a row that may bring nothing
BACKOFF = 0.1  # seconds before the second of these; each next wait is twice as long, up to 5 s
STALL = 30.0  # seconds without a byte after which a connection counts as broken
START = 4096  # bytes that the first request fetches: the header of most archives is among them
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")


def open_url(url: str) -> Access:
    """What the URL names; SourceError where it is not there, NoRangesError where its server has no ranges."""
    fs, path = system(url)
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return HttpAccess(fs, path) if "http" in protocols else ObjectStoreAccess(fs, path, url)


def system(url: str) -> tuple[Any, str]:
    """The file system of fsspec that knows a URL, and the path of the file in it."""
    try:
        import fsspec
    except ImportError as e:
        raise MissingDependencyError(f"{url} needs `pip install rac-codec[remote]` ({e})") from e
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return found
    except ImportError as e:  # of the package that knows these URLs
        more = "`pip install rac-codec[remote]`" if url.startswith("http") else "a package that is not installed"
        raise MissingDependencyError(f"{url} needs {more} ({e})") from e
    except ValueError as e:  # no such protocol
        raise SourceError(str(e), file=url) from e


class Remote(Access):
    """Reading again what did not come."""

    parallel = 8

    def __init__(self, name: str, fs: Any) -> None:
        self.name, self.size, self._fs = name, 0, fs
        self._closed, self._pid = threading.Event(), os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closed.is_set():
            raise SourceError("was closed before it was copied", file=self.name)
        return open_url, (self.name,)

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out` from offset `at`; SourceError where that cannot be had."""
        done = failed = 0
        while done < len(out):
            before, why = done, "the connection broke"
            if self._pid != os.getpid():
                self._pid = os.getpid()
                self._forked()
            try:
                done += self._some(at + done, out[done:])
            except FileNotFoundError as e:
                raise SourceError("no such file", file=self.name) from e
            except PermissionError as e:
                raise SourceError(f"no permission: {e}", file=self.name) from e
            except Broken as e:
                done += e.got
                why = str(e.__cause__ or e)
            if self._closed.is_set():
                raise SourceError("was closed while it was read", file=self.name)
            failed = 0 if done > before else failed + 1
            if failed > RETRIES:
                raise SourceError(f"{why}; gave up after {failed} attempts", file=self.name, offset=at + done)
            if failed:
                self._pause(failed)

    def _forked(self) -> None:
        """The thread that serves the connections stays with the parent."""
        self._fs = system(self.name)[0]

    def _pause(self, failed: int) -> None:
        self._closed.wait(min(5.0, BACKOFF * 2**failed) * (1 + random.random() / 4))

    def _some(self, at: int, out: memoryview) -> int:
        """Fill the beginning of `out`, and say how much; Broken where that failed on the way."""
        raise NotImplementedError

    def close(self) -> None:
        """Reads that are under way end with an error."""
        self._closed.set()


class Broken(Exception):
    """A read that failed on the way; `got` bytes have come."""

    def __init__(self, got: int) -> None:
        super().__init__("the connection broke")
        self.got = got


class HttpAccess(Remote):
    """A file on an HTTP server that answers range requests."""

    def __init__(self, fs: Any, url: str) -> None:
        super().__init__(url, fs)
        self._url, self._tag = fs.encode_url(url), None
        self._running = set[Future[int]]()
        self._start = b""
        start = bytearray(START)
        self.size = -1  # not known yet
        for attempt in range(RETRIES + 1):
            try:
                self._start = bytes(start[: self._some(0, memoryview(start))])
                break
            except Broken as e:
                if attempt == RETRIES:
                    raise SourceError(f"cannot be reached: {e.__cause__ or e}", file=url) from e
                self._pause(attempt)

    def _some(self, at: int, out: memoryview) -> int:
        if at + len(out) <= len(self._start):
            out[:] = self._start[at : at + len(out)]
            return len(out)
        got = [0]
        job = asyncio.run_coroutine_threadsafe(self._get(at, out, got), self._fs.loop)
        self._running.add(job)
        try:
            return job.result()
        except (SourceError, KeyboardInterrupt):
            job.cancel()
            raise
        except BaseException as e:  # aiohttp's errors, timeouts, a close
            raise Broken(got[0]) from e
        finally:
            self._running.discard(job)

    async def _get(self, at: int, out: memoryview, got: list[int]) -> int:
        """One request; `got[0]` counts what has come of it."""
        wanted = {"Range": f"bytes={at}-{at + len(out) - 1}", "Accept-Encoding": "identity"}
        kwargs = {**self._fs.kwargs, "headers": {**self._fs.kwargs.get("headers", {}), **wanted}}
        session = await self._fs.set_session()
        async with await _timed(session.get(self._url, **kwargs)) as r:
            if r.status in (408, 425, 429) or r.status >= 500:
                raise OSError(f"{r.status} {r.reason}")
            self._check(at, r.status, r.reason, r.headers)
            if r.status == 416:  # an empty file
                return 0
            while got[0] < len(out):
                if not (piece := await _timed(r.content.read(min(1 << 16, len(out) - got[0])))):
                    break
                out[got[0] : got[0] + len(piece)] = piece
                got[0] += len(piece)
        return got[0]

    def _check(self, at: int, status: int, reason: str, headers: Any) -> None:
        """SourceError unless this is the part of the file that was asked for, and the file is still the same."""
        if status == 200:
            why = "its server answers no range requests; read it with rac.stream, or download the file first"
            raise NoRangesError(why, file=self.name)
        if status == 416:
            if self.size <= 0 and headers.get("Content-Range") == "bytes */0":
                self.size = 0
                return
            raise SourceError("became shorter while it was read; is it still being written?", file=self.name, offset=at)
        if status != 206:
            raise SourceError(f"the server answers {status} {reason}", file=self.name)
        stated = _RANGE.match(headers.get("Content-Range", ""))
        if not stated or int(stated[1]) != at:
            raise SourceError("its server answers with another range than was asked for", file=self.name, offset=at)
        size, tag = int(stated[3]), headers.get("ETag")
        if self.size < 0:
            self.size, self._tag = size, tag
        if (size, tag) != (self.size, self._tag):
            what = f"had {self.size} bytes, and now has {size}" if size != self.size else "has another ETag now"
            raise SourceError(f"changed while it was read: it {what}; is it still being written?", file=self.name)

    def close(self) -> None:
        """Reads that are under way end with an error."""
        super().close()
        for job in list(self._running):
            job.cancel()


def open_body(url: str) -> Body:
    """What an HTTP URL names, to be read forward once."""
    return Body(system(url)[0], url)


class Body:
    """The body of one answer, as it comes: a stream for `rac.container.feed.StreamRing`."""

    def __init__(self, fs: Any, url: str) -> None:
        self.name, self._fs = url, fs
        self._job: Future[Any] | None = None
        self._response = self._do(self._open())

    async def _open(self) -> Any:
        kwargs = {**self._fs.kwargs, "headers": {**self._fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}}
        session = await self._fs.set_session()
        return await _timed(session.get(self._fs.encode_url(self.name), **kwargs))

    def _do(self, what: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine of the file system; SourceError where the connection breaks."""
        self._job = asyncio.run_coroutine_threadsafe(what, self._fs.loop)
        try:
            return self._job.result()
        except KeyboardInterrupt:
            self._job.cancel()
            raise
        except BaseException as e:  # aiohttp's errors, timeouts, a close
            why = f"the connection broke ({e or type(e).__name__}), and its server has no ranges to go on by"
            raise SourceError(why, file=self.name) from e

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; empty at the end."""
        if self._response.status != 200:
            raise SourceError(f"the server answers {self._response.status} {self._response.reason}", file=self.name)
        return bytes(self._do(_timed(self._response.content.read(size))))

    def close(self) -> None:
        """Let go of the connection; a read that is under way ends with an error."""
        if self._job:
            self._job.cancel()
        self._fs.loop.call_soon_threadsafe(self._response.close)


async def _timed(what: Coroutine[Any, Any, Any]) -> Any:
    async with asyncio.timeout(STALL):
        return await what


class ObjectStoreAccess(Remote):
    """A file of any other file system that fsspec knows (S3 with `s3fs`, for example)."""

    def __init__(self, fs: Any, path: str, url: str) -> None:
        super().__init__(url, fs)
        self._path = path
        try:
            self.size = fs.size(path)
        except FileNotFoundError as e:
            raise SourceError("no such file", file=url) from e
        except Exception as e:  # whatever the file system raises
            raise SourceError(str(e) or type(e).__name__, file=url) from e
        if not isinstance(self.size, int):
            raise SourceError("its size is not known", file=url)

    def _some(self, at: int, out: memoryview) -> int:
        size = min(len(out), 4 << 20)
        try:
            data = self._fs.cat_file(self._path, start=at, end=at + size)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as e:  # whatever the file system raises
            raise Broken(0) from e
        if len(data) > size:
            raise SourceError("its file system returns more than the range that was asked for", file=self.name)
        out[: len(data)] = data
        return len(data)
