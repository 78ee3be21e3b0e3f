"""GGUF files, read through the `gguf` package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.dequantise import Dequantised
from rac.encode.sources.model import Attachment, Extent, Source, SourceTensor
from rac.errors import MissingDependencyError, SourceError

_DENSE = frozenset(("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"))


def _opened(path: str) -> tuple[Any, list[SourceTensor]]:
    """The reader of a file, and its tensors."""
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
    return reader, tensors


def read(path: str) -> Source:
    """A GGUF file. Quantised tensors are rows of bytes; everything in front of the data is attached."""
    reader, tensors = _opened(path)
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


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Rows of blocks as the numbers that they stand for, as the `gguf` package has it."""

    codes: SourceTensor
    kind: str

    def __call__(self, a: int, b: int) -> NDArray[np.float32]:
        import gguf

        width = self.codes.shape[-1]
        raw = self.codes.read(a * width, b * width).reshape(b - a, width)
        out: NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.kind])
        return out


def numbers(source: Source, path: str) -> Source:
    """The source with its blocks as numbers in BF16, and a header that says so; the same where it has no blocks."""
    if not any(t.extra for t in source.tensors):
        return source
    import gguf

    kinds, made = set(), []
    for t in source.tensors:
        if t.extra is None:
            made.append(t)
            continue
        kind, shape = t.extra["gguf"]["type"], tuple(t.extra["gguf"]["shape"])
        if kind not in kinds:
            try:
                gguf.quants.dequantize(np.zeros((1, t.shape[-1]), np.uint8), gguf.GGMLQuantizationType[kind])
            except (KeyError, ValueError, NotImplementedError) as e:
                raise SourceError(f"GGUF blocks of type {kind!r} cannot be read as numbers: {e}", file=path) from e
            kinds.add(kind)
        rows = Dequantised(_Blocks(replace(t, extra=None), kind), "BF16", math.prod(shape[:-1]), shape[-1])
        made.append(SourceTensor(t.name, "BF16", shape, rows))
    header = Attachment("gguf.header", _header(path, made))
    named = tuple(sorted(f"GGUF {kind}" for kind in kinds))
    return replace(source, tensors=tuple(made), attachments=(header,), dequantised=named)


def _header(path: str, tensors: Sequence[SourceTensor]) -> bytes:
    """The bytes in front of the data of a file that holds these tensors instead of its own."""
    import gguf

    reader, _ = _opened(path)
    head = Extent(path, 0, int(reader.data_offset)).read(0, int(reader.data_offset))
    at, align = 0, int(reader.alignment)
    for stated, t in zip(reader.tensors, tensors, strict=True):
        place = stated.field.offset + sum(part.nbytes for part in stated.field.parts[:-2])
        head[place : place + 4] = np.array([gguf.GGMLQuantizationType[t.dtype]], "<u4").view(np.uint8)
        head[place + 4 : place + 12] = np.array([at], "<u8").view(np.uint8)
        at += t.nbytes + -t.nbytes % align
    kind = reader.fields.get("general.file_type")
    if kind is not None and kind.types == [gguf.GGUFValueType.UINT32]:
        place = kind.offset + sum(part.nbytes for part in kind.parts[:-1])
        head[place : place + 4] = np.array([gguf.LlamaFileType.MOSTLY_BF16], "<u4").view(np.uint8)
    return head.tobytes()
