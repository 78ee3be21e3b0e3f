"""GGUF files, read through the `gguf` package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rac.encode.sources.model import Attachment, Extent, Source, SourceTensor
from rac.errors import MissingDependencyError, SourceError

_DENSE = frozenset(("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"))


def read(path: str) -> Source:
    """A GGUF file. Quantised tensors are rows of bytes; everything in front of the data is attached."""
    try:
        import gguf
    except ImportError as e:
        raise MissingDependencyError("GGUF files need `pip install rac-codec[gguf]`", file=path) from e

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            out = super()._get(offset, dtype, count, *args, **kwargs)
            if len(out) != count:  # or an array length out of a damaged header counts on for years
                raise ValueError(f"file ends at a value of offset {offset}")
            return out

    try:
        with np.errstate(all="raise"):  # numpy integers of the header must not wrap around
            reader = Reader(path)
            tensors = _tensors(path, reader, gguf.GGML_QUANT_SIZES, gguf.GGUFEndian.LITTLE)
    except SourceError:
        raise
    except Exception as e:  # the reader checks little, so damage shows as errors of any kind
        raise SourceError(f"damaged or unsupported GGUF file: {e}", file=path) from e
    head = Extent(path, 0, int(reader.data_offset))
    metadata = {"gguf.alignment": str(int(reader.alignment))}
    return Source("gguf", tuple(tensors), (Attachment("gguf.header", head),), metadata)


def _tensors(path: str, reader: Any, sizes: Mapping[Any, tuple[int, int]], little: Any) -> list[SourceTensor]:
    if reader.endianess != little:
        raise SourceError("big-endian GGUF files are not supported", file=path)
    tensors = []
    total, align, at = len(reader.data), int(reader.alignment), int(reader.data_offset)
    for t in reader.tensors:
        kind, shape = t.tensor_type.name, tuple(reversed([int(n) for n in t.shape]))
        block, block_size = sizes[t.tensor_type]
        if kind in _DENSE:
            stored, dtype, extra, size = shape, kind, None, math.prod(shape) * block_size
        else:
            stored, dtype = (*shape[:-1], shape[-1] // block * block_size), "U8"
            extra, size = {"gguf": {"type": kind, "shape": list(shape)}}, math.prod(stored)
        # As llama.cpp has it, tensors follow each other without gaps. Any other byte would be lost.
        if int(t.data_offset) != at or at + size > total:
            raise SourceError(f"damaged GGUF file: tensor {t.name!r} is misplaced", file=path, offset=at)
        tensors.append(SourceTensor(t.name, dtype, stored, Extent(path, at, size), extra))
        at += size
        if reader.data[at : at + -size % align].any():
            raise SourceError("damaged GGUF file: padding is not zero", file=path, offset=at)
        at += -size % align
    if at < total:
        raise SourceError(f"damaged GGUF file: {total - at} bytes behind the last tensor", file=path, offset=at)
    return tensors
