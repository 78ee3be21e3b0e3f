"""What operating systems do differently: reads at a place, locks of files, names of files, the peak of memory.

No module that one of them lacks is imported anywhere in this package but here, and here where it is used.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import re
import shutil
import stat
import sys
import threading
import warnings
from typing import Any, BinaryIO

WINDOWS = sys.platform == "win32"
RAW = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
"""Flags of every file that is opened by number: bytes as they are, not for programs that are started."""
UNFOLLOWED = RAW | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""RAW for what is no symbolic link, and without waiting for the other end of a pipe."""
_LOCKED_AT = 1 << 43  # Windows keeps others from reading what is locked: a byte that no file has
_MOST_PIECES = 64  # of one read; POSIX has 16, every system with `preadv` 1,024
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³])(\..*)?", re.IGNORECASE | re.DOTALL)


class Positioned:
    """Reads and writes at places of an open file, from any thread, as the system does it best."""

    AHEAD = hasattr(os, "posix_fadvise")  # whether `ahead` does anything

    def __init__(self, fd: int) -> None:
        self._fd, self._lock = fd, threading.Lock()

    def read(self, out: memoryview, at: int) -> int:
        """Fill memory from a place; the bytes that came, 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [out], at)
        if hasattr(os, "pread"):
            data = os.pread(self._fd, len(out), at)
        else:
            with self._lock:  # one place for all: who moves it reads before the next one moves it
                os.lseek(self._fd, at, os.SEEK_SET)
                data = os.read(self._fd, len(out))
        out[: len(data)] = data
        return len(data)

    def scatter(self, outs: list[memoryview], at: int) -> int:
        """As `read`, into several pieces of memory one after the other, as many as one call takes."""
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, outs[:_MOST_PIECES], at)
        return self.read(outs[0], at)

    def stat(self) -> os.stat_result:
        """What the system says of the file now."""
        return os.fstat(self._fd)

    def ahead(self) -> None:
        """Have the system read further ahead, where it can; OSError on a file system that cannot."""
        if self.AHEAD:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def write(self, data: memoryview, at: int) -> int:
        """Write to a place; the bytes that were taken."""
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, data, at)
        with self._lock:
            os.lseek(self._fd, at, os.SEEK_SET)
            return os.write(self._fd, data)


def lock(file: BinaryIO) -> None:
    """Keep a file for this process until it is closed; OSError where another one has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        at = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        os.lseek(file.fileno(), _LOCKED_AT, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        finally:
            os.lseek(file.fileno(), at, os.SEEK_SET)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_folder(path: str) -> None:
    """Bring the name of a file to disk; Windows opens no folders, and does so by itself."""
    if WINDOWS:
        return
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unusable(name: str) -> bool:
    """Whether no file of this system can have a name, a path with slashes: on Windows those of devices, and others."""
    if not WINDOWS:
        return False
    return any(_RESERVED.fullmatch(p) or p[-1:] in (".", " ") or set('<>"|?*') & set(p) for p in name.split("/"))


def link(to: str, path: str) -> None:
    """Make a symbolic link to `to`, with slashes; where Windows keeps these for developers, a copy, with a warning."""
    whole = os.path.normpath(os.path.join(os.path.dirname(path), to))
    folder = os.path.isdir(whole)
    try:
        os.symlink(to.replace("/", os.sep), path, folder)
    except OSError:
        if not WINDOWS:
            raise
        (shutil.copytree if folder else shutil.copyfile)(whole, path)
        warnings.warn("rac: symbolic links are not allowed here; copies stand in their place", stacklevel=3)


def waits_on_files() -> bool:
    """Whether a thread can wait for bytes of a pipe and be woken up; Windows waits on sockets only."""
    import select

    return hasattr(select, "poll")


def ready(*files: int) -> list[int]:
    """Waits until something can be read from one of the files, and says from which; see `waits_on_files`."""
    import select

    poll = select.poll()
    for fd in files:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll()]


def widen(fd: int, size: int) -> None:
    """Let a pipe hold `size` bytes, where the system can: each time that it is full or empty costs two switches."""
    with contextlib.suppress(ImportError, OSError):  # the latter: more than this user may have
        import fcntl

        if hasattr(fcntl, "F_SETPIPE_SZ") and stat.S_ISFIFO(os.fstat(fd).st_mode):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, max(size, fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)))


def peak_memory() -> int:
    """Bytes of memory that this process had at most; 0 where the system does not say."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def private_memory() -> int:
    """Bytes of memory that are this process' own, code and files that it maps left out; 0 where the system hides it."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", "rb") as file:
        _, resident, shared = map(int, file.read().split()[:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    return 0


def pages(size: int) -> mmap.mmap:
    """`size` zeros in pages of their own, which go back to the system as soon as nobody refers to them.

    What `malloc` gets back it may keep: threads that take turns with buffers of many sizes leave holes behind.
    """
    own = {} if WINDOWS else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return mmap.mmap(-1, size, **own)


@functools.cache
def _of_linux(name: str, *types: str) -> Any:
    """A function of its C library, and the types of its arguments as ctypes names them; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    function = getattr(ctypes.CDLL(None), name, None)
    if function:
        function.argtypes = [getattr(ctypes, t) for t in types]
    return function


def trim() -> None:
    """Have `malloc` give the system back what it keeps for later, where it can be asked to (glibc)."""
    if function := _of_linux("malloc_trim", "c_size_t"):
        function(0)


def start_writing(fd: int) -> None:
    """Have the disk begin to write what a file holds, where the system can be asked to; `os.fsync` waits for it."""
    if function := _of_linux("sync_file_range", "c_int", "c_int64", "c_int64", "c_uint"):
        function(fd, 0, 0, 2)  # SYNC_FILE_RANGE_WRITE; what fails here fails in fsync too
