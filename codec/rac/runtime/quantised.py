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
from rac.runtime.held import Head, size_of
from rac.runtime.made import Making

_CANNOT = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)
"""What quantizers of transformers raise where they cannot run."""


def settle(lazy: dict[str, Any], config: Any, folder: str, resident: str, device_map: Any) -> None:
    """Give the matrices in place of codes and scales among the tensors `lazy`, where transformers cannot run these.

    And where they are to stay compressed: their records make up those of the matrices then (rac.runtime.made). A
    warning says so, and `config` no longer states a quantisation. UnsupportedError where neither is possible; the file
    is not named.
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
        if stated:
            method = stated["quant_method"]
            because = f"transformers cannot load {method!r} here ({why})" if resident == "dense" else "load it dense"
            raise UnsupportedError(f"{because}: {e.message}") from e
        found, gone = [], set()
    found = [one for one in found if len(one.parts) > 1]  # alone they are numbers of eight bits
    if not found:
        return
    kinds, because = ", ".join(sorted({one.scheme for one in found})), why or "they stay compressed"
    warnings.warn(f"rac: {kinds}: loaded as the numbers that they stand for ({because})", stacklevel=4)
    dtype = dequantise.dtype_of(read)
    for one in found:
        making = Making.of(stated, dtype, one.parts)
        lazy[one.name] = _Made(one, making, {held[name]: lazy[name] for name in one.parts})
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
    """A matrix that is made of stored tensors when it is read; transformers loads it by `[...]`.

    Or, where a layer can hold them, the records of these.
    """

    online = None  # what the layer does to its input

    def __init__(self, one: Logical, making: Making, held: dict[_Held, Any]) -> None:
        made = Dequantised(one.rows, making.dtype, math.prod(one.shape[:-1]), one.shape[-1])
        self._part, self._held, self._making = frameworks.Part(making.dtype, one.shape, made.read), held, making
        self.names, self.shape, self.dtype = (one.name,), one.shape, making.dtype
        self.head: Head | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is loaded."""
        return self.head.nbytes if self.head else size_of(self.shape, self.dtype)

    def get_dtype(self) -> str:
        """Data type, as safetensors names them; of records that are held, U8."""
        return "U8" if self.head else self.dtype

    def get_shape(self) -> list[int]:
        """Shape of the matrix; of records that are held, the number of their bytes."""
        return [self.head.nbytes] if self.head else [*self.shape]

    def worth(self) -> bool:
        """Whether the records are smaller than the numbers."""
        return len(self.shape) in (2, 3) and self._stored() < size_of(self.shape, self.dtype)

    def _stored(self) -> int:
        return sum(source.stored for source in self._held.values())

    def online_stated(self) -> bool:
        """Never: others' quantisation knows nothing of that."""
        return False

    def head_of_record(self) -> Head:
        """What must be known of the records."""
        size = sum(source.head_of_record().nbytes for source in self._held.values())
        return Head(size, self.dtype, self.shape, making=self._making)

    def hold(self) -> Head:
        """From now on the records are what is loaded."""
        self.head = self.head_of_record()
        return self.head

    def collected(self) -> NDArray[np.uint8]:
        """The records, the codes' first."""
        return np.concatenate([source.collected() for source in self._held.values()])

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The matrix, or rows of it; of records that are held, their bytes."""
        if self.head:
            return torch.from_numpy(self.collected())[key]
        with ExitStack() as stack:
            for held in self._held:
                stack.enter_context(held.kept())
            return self._part[key]
