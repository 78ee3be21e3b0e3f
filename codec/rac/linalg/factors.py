"""Triangular recursions that were found, in files, so that each input's is found once in a pack.

A factor takes n^3 / 3 operations, from widths of some thousands on more than all else that is done to a matrix. Query,
key and value share one; the recipe, the sample and each pass ask for it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from rac.linalg.saved import load
from rac.linalg.triangular import Triangular
from rac.scratch import Scratch

SMALLEST = 256  # inputs below which a factor is found as fast as it is read
FREE = 2  # one part in so many of the disk's free bytes is left free


class Factors:
    """A folder of recursions by a text that says what they are of; it goes away with this object.

    Where the disk has no more room for one, it is found anew each time. It pickles: other processes find what is there.
    """

    def __init__(self, device: str = "cpu", folder: str | None = None, reserve: int = 0) -> None:
        """Open a folder, or make one, in which half of what is free may be used; what is found is found on a device."""
        self.device = device
        if folder is None:
            self._scratch = Scratch("factors")  # it goes away with this object
            folder = str(self._scratch.path)
            reserve = shutil.disk_usage(folder).free // FREE
        self._folder, self._reserve = folder, reserve
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __reduce__(self) -> tuple[type[Factors], tuple[str, str, int]]:
        return Factors, (self.device, self._folder, self._reserve)

    def get(self, key: str, find: Callable[[], Triangular]) -> Triangular:
        """The recursion under a key; `find` is asked where it is not there, by one thread at a time."""
        path = Path(self._folder, hashlib.sha256(key.encode()).hexdigest())
        with self._locks[path.name]:
            if (there := self._read(path)) is not None:
                return there
            found = find()
            if found.feed.shape[-1] >= SMALLEST:
                self._write(path, found)
        return found

    def _read(self, path: Path) -> Triangular | None:
        try:
            feed = load(path.with_suffix(".npy"), mmap_mode="r")
            order = load(path.with_suffix(".order.npy"))
            weight = load(path.with_suffix(".weight.npy"))
        except (OSError, ValueError, EOFError):  # not there, or lost: it can be found again
            return None
        return Triangular(order, weight, feed.swapaxes(-1, -2), self.device)

    def _write(self, path: Path, found: Triangular) -> None:
        if shutil.disk_usage(self._folder).free - found.feed.nbytes // 2 < self._reserve:
            return
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            for suffix, array in ((".order.npy", found.order), (".weight.npy", found.weight)):
                with open(part, "wb") as f:
                    np.save(f, array, allow_pickle=False)
                os.replace(part, path.with_suffix(suffix))
            with open(part, "wb") as f:
                _save_lower(f, found.feed.swapaxes(-1, -2))
            os.replace(part, path.with_suffix(".npy"))  # last: it says that all is there
        except OSError:  # no room: the next who asks finds it anew
            with contextlib.suppress(OSError):
                part.unlink()


def _save_lower(f: BinaryIO, array: NDArray[np.float32]) -> None:
    """Write an .npy file of matrices (..., n, n) that are 0 from the diagonal on: zeros are left out, as holes."""
    n = array.shape[-1]
    head = np.lib.format.header_data_from_array_1_0(array) | {"fortran_order": False}  # whatever it is in memory
    np.lib.format.write_array_header_1_0(f, head)
    for i, row in enumerate(array.reshape(-1, n)):
        f.write(np.ascontiguousarray(row[: i % n]).data)
        f.seek(row[i % n :].nbytes, os.SEEK_CUR)
    f.truncate()
