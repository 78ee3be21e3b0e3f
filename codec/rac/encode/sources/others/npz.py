"""`.npy` and `.npz`: arrays that numpy wrote. Object arrays are pickles, and refused."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from rac.encode.sources.arrays import BY_NATIVE
from rac.encode.sources.model import Source, SourceTensor
from rac.encode.sources.others import framed
from rac.errors import SourceError
from rac.registry import DTYPES

_LOCAL = 30  # bytes of a local header of a zip file, without name and extra field


def read_npy(path: str) -> Source:
    """One array, by the name of its file without the ending."""
    layout = framed.Layout(path, os.path.basename(path))
    with open(path, "rb") as f:
        head = _head(f, path, "the array")
        found = _placed(layout, os.path.splitext(layout.name)[0], head, f.tell())
    if found is None:
        raise SourceError(f"holds an array of {head[2]}, which this format does not store", file=path)
    return framed.source("npy", [found], [layout], why=_why([found], False))


def read_npz(path: str) -> Source:
    """The arrays of a zip file by their names; compressed ones are read into memory."""
    layout = framed.Layout(path, os.path.basename(path))
    tensors: list[SourceTensor] = []
    left, squeezed = [], False
    try:
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename:
                    left.append(f"a file {name!r}")
                    continue
                if info.flag_bits & 1:
                    raise SourceError(f"{name!r} is encrypted", file=path)
                with z.open(info) as f:
                    head = _head(f, path, repr(name))
                    begin = f.tell()
                    if info.compress_type == zipfile.ZIP_STORED:
                        found = _placed(layout, name, head, data_offset(path, info) + begin)
                    else:
                        squeezed, found = True, _inflated(f, info, name, head, path)
                if found is None:
                    left.append(f"{name!r} is an array of {head[2]}")
                else:
                    tensors.append(found)
    except SourceError:
        raise
    except Exception as e:  # zipfile and zlib check little before they use it
        raise SourceError(f"damaged or unsupported .npz file: {e}", file=path) from e
    return framed.source("npz", tensors, [layout], left, _why(tensors, squeezed))


def _why(tensors: Sequence[SourceTensor], squeezed: bool) -> str:
    """Why a file may not come back."""
    if squeezed:
        return "its arrays are compressed"
    turned = any(isinstance(t.data, framed.Strided) for t in tensors)
    return "its arrays are in Fortran order or big-endian" if turned else ""


def data_offset(path: str, info: zipfile.ZipInfo, base: int = 0) -> int:
    """Where the bytes of a member of a zip file, which begins at `base` of a file, begin, as its local header says."""
    with open(path, "rb") as f:
        f.seek(base + info.header_offset)
        head = f.read(_LOCAL)
    if len(head) < _LOCAL or head[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"no local header of {info.filename!r}")
    return info.header_offset + _LOCAL + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


def _head(f: IO[bytes], path: str, what: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array; the bytes of its elements follow."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(f)  # type: ignore[no-untyped-call]
        if version not in readers:
            raise SourceError(f"{what} has the header version {version[0]}.{version[1]}", file=path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            shape, fortran, dtype = readers[version](f)  # type: ignore[no-untyped-call]
    except SourceError:
        raise
    except Exception as e:  # of a parser of Python
        raise SourceError(f"damaged numpy header of {what}: {str(e).splitlines()[:1]}", file=path) from e
    if dtype.hasobject:
        raise SourceError(f"{what} is an object array: a pickle, which is refused", file=path)
    if any(n < 0 for n in shape) or len(shape) > 64:
        raise SourceError(f"damaged numpy header of {what}: shape {shape}", file=path)
    return shape, fortran, dtype


def _kind(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[str, tuple[int, ...]] | None:
    """The data type of this format, and the shape; None where it has no such type."""
    if dtype.kind == "V" and dtype.names is None and dtype.subdtype is None and 0 < dtype.itemsize < 1 << 20:
        return "U8", (*shape, dtype.itemsize)  # as numpy writes types that it does not know, bfloat16 for one
    name = BY_NATIVE.get(dtype.name) if dtype.names is None else None
    return None if name is None else (name, shape)


def _placed(layout: framed.Layout, name: str, head: Any, at: int) -> SourceTensor | None:
    """An array whose elements lie at an offset of the file."""
    shape, fortran, dtype = head
    if (kind := _kind(shape, dtype)) is None:
        return None
    if kind[0] != "U8" and ((fortran and len(shape) > 1) or dtype.byteorder == ">"):
        strides, step = [], dtype.itemsize
        for n in shape if fortran else reversed(shape):
            strides.append(step)
            step *= n
        order = strides if fortran else reversed(strides)
        data = framed.Strided(layout.path, at, kind[0], kind[1], tuple(order), dtype.byteorder == ">")
        layout.inside(at, data.size)
        return framed.array(name, *kind, data)
    return layout.at(name, *kind, at)


def _inflated(f: IO[bytes], info: zipfile.ZipInfo, name: str, head: Any, path: str) -> SourceTensor | None:
    """An array of a member that is compressed."""
    shape, fortran, dtype = head
    if (kind := _kind(shape, dtype)) is None:
        return None
    size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if framed.too_large(info.compress_size, max(size, info.file_size)):
        what = f"{name!r} grows from {info.compress_size} to {max(size, info.file_size)} bytes"
        raise SourceError(f"{what}, more than {framed.EXPANSION} times; numpy.savez stores it", file=path)
    if size > info.file_size:
        raise SourceError(f"damaged .npz file: {name!r} is shorter than its shape", file=path)
    raw = np.frombuffer(f.read(size), np.uint8)
    if raw.size != size:
        raise SourceError(f"damaged .npz file: {name!r} is shorter than its shape", file=path)
    if dtype.byteorder == ">":
        raw = raw.view(f"u{DTYPES[kind[0]].word}").byteswap().view(np.uint8)
    if fortran and len(shape) > 1:
        turned = raw.view(f"V{dtype.itemsize}").reshape(shape[::-1]).transpose()
        raw = np.ascontiguousarray(turned).reshape(-1).view(np.uint8)
    return framed.array(name, *kind, raw)
