"""`safetensors.numpy`, for `.rac` files: the same names, arguments and results, with numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from rac.decode import archive
from rac.decode.handle import SafeOpen
from rac.encode import pack
from rac.errors import UnstorableError

Path = str | os.PathLike[str]


def _checked(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """`tensors`, wide types first, then by name, as safetensors sorts them; UnstorableError for what are none."""
    if not isinstance(tensors, Mapping):
        raise UnstorableError(f"a dict of names to numpy arrays is needed, not a {type(tensors).__name__}")
    for name, value in tensors.items():
        if not isinstance(value, np.ndarray | np.generic):
            raise UnstorableError(f"{name!r} is a {type(value).__name__}, not a numpy array")
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))


def save_file(tensor_dict: Mapping[str, Any], filename: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays to a file, losslessly, in place of one that is there.

    Arrays that are not contiguous, or big-endian, are stored as if they were. UnstorableError, a ValueError, for
    values that are no arrays; SourceError for types that the format does not have.
    """
    pack.save_file(_checked(tensor_dict), filename, metadata)


def save(tensor_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file of these arrays; as `save_file`."""
    return pack.save(_checked(tensor_dict), metadata)


def load_file(filename: Path, *, backend: str = "mmap") -> dict[str, Any]:
    """All arrays of a file by name, in its order; RacError where it is missing or damaged."""
    with SafeOpen(filename, "np", backend=backend) as f:
        return f.get_tensors()


def load(data: bytes) -> dict[str, Any]:
    """All arrays of a file that is in memory."""
    return archive.load(data, framework="np")
