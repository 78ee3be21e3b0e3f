"""Weights as floats of eight bits with scales, and F64 as what can be quantised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rac.dequantise.found import (
    F32,
    SMALLEST,
    TABLES,
    Blocks,
    Logical,
    Scope,
    Stored,
    band,
    blocks_of,
    numbers,
    scale_names,
    sides,
)

_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")


@dataclass(frozen=True, slots=True)
class _Scaled:
    """Codes of one byte times their scales, less a zero point where there is one."""

    codes: Stored
    cols: int
    scale: Stored | None = None
    blocks: Blocks | None = None  # how it is shared
    zero: Stored | None = None
    factor: float = 1.0

    def __call__(self, a: int, b: int) -> F32:
        raw = band(self.codes, a, b, self.cols)
        out: F32 = (
            raw.view(np.int8).astype(np.float32) if self.codes.dtype == "I8" else TABLES[self.codes.dtype].take(raw)
        )
        if self.zero is not None and self.blocks is not None:
            out -= self.blocks.spread(numbers(self.zero), a, b, self.cols)
        if self.scale is not None and self.blocks is not None:
            out *= self.blocks.spread(numbers(self.scale, powers=True), a, b, self.cols)
        if self.factor != 1:
            out *= np.float32(self.factor)
        return out


def eight(scope: Scope) -> Iterator[Logical]:
    """Matrices of F8_E4M3, F8_E5M2 or I8, with a scale for all, for each row, or for each block.

    SourceError where a scale is missing. Eight-bit floats of a folder that knows no scales are the weights themselves.
    """
    stated = sides(scope.stated.get("weight_block_size")) or _grouped(scope.stated)
    for name, t in scope.left():
        if t.dtype not in _CODES or len(t.shape) < 2 or not t.nbytes:
            continue
        base = name.removesuffix(".weight")
        names = (*scale_names(name), f"{base}.SCB") if t.dtype == "I8" else scale_names(name)
        scale = scope.first(*names)
        if scale is None and (t.dtype == "I8" or not scope.scaled):
            if t.dtype == "I8":
                continue
            yield Logical(name, t.shape, _Scaled(t, t.shape[-1]), (name,), f"{t.dtype} without scales")
            continue
        scale = scope.need("scale", name, *names)
        blocks = blocks_of(scope, name, t.shape, scale, stated)
        zero = scope.tensors.get(f"{name}_zero_point")
        factor = 1 / 127 if scale.endswith(".SCB") else 1.0  # bitsandbytes: the largest magnitude of a row
        parts = [name, scale, *(n for n in (f"{name}_zero_point", f"{base}.weight_format") if n in scope.tensors)]
        rows = _Scaled(t, t.shape[-1], scope.tensors[scale], blocks, zero, factor)
        yield Logical(name, t.shape, rows, tuple(parts), f"{t.dtype} {_how(blocks, stated)}")


def _grouped(stated: Any) -> list[int]:
    """Rows and columns of a block, as compressed-tensors states them; none where it states no one size."""
    groups = stated.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            found = sides(weights.get("block_structure")) or sides([1, weights.get("group_size")])
            if found:
                return found
    return []


def _how(b: Blocks, stated: Sequence[int]) -> str:
    """How weights share scales, for people; small matrices have not a whole block."""
    if len(stated) == 2 and stated[1] > 1:
        return f"with a scale for each {stated[0]} x {stated[1]} block"
    if b.lead * b.scale_rows * b.scale_cols == 1:
        return "with one scale each"
    if b.scale_cols == 1 and b.high == 1:
        return "with a scale for each row"
    return f"with a scale for each {b.high} x {b.wide} block"


@dataclass(frozen=True, slots=True)
class _Wide:
    """F64 to the nearest F32."""

    source: Stored
    cols: int

    def __call__(self, a: int, b: int) -> F32:
        with np.errstate(over="ignore"):  # what becomes infinite is refused where it is quantised
            return band(self.source, a, b, self.cols, "f8").astype(np.float32)


def wide(scope: Scope) -> Iterator[Logical]:
    """Large matrices of F64, as F32."""
    for name, t in scope.left():
        if t.dtype == "F64" and len(t.shape) > 1 and math.prod(t.shape) >= SMALLEST:
            yield Logical(name, t.shape, _Wide(t, t.shape[-1]), (name,), "F64")
