"""Arrays with memory at their ends that nobody may touch: a kernel that reads or writes there ends the process."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def fenced(array: NDArray[Any], before: bool = False) -> NDArray[Any]:
    """A copy of an array whose last byte (`before`: whose first) is next to a page that is nobody's."""
    size = -(-max(array.nbytes, 1) // _PAGE) * _PAGE
    memory = mmap.mmap(-1, size + _PAGE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fence = at if before else at + size
    assert not _libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(_PAGE), 0), "no fence here"
    start = _PAGE if before else size - array.nbytes
    out = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    out[...] = array
    weakref.finalize(out, _libc.mprotect, ctypes.c_void_p(fence), ctypes.c_size_t(_PAGE), 3)
    return out
