"""Weights as floats of four bits, two in a byte, with a scale for each 16 or 32: MXFP4 and NVFP4."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rac.dequantise.found import F32, Blocks, Logical, Scope, Stored, band, blocks_of, numbers

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # E2M1
_VALUES = np.concatenate([_VALUES, -_VALUES])
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], 1)  # the low half of a byte comes first


@dataclass(frozen=True, slots=True)
class _Second:
    """A second scale, of a whole matrix or of each expert."""

    scale: Stored
    blocks: Blocks
    divides: bool  # as compressed-tensors has it; modelopt's multiplies


@dataclass(frozen=True, slots=True)
class _Scaled:
    """Pairs of codes in bytes times their scales."""

    codes: Stored
    cols: int  # numbers of a row
    scale: Stored
    blocks: Blocks
    second: _Second | None = None

    def __call__(self, a: int, b: int) -> F32:
        out: F32 = _PAIRS[band(self.codes, a, b, self.cols // 2)].reshape(b - a, self.cols)
        scale = self.blocks.spread(numbers(self.scale, powers=True), a, b, self.cols)
        if self.second is not None:
            more = self.second.blocks.spread(numbers(self.second.scale), a, b, self.cols)
            scale = scale / more if self.second.divides else scale * more
        out *= scale
        return out


@dataclass(frozen=True, slots=True)
class _Experts:
    """Experts (E, R, G, B) of blocks of pairs, with scales (E, R, G), as the matrices (E, 2 G B, R) of GPT-OSS."""

    codes: Stored
    scale: Stored

    def __call__(self, a: int, b: int) -> F32:
        _, rows, groups, width = self.codes.shape
        inner, out = 2 * groups * width, np.empty((b - a, rows), np.float32)
        for e in range(a // inner, -(-b // inner)):
            low, high = max(a, e * inner), min(b, (e + 1) * inner)
            i, j = low - e * inner, high - e * inner
            raw = band(self.codes, e * rows, (e + 1) * rows, groups * width)[:, i // 2 : -(-j // 2)]
            values = _PAIRS[raw].reshape(rows, -1)[:, i % 2 : i % 2 + j - i]
            size = rows * groups
            scales = self.scale.read(e * size, (e + 1) * size).reshape(rows, groups)
            exponents = np.where(scales == 255, 128, scales.astype(np.int16) - 127)[:, np.arange(i, j) // (2 * width)]
            out[low - a : high - a] = np.ldexp(values, exponents).T
        return out


def blocks(scope: Scope) -> Iterator[Logical]:
    """Experts as `*_blocks` and `*_scales`: MXFP4 as OpenAI's models have it."""
    for name, t in scope.left():
        base = name.removesuffix("_blocks")
        if base == name or t.dtype != "U8" or len(t.shape) != 4:
            continue
        scale = scope.need("scale", name, f"{base}_scales")
        if scope.tensors[scale].shape != t.shape[:-1] or scope.tensors[scale].dtype not in ("U8", "F8_E8M0"):
            raise scope.wrong(
                name, f"does not fit the shape {list(scope.tensors[scale].shape)} of its scales {scale!r}"
            )
        experts, rows, groups, width = t.shape
        shape = (experts, 2 * groups * width, rows)
        yield Logical(base, shape, _Experts(t, scope.tensors[scale]), (name, scale), "MXFP4 blocks of experts")


def pairs(scope: Scope) -> Iterator[Logical]:
    """Matrices of pairs: `weight_packed`, or `weight` of U8, I8 or F4, with scales of F8_E4M3 or of exponents."""
    for name, t in scope.left():
        packed = name.endswith(".weight_packed") and t.dtype == "U8"
        base = name.removesuffix("_packed") if packed else name
        scale = scope.first(f"{base}_scale", f"{base.removesuffix('.weight')}.scale")
        kind = scope.tensors[scale].dtype if scale else ""
        kinds = {"U8": ("F8_E4M3", "F8_E8M0", "U8"), "I8": ("F8_E8M0",), "F4": ("F8_E4M3", "F8_E8M0", "U8")}
        if len(t.shape) < 2 or not t.nbytes or not (packed or kind in kinds.get(t.dtype, ())):
            continue
        if scale is None:
            scale = scope.need("scale", name, f"{base}_scale")
        shape = t.shape if t.dtype == "F4" else (*t.shape[:-1], 2 * t.shape[-1])
        group = blocks_of(scope, name, shape, scale)
        parts, second = [name, scale], None
        if one := scope.first(f"{base}_global_scale", f"{base}_scale_2"):
            parts.append(one)
            many = blocks_of(scope, name, shape, one)
            second = _Second(scope.tensors[one], many, one.endswith("_global_scale"))
        rows = _Scaled(t, shape[-1], scope.tensors[scale], group, second)
        what = "NVFP4" if kind == "F8_E4M3" else "MXFP4"
        yield Logical(base, shape, rows, tuple(parts), f"{what} with a scale for each {group.wide}")
