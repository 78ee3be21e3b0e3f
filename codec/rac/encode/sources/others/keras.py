"""`.h5` and `.keras`: weights as Keras and others store them, through `h5py`."""

from __future__ import annotations

import os
import zipfile
from typing import Any

from rac.encode.sources.arrays import BY_NATIVE
from rac.encode.sources.model import Source, SourceTensor
from rac.encode.sources.others import framed
from rac.encode.sources.others.npz import data_offset
from rac.errors import MissingDependencyError, SourceError

_WEIGHTS = "model.weights.h5"  # in a .keras file, which is a zip file


def read(path: str, zipped: bool) -> Source:
    """The datasets of the file by their paths. Links that lead out of the file are not followed."""
    try:
        import h5py
    except ImportError as e:
        raise MissingDependencyError("HDF5 files need `pip install rac-codec[keras]`", file=path) from e
    layout = framed.Layout(path, os.path.basename(path))
    base, file = _inside(path) if zipped else (0, path)
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
            out.append(layout.at(name, dtype, item.shape, base + at))
            return
        if framed.too_large(item.id.get_storage_size(), item.nbytes):
            what = f"dataset {name!r} grows from {item.id.get_storage_size()} to {item.nbytes} bytes"
            raise SourceError(f"{what}, more than {framed.EXPANSION} times", file=path)
        if item.nbytes > framed.FREE:
            pieces.append(name)
        out.append(framed.array(name, dtype, item.shape, framed.words(item[()])))

    try:
        with h5py.File(file, "r") as h5:
            h5.visititems(visit)
    except SourceError:
        raise
    except Exception as e:  # whatever a damaged file does to the library
        raise SourceError(f"damaged or unsupported HDF5 file: {e}", file=path) from e
    return framed.source("keras", out, [layout], left, "its datasets are stored in pieces" if pieces else "")


def _inside(path: str) -> tuple[int, framed.Window]:
    """Where the weights of a .keras file begin, and they as a file."""
    try:
        with zipfile.ZipFile(path) as z:
            info = z.getinfo(_WEIGHTS)
            if info.compress_type != zipfile.ZIP_STORED:
                raise SourceError(f"its {_WEIGHTS} is compressed; take it out, and pack that", file=path)
            at = data_offset(path, info)
    except SourceError:
        raise
    except KeyError as e:
        raise SourceError(f"holds no {_WEIGHTS}", file=path) from e
    except Exception as e:  # zipfile checks little before it uses it
        raise SourceError(f"damaged .keras file: {e}", file=path) from e
    return at, framed.Window(path, at, info.file_size)
