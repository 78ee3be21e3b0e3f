"""Temporary folders, which go away with who made them; those of killed processes go when the next one is made."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import tempfile
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from rac.system import lock

_OWNER = "owner"  # a file in each folder, locked as long as its process lives; it holds the name of the machine


class Scratch(AbstractContextManager["Scratch"]):
    """A new folder among the temporary ones of the system; gone with `close`, this object, or the process.

    What SIGKILL or a crash leaves is removed by the next process of the same user on the same machine that makes one:
    a lock says whether who made it still lives. A forked process removes nothing.
    """

    def __init__(self, kind: str) -> None:
        """Make `rac-KIND-...`; OSError where there is no place for it."""
        parent = tempfile.gettempdir()
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=f"rac-{kind}-", dir=parent))
        self.close = weakref.finalize(self, _remove, self.path, _owned(self.path), os.getpid())

    def __exit__(self, *_: object) -> None:
        """Remove the folder."""
        self.close()


def _owned(folder: Path) -> BinaryIO | None:
    """The locked file of a folder, under its name only when it is locked; None where the system knows no such locks."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        file = stack.enter_context((folder / f"{_OWNER}.part").open("xb", buffering=0))
        lock(file)
        file.write(platform.node().encode())
        (folder / f"{_OWNER}.part").rename(folder / _OWNER)  # Windows renames no open file: there nothing is swept
        stack.pop_all()
        return file
    return None


def _remove(folder: Path, owner: BinaryIO | None, maker: int) -> None:
    if owner is not None:
        owner.close()  # Windows removes no open file
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _sweep(parent: str) -> None:
    """Remove what processes have left that live no more, once for each process."""
    with contextlib.suppress(OSError), os.scandir(parent) as every:
        for entry in every:
            if entry.name.startswith("rac-") and entry.is_dir(follow_symlinks=False):
                _sweep_one(Path(entry.path))


def _sweep_one(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody's who lives, or another user's, or gone meanwhile
        if hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid():
            return
        with (folder / _OWNER).open("r+b", buffering=0) as owner:
            if owner.read() != platform.node().encode():  # locks may not be seen on other machines
                return
            lock(owner)
            shutil.rmtree(folder, ignore_errors=True)
