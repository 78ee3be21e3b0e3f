"""Products of torch tensors with weights of int8 codes or BF16 words on a CPU, by the kernels of rac.native.coded.

A layer calls them without torch's dispatcher, which costs as much as a small product; where torch.compile traces, they
are `torch.ops.rac.multiply`.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from rac.native import coded

_OPENMP = re.compile(r"/lib(gomp|iomp|omp)[^/]*\.so[^/]*$")
_team: tuple[int, coded.Team | None] = 1, None


def team() -> coded.Team | None:
    """The threads that help, as many as torch has besides the caller's; None where that has one."""
    global _team
    found, threads = _team, torch.get_num_threads()
    if found[0] != threads:
        found = _team = threads, coded.Team(threads - 1, _parallel()) if threads > 1 else None
    return found[1]


def _parallel() -> int:
    """The address of GOMP_parallel in the run time of OpenMP that torch has loaded; 0 where none is seen."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return 0
    for path in sorted({line.split(maxsplit=5)[-1] for line in maps.splitlines() if _OPENMP.search(line)}):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def weight_of(codes: torch.Tensor, beside: Sequence[torch.Tensor], kind: int) -> coded.Weight:
    """A weight in the memory of these tensors.

    `codes` are (out, in) int8, `beside` scales of rows and columns, places, values, those of numbers as int32 of the
    same bits (rac.native.coded.Weight); or int16 words of BF16, and nothing beside them.
    """
    arrays = [t.numpy() for t in (codes, *beside)]
    found = [a if a.dtype.itemsize != 4 else a.view("<f4") for a in arrays[1:]]
    return coded.Weight(coded.Kind(kind), arrays[0], *found)


def multiply(x: torch.Tensor, weight: coded.Weight, alone: bool = False) -> torch.Tensor:
    """(..., in) to (..., out) float32; no gradient is kept. `alone`: by no other thread."""
    out, width = weight.shape
    shape = list(x.shape)
    if not x.is_cpu or shape.pop() != width:
        raise RuntimeError(f"the input is {list(x.shape)} on {x.device}; the weight is {list(weight.shape)} on the CPU")
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.detach().float().contiguous()
    y = torch.empty([*shape, out], dtype=torch.float32)
    coded.multiply_at(weight, x.data_ptr(), math.prod(shape), y.data_ptr(), None if alone else team())
    return y


@torch.library.custom_op("rac::multiply", mutates_args=(), device_types="cpu")
def _multiply(x: torch.Tensor, codes: torch.Tensor, beside: Sequence[torch.Tensor], kind: int) -> torch.Tensor:
    return multiply(x, weight_of(codes, beside, kind))


@_multiply.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, beside: Sequence[torch.Tensor], kind: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.float32)
