"""What other tools have quantised, packed losslessly: loaded by transformers, or as the numbers that it stands for.

Where transformers has no quantizer for the method, or that does not run here, codes and scales would be taken for
weights, or nothing be loaded at all.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.quantizers import AutoHfQuantizer

from rac import dequantise, frameworks
from rac.dequantise import Dequantised, Logical
from rac.errors import SourceError, UnsupportedError
from rac.registry import DTYPES

_CANNOT = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)
"""What quantizers of transformers raise where they cannot run."""


def settle(lazy: dict[str, Any], config: Any, folder: str, resident: str, device_map: Any) -> None:
    """Give the matrices in place of codes and scales among the tensors `lazy`, where transformers cannot run these.

    A warning says so, and `config` no longer states a quantisation. UnsupportedError where neither is possible, or
    weights were to stay compressed; the file is not named.
    """
    path, other = Path(folder, "config.json"), Path(folder, "hf_quant_config.json")
    read = json.loads(path.read_text("utf-8"))
    stated = dequantise.stated_in(read)
    if not stated and other.exists():
        stated = {"quant_method": "modelopt"}
    why = _cannot(stated, device_map) if stated else "config.json states no quantisation"
    if not why and resident == "dense":
        return
    held = {name: _Held(name, source) for name, source in lazy.items()}
    try:
        found, gone = dequantise.find(held, stated, "")
    except SourceError as e:
        if stated and resident == "dense":
            method = stated["quant_method"]
            raise UnsupportedError(f"transformers cannot load {method!r} here ({why}): {e.message}") from e
        found, gone = [], set()
    found = [one for one in found if len(one.parts) > 1]  # alone they are numbers of eight bits
    if not found:
        return
    if resident != "dense":
        raise UnsupportedError("is quantised by another method already; load it dense, or pack its source to --bits")
    kinds = ", ".join(sorted({one.scheme for one in found}))
    warnings.warn(f"rac: {kinds}: loaded as the numbers that they stand for ({why})", stacklevel=4)
    dtype = dequantise.dtype_of(read)
    for one in found:
        lazy[one.name] = _Made(one, dtype, [held[name] for name in one.parts])
    for name in gone - {one.name for one in found}:
        del lazy[name]
    for part in (config, getattr(config, "text_config", None)):
        for key in ("quantization_config", "compression_config"):
            if part is not None and hasattr(part, key):
                delattr(part, key)


def _cannot(stated: dict[str, Any], device_map: Any) -> str:
    """Why transformers cannot load what is quantised so; empty where it can."""
    try:
        quantizer = AutoHfQuantizer.from_config(dict(stated), pre_quantized=True)
        quantizer.validate_environment(device_map=device_map, dtype=torch.bfloat16)
    except _CANNOT as e:
        return " ".join(str(e).split()) or type(e).__name__
    # its own way to do that takes blocks of a scale to be of equal height, and the last one is not
    return "no device here runs it as it is" if getattr(quantizer.quantization_config, "dequantize", False) else ""


class _Held:
    """A stored tensor of the archive, decoded once while a matrix is made of it."""

    def __init__(self, name: str, source: Any) -> None:
        self.name, self._source = name, source
        self.dtype, self.shape = source.get_dtype(), tuple(source.get_shape())
        self.nbytes = math.prod(self.shape) * DTYPES[self.dtype].bits // 8
        self._bytes: NDArray[np.uint8] | None = None

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop)."""
        held = self._bytes
        return (self._all() if held is None else held)[start:stop]

    def _all(self) -> NDArray[np.uint8]:
        out: NDArray[np.uint8] = self._source[...].contiguous().reshape(-1).view(torch.uint8).numpy()
        return out

    @contextmanager
    def kept(self) -> Iterator[None]:
        """All bytes are in memory for a while."""
        self._bytes = self._all()
        try:
            yield
        finally:
            self._bytes = None


class _Made:
    """A matrix that is made of stored tensors when it is read; transformers loads it by `[...]`."""

    online = None  # what the layer does to its input

    def __init__(self, one: Logical, dtype: str, held: list[_Held]) -> None:
        made = Dequantised(one.rows, dtype, math.prod(one.shape[:-1]), one.shape[-1])
        self._part, self._held = frameworks.Part(dtype, one.shape, made.read), held

    def get_dtype(self) -> str:
        """Data type, as safetensors names them."""
        return self._part.get_dtype()

    def get_shape(self) -> list[int]:
        """Shape of the matrix."""
        return self._part.get_shape()

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The matrix, or rows of it."""
        with ExitStack() as stack:
            for held in self._held:
                stack.enter_context(held.kept())
            return self._part[key]
