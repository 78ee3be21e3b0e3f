"""Weights as indices of tables: NF4 and FP4 of bitsandbytes, and the blocks of GGUF files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rac.dequantise.found import F32, Logical, Scope, Stored, numbers, whole


@dataclass(frozen=True, slots=True)
class _Nested:
    """Largest magnitudes of blocks that are indices of a table themselves."""

    table: Stored
    most: Stored
    size: int  # blocks that share one
    offset: float


@dataclass(frozen=True, slots=True)
class _Indexed:
    """Indices of four bits, the high half of a byte first, times the largest magnitude of their block."""

    codes: Stored
    table: Stored
    most: Stored
    size: int  # weights that share one
    cols: int
    nested: _Nested | None

    def __call__(self, a: int, b: int) -> F32:
        start, stop = a * self.cols, b * self.cols
        raw = self.codes.read(start // 2, -(-stop // 2))
        halves = np.stack([raw >> 4, raw & 15], 1).reshape(-1)[start % 2 : start % 2 + stop - start]
        first, last = start // self.size, -(-stop // self.size)
        most = numbers(self.most)[first:last]
        if self.nested is not None:
            groups = np.arange(first, last) // self.nested.size
            most = numbers(self.nested.table)[most.astype(np.int64)] * numbers(self.nested.most)[groups]
            most = most + np.float32(self.nested.offset)
        out = numbers(self.table)[halves] * most[np.arange(start, stop) // self.size - first]
        return out.reshape(b - a, self.cols)


def indexed(scope: Scope) -> Iterator[Logical]:
    """Matrices with `absmax`, `quant_map` and a state: NF4 and FP4 of bitsandbytes."""
    for name, t in scope.left():
        states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
        if not scope.first(f"{name}.absmax", *states):
            continue
        state = scope.need("state", name, *states)
        most = scope.tensors[scope.need("scale", name, f"{name}.absmax")]
        table = scope.tensors[scope.need("table", name, f"{name}.quant_map")]
        said = _state(scope, state)
        shape, size = _shape(said.get("shape")), _count(said.get("blocksize"))
        weights = math.prod(shape)
        fits = len(shape) > 1 and 0 < math.prod(most.shape) * size >= weights and math.prod(table.shape) == 16
        parts, nested = [name, f"{name}.absmax", f"{name}.quant_map", state], None
        if most.dtype == "U8" and fits:
            second = [scope.need("scale", name, f"{name}.{p}") for p in ("nested_quant_map", "nested_absmax")]
            parts += second
            of, top = (scope.tensors[n] for n in second)
            nested = _Nested(of, top, _count(said.get("nested_blocksize")), _number(said.get("nested_offset")))
            fits = math.prod(of.shape) == 256 and math.prod(top.shape) * nested.size * size >= weights
        if t.dtype not in ("U8", "I8") or 2 * t.nbytes < weights or not fits:
            raise scope.wrong(name, f"does not fit the shape {list(shape)} and blocks of {size} that its state has")
        kind = state.rpartition("__")[2].upper()
        rows = _Indexed(t, table, most, size, shape[-1], nested)
        yield Logical(name, shape, rows, tuple(parts), f"bitsandbytes {kind} in blocks of {size}")


def _state(scope: Scope, name: str) -> dict[str, Any]:
    """The JSON object in a tensor of bytes."""
    try:
        if isinstance(said := json.loads(whole(scope.tensors[name]).tobytes().decode()), dict):
            return said
    except (ValueError, RecursionError) as e:
        raise scope.wrong(name, f"is no JSON: {e}") from e
    raise scope.wrong(name, "is no JSON object")


def _count(value: Any) -> int:
    """A number of things, or 0 where it is none."""
    return value if type(value) is int and 0 < value < 1 << 40 else 0


def _number(value: Any) -> float:
    """A number, or 0 where it is none."""
    return float(value) if isinstance(value, int | float) else 0.0


def _shape(value: Any) -> tuple[int, ...]:
    """A shape, or none where it is none."""
    good = isinstance(value, list) and len(value) < 9 and all(map(_count, value))
    return tuple(value) if good else ()
