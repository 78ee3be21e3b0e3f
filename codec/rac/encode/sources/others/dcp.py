"""Checkpoints of `torch.distributed.checkpoint`: a table, `.metadata`, and files with what each process saved."""

from __future__ import annotations

import math
import os
import zipfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.encode.sources.arrays import BY_NATIVE
from rac.encode.sources.model import REFUSE_PICKLE, Attachment, Extent, Source, SourceTensor
from rac.encode.sources.others import framed, opcodes
from rac.encode.sources.others.npz import data_offset
from rac.errors import SourceError
from rac.registry import DTYPES

TABLE = ".metadata"
CONVERT = "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR model.pt` makes a file of it"
_SCALE = 64 << 20  # bytes of a table


@dataclass(frozen=True, slots=True)
class Joined:
    """Pieces of files, one behind the other."""

    parts: tuple[Extent, ...]

    @property
    def size(self) -> int:
        """All their bytes."""
        return sum(p.size for p in self.parts)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of all of them."""
        out, at = [np.empty(0, np.uint8)], 0
        for p in self.parts:
            a, b = max(start - at, 0), min(stop - at, p.size)
            if a < b:
                out.append(p.read(a, b))
            at += p.size
        return np.concatenate(out)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a tensor: where it begins, its shape, its bytes, and the tensor that they are by themselves."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    at: int
    layout: framed.Layout


def read(root: str, allowed: bool) -> Source:
    """The tensors of a checkpoint by their names. Its table is a pickle, which is read as data, and not executed.

    Tensors that one process saved whole have their places in its file, which comes back; what was sharded along its
    first dimension is joined. SourceError for tensors that were sharded in another way.
    """
    table = os.path.join(root, TABLE)
    if not allowed:
        raise SourceError(REFUSE_PICKLE, file=table)
    if os.path.getsize(table) > _SCALE:
        raise SourceError("its table is larger than 64 MB", file=table)
    with open(table, "rb") as f:
        meta = opcodes.parse(f.read(), table)
    stated, stored = (
        meta.get(n) if isinstance(meta, opcodes.Made) else None for n in ("state_dict_metadata", "storage_data")
    )
    if not isinstance(stated, opcodes.Pairs) or not isinstance(stored, opcodes.Pairs):
        raise SourceError("is no table of a checkpoint", file=table)
    places = {_key(k): v for k, v in stored.items}
    layouts: dict[str, framed.Layout] = {}
    tensors, sharded = [], False
    for name, kept in stated.items:
        if not isinstance(name, str) or not isinstance(kept, opcodes.Made):
            raise SourceError("is no table of a checkpoint", file=table)
        if not kept.kind.endswith(".TensorStorageMetadata"):
            continue  # numbers and texts, which stay in the frame
        dtype, shape, chunks = _stated(name, kept, table)
        found = [_chunk(root, layouts, places.get((name, a)), dtype, a, b) for a, b in chunks]
        sharded |= len(found) > 1
        tensors.append(_tensor(name, dtype, shape, found, table))
    if not tensors:
        raise SourceError("holds no tensor", file=root)
    source = framed.source("dcp", tensors, [*layouts.values()], why="its tensors are sharded" if sharded else "")
    if not source.frames:
        return source
    others = sorted(n for n in os.listdir(root) if n not in layouts and os.path.isfile(os.path.join(root, n)))
    extents = ((n, Extent(p, 0, os.path.getsize(p))) for n in others for p in [os.path.join(root, n)])
    return replace(source, attachments=tuple(Attachment(n, e) for n, e in extents))


def _key(index: Any) -> tuple[Any, Any]:
    """Name of a tensor and beginning of a chunk, of a row of the table."""
    if not isinstance(index, opcodes.Made):
        return None, None
    offset = index.get("offset")
    name = index.get("fqn")
    return name if isinstance(name, str) else None, None if offset is None else _size(offset)


def _size(value: Any) -> tuple[int, ...] | None:
    """The numbers of a torch.Size; None for anything else."""
    args = value.args[0] if isinstance(value, opcodes.Made) and value.args else value
    if not isinstance(args, tuple | list) or len(args) > 64:
        return None
    return tuple(args) if all(type(n) is int and 0 <= n < 1 << 48 for n in args) else None


def _stated(name: str, kept: opcodes.Made, path: str) -> tuple[str, tuple[int, ...], list[tuple[Any, Any]]]:
    """Type, shape, and the (beginning, shape) of each chunk of a tensor."""
    properties, shape, chunks = kept.get("properties"), _size(kept.get("size")), kept.get("chunks")
    state = properties.state if isinstance(properties, opcodes.Made) else None
    first = state.get("dtype") if isinstance(state, opcodes.Pairs) else state[0] if isinstance(state, tuple) else None
    kind = first.kind.removeprefix("torch.") if isinstance(first, opcodes.Made) else ""
    if shape is None or not isinstance(chunks, list) or not all(isinstance(c, opcodes.Made) for c in chunks):
        raise SourceError(f"damaged table: tensor {name!r} is malformed", file=path)
    if kind not in BY_NATIVE or BY_NATIVE[kind] == "F4":
        raise SourceError(f"tensor {name!r} is of {kind or 'no type'}, which this format does not store", file=path)
    return BY_NATIVE[kind], shape, [(_size(c.get("offsets")), _size(c.get("sizes"))) for c in chunks]


def _chunk(root: str, layouts: dict[str, framed.Layout], info: Any, dtype: str, begin: Any, shape: Any) -> _Chunk:
    """The place of a chunk, as its row of the table and the zip file there say."""
    table = os.path.join(root, TABLE)
    row = info if isinstance(info, opcodes.Made) else opcodes.Made("none")
    file, at, length = row.get("relative_path"), row.get("offset"), row.get("length")
    if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", "..", TABLE):
        raise SourceError("damaged table: a chunk is in no file", file=table)
    if type(at) is not int or type(length) is not int or length < 0 or begin is None or shape is None:
        raise SourceError("damaged table: a chunk has no place", file=table)
    if row.get("transform_descriptors"):
        raise SourceError("its chunks are compressed or transformed; " + CONVERT, file=table)
    path = os.path.join(root, file)
    if not os.path.isfile(path):
        raise SourceError(f"its file {file!r} is missing", file=root)
    layout = layouts.setdefault(file, framed.Layout(path, file))
    layout.inside(at, length)
    try:
        with zipfile.ZipFile(framed.Window(path, at, length)) as z:
            members = {i.filename.partition("/")[2]: i for i in z.infolist()}
            head = opcodes.parse(z.read(members["data.pkl"]), path) if members["data.pkl"].file_size < 1 << 20 else None
            data = members["data/0"] if math.prod(shape) else None
            order = z.read(members["byteorder"]) if "byteorder" in members else b"little"
            if data is not None and data.compress_type != zipfile.ZIP_STORED:
                raise SourceError("damaged checkpoint: a chunk is compressed", file=path)
            place = 0 if data is None else at + data_offset(path, data, at)
    except SourceError:
        raise
    except Exception as e:  # zipfile checks little before it uses it
        raise SourceError(f"damaged checkpoint: chunk at {at}: {e}", file=path) from e
    if order != b"little" or (data is not None and data.file_size != math.prod(shape) * DTYPES[dtype].bits // 8):
        raise SourceError(f"damaged checkpoint: chunk at {at} has another size or byte order", file=path)
    if not _plain(head, shape):
        raise SourceError("a tensor is no plain one in C order; " + CONVERT, file=path)
    return _Chunk(begin, shape, place, layout)


def _plain(head: Any, shape: tuple[int, ...]) -> bool:
    """Whether what torch saved is a tensor of this shape that begins where its memory does, in C order."""
    if not isinstance(head, opcodes.Made) or head.kind != "torch._utils._rebuild_tensor_v2" or len(head.args) < 4:
        return False
    _, first, size, stride = head.args[:4]
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    same = isinstance(stride, tuple) and len(stride) == len(shape)
    in_order = same and all(n == 1 or s == step for n, s, step in zip(shape, stride, steps, strict=True))
    return first == 0 and _size(size) == shape and (in_order or 0 in shape)


def _tensor(name: str, dtype: str, shape: tuple[int, ...], chunks: list[_Chunk], path: str) -> SourceTensor:
    """A tensor of one chunk, with its place; or of several along its first dimension."""
    if len(chunks) == 1 and chunks[0].shape == shape:
        return chunks[0].layout.at(name, dtype, shape, chunks[0].at)
    row, at, parts = math.prod(shape[1:]) * DTYPES[dtype].bits // 8, 0, []
    for c in sorted(chunks, key=lambda c: c.begin):
        if not shape or c.shape[1:] != shape[1:] or c.begin != (at, *[0] * (len(shape) - 1)):
            raise SourceError(f"tensor {name!r} is sharded along more than its first dimension; {CONVERT}", file=path)
        parts.append(Extent(c.layout.path, c.at, c.shape[0] * row))
        at += c.shape[0]
    if not shape or at != shape[0]:
        raise SourceError(f"damaged table: chunks of tensor {name!r} are missing", file=path)
    return framed.array(name, dtype, shape, Joined(tuple(parts)))
