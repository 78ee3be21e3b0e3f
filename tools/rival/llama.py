"""Files that llama.cpp makes of a model, as people download them: each tensor in the type that llama.cpp chooses.

`llama_model_quantize` of llama-cpp-python does it, with an importance matrix: the diagonals of the second moments that
all others get, none for embeddings, as llama.cpp's own tool has none. A type whose blocks of 256 do not fit the rows of
a matrix falls back to one of blocks of 32, which llama.cpp decides.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@functools.cache
def library() -> Any:
    """llama_cpp; SystemExit where it is not installed."""
    try:
        import llama_cpp
    except ImportError as e:
        raise SystemExit(f"whole GGUF files need llama-cpp-python: {e}") from e
    llama_cpp.llama_log_set(_quiet(llama_cpp), None)
    return llama_cpp


@functools.cache
def _quiet(library: Any) -> Any:
    return library.llama_log_callback(lambda *_: None)


def names(reader: Any) -> Any:
    """A map from Hugging Face names to those of the tensors of a file, as its architecture has them."""
    arch = reader.get_field("general.architecture").contents()
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(kind, int(reader.get_field(f"{arch}.block_count").contents()))


def file_type(what: str) -> int:
    """llama.cpp's number of a kind of file, as Q4_K_M; SystemExit where it knows none of that name."""
    found = getattr(library(), f"LLAMA_FTYPE_MOSTLY_{what}", None)
    if found is None:
        raise SystemExit(f"llama.cpp has no file type {what}")
    return int(found)


def make(source: Path, target: Path, what: str, importance: Mapping[str, Floats]) -> None:
    """Write `target` of kind `what` from a GGUF file; importance (in,) of columns by Hugging Face names of matrices."""
    lib, known = library(), names(gguf.GGUFReader(source))
    gguf_name = {name: str(known.get_name(name, (".weight",))).encode() for name in importance}
    rows = [(gguf_name[name], np.ascontiguousarray(values, np.float32)) for name, values in importance.items()]
    end = lib.llama_model_imatrix_data()
    data = (type(end) * (len(rows) + 1))()  # the last has no name: that ends the list
    for entry, (name, values) in zip(data, rows, strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    how = lib.llama_model_quantize_default_params()
    how.ftype, how.nthread, how.allow_requantize = file_type(what), 1, True
    if rows:
        how.imatrix = data
    new = target.with_suffix(".new")
    if lib.llama_model_quantize(str(source).encode(), str(new).encode(), ctypes.byref(how)):
        raise SystemExit(f"llama.cpp made no {what} of {source}")
    new.rename(target)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file has."""

    bits: float
    """For each weight of the matrices inside the blocks."""
    types: str
    """How many of these matrices have which type."""
    table: str
    """Type of the embedding."""


def contents(path: Path) -> Contents:
    """What a file of llama.cpp has."""
    size = count = 0
    types: Counter[str] = Counter()
    table = ""
    for t in gguf.GGUFReader(path).tensors:
        if t.name == "token_embd.weight":
            table = t.tensor_type.name
        elif t.name.startswith("blk.") and sum(n > 1 for n in t.shape) > 1:
            size += int(t.n_bytes)
            count += math.prod(int(n) for n in t.shape)
            types[t.tensor_type.name] += 1
    return Contents(8 * size / count, ", ".join(f"{n} {name}" for name, n in types.most_common()), table)
