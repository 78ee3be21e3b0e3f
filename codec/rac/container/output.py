"""What may be written over: regular files alone, under another name until they are whole."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import BinaryIO

from rac.container.access import guarded
from rac.errors import OutputError
from rac.system import UNFOLLOWED

PART = ".part"  # ending of a file that is not whole yet
_KINDS = {stat.S_IFCHR: "character device", stat.S_IFBLK: "block device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def destination(path: str | os.PathLike[str], force: bool = False) -> str:
    """The path of the file that will be written: `path`, or what it names where it is a symbolic link, which stays.

    OutputError where something is there: anything without `force`, anything but a regular file with it.
    """
    name = os.fspath(path)
    mode = stat.S_IFREG
    with guarded(OutputError, name), contextlib.suppress(FileNotFoundError):  # or a link to nothing
        mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        raise OutputError("is a directory; name a file", file=name)
    if what := _KINDS.get(stat.S_IFMT(mode)):
        raise OutputError(f"is a {what}, which is never replaced", file=name)
    if not force and os.path.lexists(name):
        raise OutputError("exists already; give --force to replace it", file=name)
    return os.path.realpath(name) if os.path.islink(name) else name


def part(path: str) -> BinaryIO:
    """The file `path` + PART, open for reading and writing from its start; OutputError for what is no regular file."""
    name = path + PART
    with guarded(OutputError, name):
        fd = os.open(name, os.O_RDWR | os.O_CREAT | UNFOLLOWED, 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OutputError("is no regular file", file=name)
        return open(fd, "r+b")


def write_whole(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a small file, which replaces one that is there when it is whole; devices and pipes are written into."""
    name, data = os.fspath(path), data.encode() if isinstance(data, str) else data
    with guarded(OutputError, name):
        if os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name):
            with open(name, "wb", buffering=0) as f:
                f.write(data)
            return
        name = destination(name, force=True)
        with part(name) as f:
            try:
                f.truncate(0)
                f.write(data)
                f.close()  # Windows renames nothing that is open
                os.replace(name + PART, name)
            except BaseException:
                with contextlib.suppress(OSError):
                    f.close()
                    os.unlink(name + PART)
                raise
