"""Arrays in .npy files, read by several threads."""

from __future__ import annotations

import os
import threading
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_ONE = threading.Lock()  # `ast`, which reads the header, fails in two threads up to Python 3.11.7, 3.12.1 (gh-106905)


def load(path: str | os.PathLike[str], mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """The array of an .npy file, mapped read-only under `mmap_mode="r"`; objects are refused.

    Raises OSError, ValueError or EOFError where the file cannot be read or is no such file.
    """
    with _ONE:
        found: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    return found
