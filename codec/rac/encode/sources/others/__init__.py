"""Weights of other libraries: numpy, ONNX, torch, Keras, Flax. What a file is, its ending and first bytes say."""

from __future__ import annotations

import os

from rac.encode.sources.model import PICKLES, Source
from rac.errors import SourceError

_ZIP = b"PK\3\4"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "ocdbt.process_0")
ORBAX = (
    "a checkpoint of Orbax, which needs JAX to be read: restore it, and save its arrays with numpy.savez or safetensors"
)


def of_file(path: str, magic: bytes, pickles: bool) -> Source | None:
    """A file of another library; None where it is none that is known. `pickles` allows weights that torch pickled."""
    suffix = os.path.splitext(path)[1].lower()
    if magic.startswith(b"\x93NUMPY") or suffix == ".npy":
        from rac.encode.sources.others import npz

        return npz.read_npy(path)
    if suffix == ".npz":
        from rac.encode.sources.others import npz

        return npz.read_npz(path)
    if suffix in PICKLES:
        from rac.encode.sources.others import torch

        return torch.read(path, pickles)
    if suffix == ".onnx":
        from rac.encode.sources.others import onnx

        return onnx.read(path)
    if magic.startswith(_HDF5) or suffix in (".h5", ".hdf5", ".keras"):
        from rac.encode.sources.others import keras

        return keras.read(path, suffix == ".keras" and not magic.startswith(_HDF5))
    if suffix == ".msgpack":
        from rac.encode.sources.others import flax

        return flax.read(path)
    return None


def of_folder(path: str, pickles: bool) -> Source | None:
    """A checkpoint that is a folder; None where it is none. SourceError for those that cannot be read."""
    names = set(os.listdir(path))
    if any(n.endswith(".safetensors") for n in names):
        return None
    if ".metadata" in names and any(n.endswith(".distcp") for n in names):
        from rac.encode.sources.others import dcp

        return dcp.read(path, pickles)
    if names & set(_ORBAX):
        raise SourceError(ORBAX, file=path)
    return None
