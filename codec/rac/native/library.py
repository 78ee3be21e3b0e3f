"""The libraries of C kernels: finding them, the choice of an instruction set, and what is checked before a call.

The same C sources are compiled once for each instruction set (setup.py), and one library is in use: the fastest that
the processor runs, or the one that the environment names, RAC_CPU=generic, avx2 or avx512. Whatever set, the bytes are
the same. ctypes releases the GIL, so threads that decode different tiles run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rac.errors import RacError, UnsupportedError
from rac.native.prototypes import BRIEF, FUNCTIONS, layout

CPUS = {"generic": "C", "avx2": "C, AVX2", "avx512": "C, AVX-512"}
"""Each instruction set, slowest first, and what `kernel` calls it."""


class Library:
    """The functions of one library, by name, with their types."""

    def __init__(self, path: Path) -> None:
        """Load a library; RacError where it is not of this version, OSError where it is none of this machine."""
        self.path = path
        free, brief = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        ours = layout()
        theirs = (ctypes.c_int64 * len(ours)).in_dll(free, "rac_layout")
        for (name, number), found in zip(ours, theirs, strict=True):
            if number != found:
                raise RacError(f"{path.name} is not of this version of rac ({name}): install it again")
        for name, (result, *arguments) in FUNCTIONS.items():
            function = getattr(brief if name in BRIEF else free, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no kernel is called {name}; see rac.native.prototypes")


@functools.cache
def _load(cpu: str) -> Library | None:
    """The library of an instruction set, None where it was not built; the machine must have the set."""
    for path in sorted(Path(__file__).parent.glob(f"_{cpu}.*")):
        with suppress(OSError):  # of another machine
            return Library(path)
    return None


@functools.cache
def cpus() -> tuple[str, ...]:
    """The instruction sets that this machine has and that kernels were built for, slowest first."""
    if (base := _load("generic")) is None:
        return ()
    return tuple(cpu for i, cpu in enumerate(CPUS) if i <= base.rac_cpu() and _load(cpu))


@functools.cache
def _chosen() -> Library | None:
    if os.environ.get("RAC_NO_NATIVE"):
        return None
    wanted = os.environ.get("RAC_CPU")
    if wanted and wanted not in cpus():
        if wanted not in CPUS:
            raise UnsupportedError(f"RAC_CPU is {wanted!r}, not one of {', '.join(CPUS)}")
        raise UnsupportedError(f"RAC_CPU is {wanted!r}, which this processor lacks, or no kernels were built for it")
    if not cpus():
        warnings.warn("rac: the C kernel was not built; decoding runs in numba, several times slower", stacklevel=3)
        return None
    return _load(wanted or cpus()[-1])


_instead: list[Library | None] = []


def library() -> Library | None:
    """The library in use; None, with one warning, where none was built, and without where RAC_NO_NATIVE is set."""
    return _instead[-1] if _instead else _chosen()


def available() -> bool:
    """Whether the C kernels are in use, and not their twins in numba and numpy."""
    return library() is not None


@contextmanager
def using(cpu: str | None) -> Iterator[None]:
    """Kernels of another of `cpus()`, or their twins (None), in all threads until the end of the block; for tests."""
    if cpu is not None and cpu not in cpus():
        raise UnsupportedError(f"there are no kernels for {cpu}, only for {cpus()}")
    _instead.append(_load(cpu) if cpu else None)
    try:
        yield
    finally:
        _instead.pop()


def kernel() -> str:
    """Name of the kernels in use: "C" and the instruction set, or "numba"."""
    lib = library()
    return next((name for cpu, name in CPUS.items() if lib and lib is _load(cpu)), "numba")
