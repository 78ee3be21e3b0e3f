"""Safetensors files. An own parser, because the library does not tell where the bytes lie."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from rac.encode.sources.model import Data, Extent, SourceTensor
from rac.errors import SourceError
from rac.records import Limits
from rac.registry import DTYPES

_MAX_HEADER = 100_000_000  # the format says so
_MAX_RANK = Limits().rank


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object hook: Python would keep the last of two equal names, and accept half a surrogate pair."""
    if len(out := dict(pairs)) != len(pairs):
        raise ValueError(f"duplicate name {Counter(k for k, _ in pairs).most_common(1)[0][0]!r}")
    "".join(s for pair in pairs for s in pair if isinstance(s, str)).encode()
    return out


def parse_json(raw: bytes, what: str, path: str) -> dict[str, Any]:
    """A JSON object without duplicate names."""
    try:
        if isinstance(out := json.loads(raw.decode(), object_pairs_hook=_unique), dict):
            return out
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{what} is not valid JSON: {e}", file=path) from e
    raise SourceError(f"{what} is not a JSON object", file=path)


def is_text_map(value: Any) -> bool:
    """Whether this is an object whose values are all strings."""
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def read(path: str, extra: dict[str, Any] | None = None) -> tuple[list[SourceTensor], dict[str, str], bytes]:
    """Tensors in the order of their offsets, each with `extra`; the metadata; the bytes in front of the tensors."""
    with open(path, "rb") as f:
        total = os.fstat(f.fileno()).st_size
        start = f.read(8)
        head = start + f.read(header_size(start, total, path))
    return parse(head, total, path, lambda at, size: Extent(path, at, size), extra)


def header_size(start: bytes, total: int, path: str) -> int:
    """Bytes of the header of a file of `total` bytes, behind its first 8, which `start` begins with."""
    if total < 8:
        raise SourceError("damaged safetensors file: shorter than 8 bytes", file=path)
    size = int.from_bytes(start[:8], "little")
    if size > min(_MAX_HEADER, total - 8):
        if start.startswith(b"version "):
            raise SourceError("is a pointer of Git LFS, not the file itself: run `git lfs pull`", file=path)
        if start.lstrip()[:2].lower() in (b"<!", b"<h"):
            raise SourceError("is a page of HTML, not a safetensors file: download it again", file=path)
        why = "ends inside the header" if size <= _MAX_HEADER else "header is larger than 100 MB"
        raise SourceError(f"damaged safetensors file: {why}", file=path)
    return size


def parse(
    front: bytes, total: int, path: str, place: Callable[[int, int], Data], extra: dict[str, Any] | None = None
) -> tuple[list[SourceTensor], dict[str, str], bytes]:
    """What `read` gives, from the bytes in front of the tensors; `place` gives the data at an offset, of a size."""
    raw, size = front[8:], len(front) - 8
    if not raw.startswith(b"{"):
        raise SourceError("damaged safetensors file: the header does not start with '{'", file=path)
    head = parse_json(raw, "safetensors header", path)
    metadata = {} if (given := head.pop("__metadata__", None)) is None else given
    if not is_text_map(metadata):
        raise SourceError("damaged safetensors file: __metadata__ does not map text to text", file=path)
    found: list[tuple[int, int, SourceTensor]] = []
    for name, info in head.items():
        match info:
            case {"dtype": str(dtype), "shape": [*dims], "data_offsets": [begin, end]}:
                pass
            case _:
                raise SourceError(f"damaged safetensors file: malformed entry of tensor {name!r}", file=path)
        # A bound on rank and numbers, so that a hostile shape costs nothing to multiply.
        numbers_ok = all(type(n) is int and 0 <= n < 1 << 63 for n in (*dims, begin, end))
        if len(dims) > _MAX_RANK or not numbers_ok:
            raise SourceError(f"damaged safetensors file: malformed entry of tensor {name!r}", file=path)
        if dtype not in DTYPES:
            raise SourceError(f"tensor {name!r} has the unsupported dtype {dtype!r}", file=path)
        if math.prod(dims) * DTYPES[dtype].bits != 8 * (end - begin):
            why = f"tensor {name!r} has {end - begin} bytes, which is not what {dtype} {dims} needs"
            raise SourceError(f"damaged safetensors file: {why}", file=path)
        data = place(8 + size + begin, end - begin)
        found.append((begin, end, SourceTensor(name, dtype, tuple(dims), data, extra)))
    found.sort(key=lambda entry: entry[:2])
    at = 0
    for begin, end, tensor in found:
        if begin != at:
            why = f"{'overlap' if begin < at else 'hole'} in front of tensor {tensor.name!r}"
            raise SourceError(f"damaged safetensors file: {why}", file=path, offset=8 + size + begin)
        at = end
    if at != total - 8 - size:
        why = f"the tensors take {at} bytes, the file has {total - 8 - size}"
        raise SourceError(f"damaged safetensors file: {why}", file=path)
    return [tensor for *_, tensor in found], metadata, front
