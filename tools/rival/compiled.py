"""C beside the quantisers, compiled for this machine when it is first asked for."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLAGS = ("-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-std=gnu11")


@functools.cache
def library(name: str) -> Any:
    """The library made of `name`.c in this folder; it is kept in the folder for temporary files."""
    source = Path(__file__).with_name(f"{name}.c")
    digest = hashlib.sha256(source.read_bytes() + repr(FLAGS).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"rival-{os.getuid()}-{name}-{digest}.so"
    if not path.exists():
        made = path.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", *FLAGS, "-o", made, source, "-lm"], check=True)
        made.rename(path)
    return ctypes.CDLL(str(path))


def pointer(a: NDArray[Any]) -> ctypes.c_void_p:
    """Where the numbers of an array lie, one after the other."""
    assert a.flags.c_contiguous  # noqa: S101
    return ctypes.c_void_p(a.ctypes.data)


def feeds(second: NDArray[np.float64], block: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """How errors are fed back to blocks of columns that are quantised together, from the last block to the first.

    With S = L L^T and B the columns of a block, the target is W_B + E_after F[after, B], F = L[after, B] L[B, B]^-1,
    and the error that is left tr(E S E^T) = sum over B of |(target_B - W'_B) L[B, B]|^2. Returns F (n, n), 0 in and
    above the blocks, and L (n, n).
    """
    lower = np.asarray(np.linalg.cholesky(second), np.float64)
    feed: NDArray[np.float32] = np.zeros(lower.shape, np.float32)
    for a in range(0, len(lower), block):
        b = a + block
        feed[b:, a:b] = np.linalg.solve(lower[a:b, a:b].T, lower[b:, a:b].T).T
    return feed, lower
