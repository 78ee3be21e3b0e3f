"""The libraries of C kernels: finding them, the choice of an instruction set, and what is checked before a call.

The same C sources are compiled once for each instruction set (setup.py), and one library is in use: the fastest that
the processor runs, or the one that the environment names: RAC_CPU=generic, avx2, avx512 or neon. Whatever set, the
bytes are the same. ctypes releases the GIL, so threads that decode different tiles run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rac.errors import RacError, UnsupportedError
from rac.native.prototypes import BRIEF, FUNCTIONS, layout

CPUS = {"generic": "C", "avx2": "C, AVX2", "avx512": "C, AVX-512", "neon": "C, NEON"}
"""Each instruction set, slowest first within an architecture, and what `kernel` calls it; bits of rac_cpu."""
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")  # as setup.py names them
AGAIN = "install rac-codec again, from a wheel for this machine or with a C compiler"
_FOLDER = Path(__file__).parent


class Library:
    """The functions of one library, by name, with their types."""

    def __init__(self, path: Path) -> None:
        """Load a library; RacError where it is not of this version, OSError where it is none of this machine."""
        self.path, self.cpu = path, path.stem.removeprefix("_")
        free, brief = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        ours = layout()
        try:
            theirs = (ctypes.c_int64 * len(ours)).in_dll(free, "rac_layout")
            for (name, number), found in zip(ours, theirs, strict=True):
                if number != found:
                    raise RacError(f"{path.name} is not of this version of rac ({name}); {AGAIN}", file=str(path))
            for name, (result, *arguments) in FUNCTIONS.items():
                function = getattr(brief if name in BRIEF else free, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        except (ValueError, AttributeError) as e:  # it has no such name
            raise RacError(f"{path.name} is no library of this version of rac ({e}); {AGAIN}", file=str(path)) from e

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no kernel is called {name}; see rac.native.prototypes")


def _path(cpu: str) -> Path:
    return _FOLDER / f"_{cpu}{SUFFIX}"


def _check_end(path: Path) -> None:
    """OSError where a library of Linux ends early: what is missing would be touched, which ends the process."""
    with path.open("rb") as file:
        head, size = file.read(64), os.fstat(file.fileno()).st_size
    if head.startswith(b"\x7fELF\x02\x01") and len(head) == 64:  # 64 bits; its table of sections lies last
        table, each, count = struct.unpack_from("<Q10x2H", head, 40)
        if size < table + each * count:
            raise OSError(f"{path}: ends after {size} of {table + each * count} bytes")


@functools.cache
def _found(cpu: str) -> tuple[Library | None, str]:
    """The library of an instruction set, or None and what is wrong with the file that is there, if any is."""
    try:
        if _path(cpu).exists():
            _check_end(_path(cpu))
            return Library(_path(cpu)), ""
    except OSError as e:  # of another machine, half-written
        return None, str(e) or type(e).__name__
    return None, ""


def _load(cpu: str) -> Library | None:
    """The library of an instruction set, None where there is none for this platform; the machine must have the set."""
    return _found(cpu)[0]


@functools.cache
def _has() -> tuple[str, ...]:
    """The instruction sets of this machine, slowest first; none where there is no library to ask."""
    base = _load("generic")
    return tuple(cpu for i, cpu in enumerate(CPUS) if base and base.rac_cpu() >> i & 1)


@functools.cache
def cpus() -> tuple[str, ...]:
    """The instruction sets that this machine has and that kernels were built for, slowest first."""
    return tuple(cpu for cpu in _has() if _load(cpu))


@functools.cache
def twin() -> str:
    """What decodes lanes without the C kernels: "numba" where it is installed, or "numpy"."""
    return "numba" if importlib.util.find_spec("numba") else "numpy"


def lost() -> str:
    """Why no C kernels run here, and how to get them; on one line."""
    why, others = "were not built", sorted(p.name for p in _FOLDER.glob("_generic.*"))
    if os.environ.get("RAC_NO_NATIVE"):
        return "the C kernels are switched off by RAC_NO_NATIVE"
    if damage := _found("generic")[1]:
        why = f"do not load on this machine ({damage})"
    elif others:
        why = f"beside rac are those of another platform or version ({others[0]})"
    return f"the C kernels {why}; to get them, {AGAIN}"


@functools.cache
def _chosen() -> Library | None:
    if os.environ.get("RAC_NO_NATIVE"):
        return None
    wanted = os.environ.get("RAC_CPU")
    if wanted:
        if wanted not in CPUS:
            raise UnsupportedError(f"RAC_CPU is {wanted!r}, not one of {', '.join(CPUS)}")
        if not _has():
            raise UnsupportedError(f"RAC_CPU is {wanted!r}, but {lost()}")
        if wanted not in _has():
            raise UnsupportedError(f"RAC_CPU is {wanted!r}, which this processor lacks; it has {', '.join(_has())}")
        found, damage = _found(wanted)
        if found is None:
            why = f"whose kernels do not load ({damage})" if damage else "for which no kernels are here"
            raise UnsupportedError(f"RAC_CPU is {wanted!r}, {why}; {AGAIN}")
        return found
    for cpu in reversed(_has()):
        found, damage = _found(cpu)
        if found:
            return found
        if damage:
            text = f"rac: the kernels for {cpu} do not load ({damage}), and slower ones run; to get them, {AGAIN}"
            warnings.warn(text, stacklevel=3)
    slower = {"numba": "several times", "numpy": "hundreds of times"}[twin()]
    text = f"rac: {lost()}. Until then {twin()} decodes, {slower} slower, and nothing can be packed with loss"
    warnings.warn(text, stacklevel=3)
    return None


_instead: list[Library | None] = []


def library() -> Library | None:
    """The library in use; None, with one warning, where there is none, and without where RAC_NO_NATIVE is set."""
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
    """Name of the kernels in use: "C" and the instruction set, or "numba" or "numpy" in their place."""
    lib = library()
    return CPUS.get(lib.cpu, lib.cpu) if lib else twin()
