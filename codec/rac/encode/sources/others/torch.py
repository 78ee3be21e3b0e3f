"""`.pt`, `.pth`, `.bin`: what torch saved, read by `torch.load(weights_only=True)` and no other way."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rac.encode.sources.arrays import BY_NATIVE, from_arrays
from rac.encode.sources.model import REFUSE_PICKLE, Source, SourceTensor
from rac.encode.sources.others import framed
from rac.errors import MissingDependencyError, SourceError
from rac.frameworks import torch_module

DEPTH = 64  # of dicts and lists in each other


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One file that torch saved."""

    tensors: list[SourceTensor]
    layout: framed.Layout | None  # None: a file of the form before torch 1.6, of which the tensors are in memory
    left: list[str]  # tensors of other types


def read(path: str, allowed: bool) -> Source:
    """The tensors of a checkpoint by their names, joined with dots where dicts lie in each other."""
    found = checkpoint(path, os.path.basename(path), allowed)
    return whole("torch", path, found.tensors, [found])


def whole(kind: str, path: str, tensors: Sequence[SourceTensor], files: Sequence[Checkpoint]) -> Source:
    """The tensors of several files, which come back as these files if they can."""
    layouts = [f.layout for f in files if f.layout]
    left = [name for f in files for name in f.left]
    if len(layouts) == len(files):
        return framed.source(kind, tensors, layouts, left)
    if left:
        raise SourceError(f"cannot be packed: {left[0]}, which this format does not store", file=path)
    lost = "it is of the form that torch saved before 1.6: its tensors come back, as a safetensors file"
    return Source(kind, tuple(replace(t, extra=None) for t in tensors), (), {}, lost=lost)


def checkpoint(path: str, name: str, allowed: bool) -> Checkpoint:
    """What a file holds, which is called `name`; SourceError where pickles are not `allowed`."""
    torch = module(path, allowed)
    with open(path, "rb") as f:
        old = f.read(4) != b"PK\3\4"
    if old:
        every = list(tensors(_load(torch, path, path, map_location="cpu"), path))
        others = [f"{n!r} is a tensor of {t.layout}" for n, t in every if t.layout != torch.strided]
        dense = {n: t for n, t in every if t.layout == torch.strided}
        if len(dense) + len(others) != len(every):
            raise SourceError("two tensors have one name", file=path)
        return Checkpoint(list(from_arrays(dense).tensors), None, others)
    layout = framed.Layout(path, name)
    stored(path)
    out, left = [], []
    for n, t in tensors(fake(torch, path, path), path):
        placed = place(layout, n, t)
        if placed is None:
            left.append(f"{n!r} is a tensor of {t.dtype}, {t.layout}")
        else:
            out.append(placed)
    return Checkpoint(out, layout, left)


def module(path: str, allowed: bool) -> Any:
    """torch; SourceError where pickles are not allowed."""
    if not allowed:
        raise SourceError(REFUSE_PICKLE, file=path)
    try:
        return torch_module()
    except MissingDependencyError as e:
        raise MissingDependencyError("checkpoints of torch need `pip install rac-codec[torch]`", file=path) from e


def fake(torch: Any, file: Any, path: str) -> Any:
    """What a checkpoint holds, its tensors without memory; their storages know where they lie in the file."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return _load(torch, file, path)


def _load(torch: Any, file: Any, path: str, **how: Any) -> Any:
    try:
        return torch.load(file, weights_only=True, **how)
    except Exception as e:  # UnpicklingError, and whatever a damaged file does to the reader
        lines = [line.strip() for line in str(e).splitlines()]
        why = next((line for line in lines if "GLOBAL" in line), "")
        what = f"holds more than weights, and is not loaded: {why}" if why else f"damaged checkpoint: {lines[:1]}"
        raise SourceError(what[:300], file=path) from e


def stored(path: str) -> None:
    """SourceError unless a zip file is plain: nothing compressed, little-endian."""
    try:
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise SourceError(f"damaged checkpoint: {info.filename!r} is compressed", file=path)
                if info.filename.endswith("/byteorder") and info.file_size < 16 and z.read(info) == b"big":
                    raise SourceError("is big-endian; load it and save it again", file=path)
    except SourceError:
        raise
    except Exception as e:  # zipfile checks little before it uses it
        raise SourceError(f"damaged checkpoint: {e}", file=path) from e


def tensors(value: Any, path: str, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of all tensors in dicts and lists."""
    torch: Any = torch_module()
    if isinstance(value, torch.Tensor):
        yield name or "tensor", value
    elif isinstance(value, dict | list | tuple):
        if depth > DEPTH:
            raise SourceError("dicts and lists lie in each other too deeply", file=path)
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(inside, path, f"{name}.{key}" if name else str(key), depth + 1)


def place(layout: framed.Layout, name: str, t: Any) -> SourceTensor | None:
    """A tensor of a checkpoint; None where this format has no such type."""
    torch: Any = torch_module()
    dtype = BY_NATIVE.get(str(t.dtype).removeprefix("torch."))
    if dtype is None or t.layout != torch.strided or t.is_quantized:
        return None
    at = getattr(t.untyped_storage(), "_checkpoint_offset", None)
    if t.numel() and at is None:
        raise MissingDependencyError("checkpoints of torch need torch 2.7 or later", file=layout.path)
    item, shape = t.element_size(), tuple(t.shape)
    begin = (at or 0) + t.storage_offset() * item
    if t.is_contiguous():
        return layout.at(name, dtype, (*shape[:-1], 2 * shape[-1]) if dtype == "F4" else shape, begin)
    if dtype == "F4":
        return None
    last = sum((n - 1) * s for n, s in zip(shape, t.stride(), strict=True))
    layout.inside(begin, (last + 1) * item)
    return framed.array(
        name, dtype, shape, framed.Strided(layout.path, begin, dtype, shape, tuple(s * item for s in t.stride()))
    )
