"""The GPU kernels, one row each: the job of a program, the memories it works on, how it is launched.

A new kernel is a row in `KERNELS` and a file of its name in `rac.gpu.kernels`, with the function of that name. It takes
the memories of its row, `jobs`, and two constants: `JOB`, the places of the fields, and `FORM`, its options.
"""

from __future__ import annotations

import functools
import importlib
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Jobs = NDArray[np.void]  # (n,) jobs of a kernel, of the dtype of its row
Options = Mapping[str, Any]  # constants that a kernel is compiled for, by the names that they have there
MEMORIES = ("units", "aux", "work", "out", "objects", "status", "source")
"""What a kernel may ask for: stored bytes of tiles, what the host lays out, what kernels leave for each other, tensors,
objects, a status of each tile, int32, and the one of these, which are else uint8, that a launch reads codes from."""
WARP = 32


def _parts(jobs: Jobs, options: Options) -> int:
    """A program for ROWS x COLS elements of each job."""
    return int((-(-jobs["h"] // options["ROWS"]) * -(-jobs["w"] // options["COLS"])).max())


def _columns(jobs: Jobs, options: Options) -> int:
    """A program for COLS columns of each job."""
    return int((-(-jobs["w"] // options["COLS"])).max())


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel, as the host knows it."""

    name: str
    options: str  # names of what it is compiled for, apart by spaces
    job: np.dtype[np.void]
    """Fields of a job, each int64 or several of them; offsets are in bytes from the memory that the kernel states."""
    memories: tuple[str, ...]  # some of `MEMORIES`, in the order of the kernel's parameters
    warps: Callable[[Options], int] = lambda options: 4  # warps of a program
    parts: Callable[[Jobs, Options], int] = lambda jobs, options: 1
    """Programs of a job, along the second axis of the grid."""
    whole: Callable[[Options], int] = lambda options: 1
    """Jobs of a program: the last one is done again, with the same result, to fill up."""
    longest: str = ""  # field by which jobs are sorted, largest first, so that those of a warp are alike

    def grid(self, jobs: Jobs, options: Options) -> tuple[int, int]:
        """Programs along both axes."""
        return len(jobs) // self.whole(options), self.parts(jobs, options)

    def settings(self, options: Options) -> dict[str, Any]:
        """How it is compiled. The format asks for products and sums that are rounded one by one."""
        return {"num_warps": self.warps(options), "enable_fp_fusion": False, "maxnreg": 40}


def _job(names: str, **several: int) -> np.dtype[np.void]:
    """A job of int64 fields, and of fields of several behind them."""
    return np.dtype([(n, np.int64) for n in names.split()] + [(n, np.int64, (k,)) for n, k in several.items()])


KERNELS = {
    spec.name: spec
    for spec in (
        KernelSpec("tables", "BLOCK", _job("starts codes table"), ("aux", "work"), lambda o: 8),
        KernelSpec(
            *("lanes", "LANES SPAN PER BLOCK ENTRIES"),
            _job("states words tables symbols pieces status rows first places escapes"),
            ("units", "aux", "work", "status"),
            lambda o: o["BLOCK"] // WARP,
            whole=lambda o: o["BLOCK"] // o["SPAN"],
            longest="rows",
        ),
        KernelSpec(
            *("place", "WORD SHIFT SIGN ZERO RAW CODED ROWS COLS"),
            _job("rows columns tops symbols words stride h w", planes=6),
            ("units", "aux", "work", "out"),
            parts=_parts,
        ),
        KernelSpec(
            *("escapes", "WORD PLACED BLOCK"),
            _job("symbols first bases bytes count limit status codes blocks n rows columns words stride shift places"),
            ("units", "aux", "work", "out", "status"),
            lambda o: 1,
        ),
        KernelSpec(
            *("trellis", "TO COLS PAIRS"),
            _job("rows columns entries column_scales row_scales codes numbers stride h w step"),
            ("source", "aux", "out"),
            lambda o: o["COLS"] // (2 * WARP),
            _columns,
        ),
        KernelSpec(
            *("outliers", "WORD BLOCK"),
            _job("place word"),
            ("out",),
            lambda o: o["BLOCK"] // WARP,
            whole=lambda o: o["BLOCK"],
        ),
        KernelSpec(
            *("groups", "TO PAIRS SAME ROWS COLS"),
            _job("codes code_stride entries lists group left numbers stride h w bits_status"),
            ("source", "aux", "out", "status"),
            parts=_parts,
        ),
        KernelSpec(
            *("product", "WORD HALF ADDED ROWS COLS"),
            _job("numbers number_stride a a_stride b b_stride terms words stride h w"),
            ("work", "objects", "out"),
            parts=_parts,
        ),
    )
}
"""Every kernel by its name, in the order in which those of a batch run."""


@functools.cache
def constants(name: str, options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The constants of a kernel: `JOB`, the place of each field among the numbers of a job and their `size`; `FORM`."""
    spec = KERNELS[name]
    places = {n: offset // 8 for n, (_, offset, *_) in (spec.job.fields or {}).items()}
    places["size"] = spec.job.itemsize // 8
    job, form = namedtuple("JOB", places), namedtuple("FORM", spec.options)  # type: ignore[misc]
    return {"JOB": job(**places), "FORM": form(**dict(options))}


@functools.cache
def kernel(name: str) -> Any:
    """The compiled function of a row; imports triton."""
    return getattr(importlib.import_module(f"rac.gpu.kernels.{name}"), name)
