"""What can only be read forward, kept in an unnamed file while it is read at random."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from rac.container import wire
from rac.container.access import InFile, NoRangesError, ObjectAccess, guarded
from rac.container.feed import PIECE
from rac.container.forward import Walk
from rac.container.reader import Archive
from rac.decode.archive import access_of, open_archives
from rac.decode.engine import RING
from rac.decode.stream import open_feed
from rac.errors import OutputError, SourceError
from rac.records import Limits


@contextlib.contextmanager
def at_random(src: Any, beside: str) -> Iterator[list[Archive]]:
    """The archives of a source: a path, a URL, bytes, a file object, "-" for standard input; or archives.

    A stream is copied to a file without a name in the folder of `beside` first. OutputError where that is full.
    """
    with contextlib.ExitStack() as stack:
        yield _archives(src, beside, stack)


def _archives(src: Any, beside: str, stack: contextlib.ExitStack) -> list[Archive]:
    if isinstance(src, list):
        return src
    if isinstance(src, str | os.PathLike):
        with contextlib.suppress(NoRangesError):
            if os.fspath(src) != "-":
                return open_archives(src)
        src = sys.stdin.buffer if os.fspath(src) == "-" else src
    if not isinstance(src, str | os.PathLike):
        with contextlib.suppress(SourceError):  # a stream, or closed
            return [Archive(access_of(src))]
    feed, close = open_feed(src, RING // 2)
    stack.callback(close)
    stack.callback(feed.close)
    folder = os.path.dirname(os.path.abspath(beside))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    walk = Walk(feed, feed.name, Limits())
    start = walk.read(wire.PRELUDE, short=True)
    with InFile(feed.name):
        wire.parse_prelude(start, walk.limits)  # before a disk is filled with what is no archive
    with guarded(OutputError, beside):
        file = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 - the stack closes it
        file.write(start)
    while piece := walk.read(PIECE, short=True):
        with guarded(OutputError, beside):
            file.write(piece)
    return [Archive(ObjectAccess(file, feed.name))]
