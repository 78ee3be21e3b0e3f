"""Weights as small integers in 32-bit words: GPTQ, AWQ, and compressed-tensors' packed ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.dequantise.found import F32, Blocks, Logical, Scope, Stored, band, blocks_of, numbers, whole

_WORDS = ("I32", "U32")
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where AWQ keeps each of eight columns


def unpacked(raw: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Integers (n, 8 bytes / bits) of rows (n, bytes), which are packed from the lowest bit on."""
    if bits == 8:
        return raw
    out: NDArray[np.uint8]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        out = (raw[:, :, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)
        return out
    every = np.unpackbits(raw, axis=1, bitorder="little")
    every = every[:, : every.shape[1] // bits * bits].reshape(len(raw), -1, bits)
    out = (every << np.arange(bits, dtype=np.uint8)).sum(2, dtype=np.uint8)
    return out


def _turned(t: Stored, a: int, b: int) -> NDArray[np.uint8]:
    """Columns [a, b) of a matrix of words as rows of bytes."""
    words = whole(t).view("<u4").reshape(t.shape)[:, a:b]
    return np.ascontiguousarray(words.T).view(np.uint8)


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Scales and zero points (groups, out) of a matrix (in, out), and the group of each input."""

    scale: Stored
    zero: Stored | None
    groups: Stored | None  # of each input
    size: int  # inputs of a group where that is not stored
    inputs: int
    bits: int
    more: int = 0  # what is added to zero points

    def spread(self, a: int, b: int) -> tuple[F32, F32]:
        """(zero points, scales), (b - a, in) each, of the outputs [a, b)."""
        count, outputs = self.scale.shape
        if self.groups is None:
            at: Any = np.arange(self.inputs) // self.size
        else:
            at = whole(self.groups).view("<i4") % count
        scale = numbers(self.scale).reshape(count, outputs)[:, a:b].T[:, at]
        if self.zero is None:
            return np.full((1, 1), 1 << self.bits - 1, np.float32), scale
        zero = self.zeros(count)[:, a:b] + np.uint8(self.more) & np.uint8((1 << self.bits) - 1)
        return zero.T[:, at].astype(np.float32), scale

    def zeros(self, count: int) -> NDArray[np.uint8]:
        """(groups, out) zero points."""
        assert self.zero is not None  # noqa: S101
        return unpacked(whole(self.zero).reshape(count, -1), self.bits)


@dataclass(frozen=True, slots=True)
class _Gptq:
    """Words that are packed along the inputs."""

    codes: Stored
    grouped: _Grouped

    def __call__(self, a: int, b: int) -> F32:
        zero, scale = self.grouped.spread(a, b)
        out = unpacked(_turned(self.codes, a, b), self.grouped.bits)[:, : self.grouped.inputs].astype(np.float32)
        return (out - zero) * scale


class _Places(_Grouped):
    """Zero points in the order of AWQ."""

    __slots__ = ()

    def zeros(self, count: int) -> NDArray[np.uint8]:
        """(groups, out) zero points."""
        found = _Grouped.zeros(self, count)
        return found.reshape(count, -1, 8)[:, :, _PLACES].reshape(count, -1)


@dataclass(frozen=True, slots=True)
class _Awq:
    """Words that are packed along the outputs, eight in an order of their own."""

    codes: Stored
    grouped: _Grouped

    def __call__(self, a: int, b: int) -> F32:
        zero, scale = self.grouped.spread(a, b)
        first = a // 8
        words = whole(self.codes).view("<u4").reshape(self.codes.shape)[:, first : -(-b // 8)]
        halves = unpacked(np.ascontiguousarray(words).view(np.uint8), 4).reshape(len(words), -1, 8)[:, :, _PLACES]
        out = halves.reshape(len(words), -1)[:, a - 8 * first : b - 8 * first].T
        return (out.astype(np.float32) - zero) * scale


def words(scope: Scope) -> Iterator[Logical]:
    """Matrices as `qweight`, `qzeros` and `scales`: those of GPTQ, which may have `g_idx`, and of AWQ."""
    for name, t in scope.left():
        base = name.removesuffix("qweight")
        if base == name or t.dtype not in _WORDS or len(t.shape) != 2:
            continue
        scale = scope.tensors[scope.need("scale", name, f"{base}scales")]
        zero = scope.tensors.get(f"{base}qzeros")
        index = scope.tensors.get(f"{base}g_idx")
        parts = (name, *(n for p in ("scales", "qzeros", "g_idx") if (n := f"{base}{p}") in scope.tensors))
        if len(scale.shape) != 2 or (zero is not None and (zero.dtype not in _WORDS or len(zero.shape) != 2)):
            raise scope.wrong(name, "does not fit the shapes of its scales and zero points")
        groups, outputs = scale.shape
        if not groups or not outputs:
            raise scope.wrong(name, "has no scales")
        turned = t.shape[1] != outputs  # packed along the outputs
        if turned or zero is not None:
            of = t if turned else zero
            bits, odd = divmod(32 * of.shape[1], outputs) if of is not None else (0, 1)
        else:
            said = scope.stated.get("bits", 4)
            bits, odd = (said, 0) if type(said) is int else (0, 1)
        inputs = t.shape[0] if turned else t.shape[0] * 32 // max(1, bits)
        fits = zero is None or (zero.shape[0] == groups and 32 * zero.shape[1] == bits * outputs)
        fits = fits and (index is None or (index.dtype == "I32" and index.shape == (inputs,)))
        if odd or not 2 <= bits <= 8 or not fits or inputs < groups or (turned and bits != 4):
            raise scope.wrong(name, "does not fit the shapes of its scales and zero points")
        size = scope.stated.get("group_size")
        if type(size) is not int or size < 1 or -(-inputs // size) != groups:
            size = -(-inputs // groups)
        if turned:
            rows: Any = _Awq(t, _Places(scale, zero, index, size, inputs, bits))
        else:
            more = 0 if scope.stated.get("checkpoint_format") == "gptq_v2" else 1
            rows = _Gptq(t, _Grouped(scale, zero, index, size, inputs, bits, more))
        what = f"{'AWQ' if turned else 'GPTQ'} of {bits} bits in groups of {size}"
        yield Logical(f"{base}weight", (outputs, inputs), rows, parts, what)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Words that are packed along the inputs of a matrix (out, in)."""

    codes: Stored
    cols: int
    bits: int
    scale: Stored
    blocks: Blocks
    zero: Stored | None
    index: Stored | None  # group of each input

    def __call__(self, a: int, b: int) -> F32:
        out = unpacked(band(self.codes, a, b, 4 * self.codes.shape[-1]), self.bits)[:, : self.cols].astype(np.float32)
        if self.zero is None:
            out -= 1 << self.bits - 1
        else:  # packed along the outputs
            found = unpacked(_turned(self.zero, 0, self.zero.shape[1]), self.bits).T
            out -= self._spread(found.astype(np.float32).reshape(-1), a, b)
        out *= self._spread(numbers(self.scale), a, b)
        return out

    def _spread(self, found: F32, a: int, b: int) -> F32:
        at = None if self.index is None else whole(self.index).view("<i4")
        if at is None or self.blocks.scale_cols == 1 or at.min() < 0:  # -1: groups are in order
            return self.blocks.spread(found, a, b, self.cols)
        return found.reshape(-1, self.blocks.scale_cols)[a:b, at % self.blocks.scale_cols]


def packed(scope: Scope) -> Iterator[Logical]:
    """Matrices as `weight_packed` of words, `weight_scale`, `weight_shape`, perhaps with zero points and groups."""
    for name, t in scope.left():
        base = name.removesuffix("_packed")
        if base == name or t.dtype not in _WORDS or len(t.shape) != 2:
            continue
        scale = scope.need("scale", name, f"{base}_scale")
        shape = scope.tensors[scope.need("shape", name, f"{base}_shape")]
        stated = [*map(int, numbers(shape))] if shape.dtype in ("I64", "I32") and shape.nbytes <= 16 else []
        if len(stated) != 2 or stated[0] != t.shape[0] or not 0 < stated[1] <= 32 * t.shape[1]:
            raise scope.wrong(name, f"does not fit its stated shape {stated}")
        # as many bits as fit, where the configuration does not say: words are filled
        bits = next((b for b in (8, 7, 6, 5, 4, 3, 2, 1) if -(-stated[1] * b // 32) == t.shape[1]), 0)
        zero, index = scope.tensors.get(f"{base}_zero_point"), scope.tensors.get(f"{base}_g_idx")
        parts = (name, *(n for p in ("scale", "shape", "zero_point", "g_idx") if (n := f"{base}_{p}") in scope.tensors))
        blocks = blocks_of(scope, name, stated, scale)
        fits = zero is None or (zero.dtype in _WORDS and len(zero.shape) == 2 and zero.shape[1] == blocks.scale_cols)
        fits = fits and (zero is None or 32 * zero.shape[0] >= bits * stated[0])
        if not bits or not fits or (index is not None and (index.dtype != "I32" or index.shape != (stated[1],))):
            raise scope.wrong(name, "does not fit the shapes of its zero points and groups")
        rows = _Packed(t, stated[1], bits, scope.tensors[scale], blocks, zero, index)
        yield Logical(base, (stated[0], stated[1]), rows, parts, f"{bits}-bit integers with scales of {blocks.wide}")
