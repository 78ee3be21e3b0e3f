"""`.h5`: weights as Keras and others store them, through `h5py`."""

from __future__ import annotations

import os
from typing import Any

from rac.encode.sources.arrays import BY_NATIVE
from rac.encode.sources.model import Source, SourceTensor
from rac.encode.sources.others import framed
from rac.errors import MissingDependencyError, SourceError


def read(path: str) -> Source:
    """The datasets of the file by their paths. Links that lead out of the file are not followed."""
    try:
        import h5py
    except ImportError as e:
        raise MissingDependencyError("HDF5 files need `pip install rac-codec[keras]`", file=path) from e
    layout = framed.Layout(path, os.path.basename(path))
    out: list[SourceTensor] = []
    left: list[str] = []
    pieces: list[str] = []

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual:
            raise SourceError(f"dataset {name!r} lies in other files, which are not read", file=path)
        dtype = BY_NATIVE.get(item.dtype.name) if item.dtype.names is None else None
        if dtype is None or item.shape is None:
            left.append(f"dataset {name!r} is of {item.dtype}")
            return
        at = item.id.get_offset()
        if at is not None and item.dtype.byteorder != ">" and not h5.userblock_size:
            out.append(layout.at(name, dtype, item.shape, at))
            return
        if framed.too_large(item.id.get_storage_size(), item.nbytes):
            what = f"dataset {name!r} grows from {item.id.get_storage_size()} to {item.nbytes} bytes"
            raise SourceError(f"{what}, more than {framed.EXPANSION} times", file=path)
        if item.nbytes > framed.FREE:
            pieces.append(name)
        out.append(framed.array(name, dtype, item.shape, framed.words(item[()])))

    try:
        with h5py.File(path, "r") as h5:
            h5.visititems(visit)
    except SourceError:
        raise
    except Exception as e:  # whatever a damaged file does to the library
        raise SourceError(f"damaged or unsupported HDF5 file: {e}", file=path) from e
    return framed.source("keras", out, [layout], left, "its datasets are stored in pieces" if pieces else "")
