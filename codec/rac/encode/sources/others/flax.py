"""Flax's msgpack files: nested maps of arrays, as `flax.serialization` writes them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from rac.container import msg
from rac.encode.sources.arrays import BY_NATIVE
from rac.encode.sources.model import Source, SourceTensor
from rac.encode.sources.others import framed
from rac.errors import FormatError, SourceError
from rac.registry import DTYPES

_ARRAY = 1  # type of an extension that is an array: (shape, name of the type, bytes)
DEPTH = 64


def read(path: str) -> Source:
    """The arrays of a file by their names, joined with dots."""
    layout = framed.Layout(path, os.path.basename(path))
    with open(path, "rb") as f:
        data = f.read()
    try:
        tree = msg.foreign(data)
    except FormatError as e:
        raise SourceError(f"damaged msgpack file: {e.message}", file=path) from e
    out: list[SourceTensor] = []
    _walk(tree, "", 0, layout, out)
    if not out:
        raise SourceError("holds no arrays of Flax", file=path)
    return framed.source("flax", out, [layout])


def _walk(value: Any, name: str, depth: int, layout: framed.Layout, out: list[SourceTensor]) -> None:
    """Collect arrays; those above 1 GB are maps of chunks, each of which is one."""
    if depth > DEPTH:
        raise SourceError("maps lie in each other too deeply", file=layout.path)
    if isinstance(value, dict | list):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            _walk(inside, f"{name}.{key}" if name else str(key), depth + 1, layout, out)
    elif isinstance(value, msg.Extension) and value.kind == _ARRAY:
        out.append(_array(value.data, name, layout))


def _array(data: bytes, name: str, layout: framed.Layout) -> SourceTensor:
    try:
        shape, kind, raw = msg.foreign(data)
        well = isinstance(raw, bytes) and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    except (FormatError, ValueError, TypeError, UnicodeDecodeError) as e:
        raise SourceError(f"damaged msgpack file: array {name!r} is malformed", file=layout.path) from e
    dtype = BY_NATIVE.get(kind)
    if not well or dtype is None:
        what = f"array {name!r} is of {kind}, which this format does not store" if well else f"damaged array {name!r}"
        raise SourceError(what, file=layout.path)
    if int(np.prod(shape, dtype=object)) * DTYPES[dtype].bits != 8 * len(raw):
        raise SourceError(f"damaged msgpack file: array {name!r} has {len(raw)} bytes", file=layout.path)
    return layout.found(name, dtype, shape, raw)
