"""Stages lowrank/1 and basis/1, stages/lowrank.md and stages/basis.md."""

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .structure import Map

Floats = NDArray[np.float32]
Elements = NDArray[np.unsignedinteger]
Shape = tuple[int, ...]
NAN = {"F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}  # lowrank.md section 4


def check(stage: Map, shapes: list[Shape], rows: int, cols: int) -> None:
    """The shapes of the objects of a tensor of rows x cols."""
    if stage["id"] == "lowrank/1":
        a, b = shapes
        r = b[0]
        if a != (rows, r) or b != (r, cols):
            raise FormatError("RAC-LOW-002: shapes of the objects")
        if r > min(rows, cols):
            raise FormatError("RAC-LOW-003: rank")
    elif shapes != [(cols, cols)]:
        raise FormatError("RAC-BAS-002: shape of the object")


def decode(stage: Map, v: Floats, objects: list[Floats], dtype: str) -> Elements:
    """The elements of a tensor, given V. numpy rounds each product and each sum, in the order of the loops."""
    with np.errstate(all="ignore"):
        if stage["id"] == "lowrank/1":
            a, b = objects
            t = v
        else:
            a, b = v, objects[0]
            t = np.zeros_like(v)
        for k in range(b.shape[0]):
            t = t + np.multiply.outer(a[:, k], b[k])
        return rounded(t, dtype)


def rounded(t: Floats, dtype: str) -> Elements:
    """lowrank.md section 4."""
    nan = np.isnan(t)
    bits: Elements = np.where(nan, np.float32(0), t).view(np.uint32)
    if dtype == "F16":
        bits = bits.view(np.float32).astype(np.float16).view(np.uint16)
    elif dtype == "BF16":  # exponents and order are those of binary32; the largest numbers go up to infinity
        kept, rest = bits >> 16, bits & 0xFFFF
        bits = (kept + ((rest > 0x8000) | ((rest == 0x8000) & (kept % 2 == 1)))).astype(np.uint16)
    bits[nan] = NAN[dtype]
    return bits
