"""The tensors of a model folder as a caller has them, where its files state them otherwise: quantised weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.frameworks import to_framework, torch_dtype
from rac.registry import DTYPES


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor, made when it is read, as a slice of a safetensors file is: `part[...]`, `part[0]`, `part[2, 5]`."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], NDArray[np.uint8]]  # its bytes [start, stop)

    def get_dtype(self) -> str:
        """Data type, as safetensors names them."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.shape)

    def __getitem__(self, key: Any) -> Any:
        """A torch tensor; of one or more leading integers only these rows are made."""
        size = math.prod(self.shape) * DTYPES[self.dtype].bits // 8
        at = key if isinstance(key, tuple) else (key,)
        if self.shape and len(at) < len(self.shape) and all(type(i) is int for i in at):
            inner = self.shape[len(at) :]
            width = size // math.prod(self.shape[: len(at)])
            start = int(np.ravel_multi_index(at, self.shape[: len(at)])) * width
            return to_framework(np.ascontiguousarray(self.read(start, start + width)), self.dtype, inner, "pt")
        return to_framework(np.ascontiguousarray(self.read(0, size)), self.dtype, self.shape, "pt")[key]


@dataclass(frozen=True, slots=True)
class Given:
    """A model folder with other weights than those in its files: all tensors, by name. It is a path, the folder's."""

    path: str
    parts: Mapping[str, Part]

    def __fspath__(self) -> str:
        return self.path

    @property
    def about(self) -> str:
        """What a digest of a calibration says of them, whose content follows from the files."""
        return "dequantised"

    @classmethod
    def of(cls, path: str, tensors: Iterable[Any]) -> Given:
        """Tensors with `name`, `dtype`, `shape` and `read`, but for those of files beside the model's."""
        mine = (t for t in tensors if ".safetensors::" not in t.name)
        return cls(path, {t.name: Part(t.dtype, tuple(t.shape), t.read) for t in mine})

    def load(self, kind: Any, config: Any, dtype: Any) -> Any:
        """A model of a class of transformers; `dtype` "auto": that of the configuration, else of most weights."""
        for part in (config, getattr(config, "text_config", None)):
            for stated in ("quantization_config", "compression_config"):
                if part is not None and hasattr(part, stated):
                    delattr(part, stated)
        if dtype == "auto":
            names = [part.dtype for part in self.parts.values() if part.dtype in ("F16", "BF16", "F32")]
            dtype = getattr(config, "dtype", None) or torch_dtype(max(set(names), key=names.count, default="F32"))
        if mapping := getattr(kind, "_model_mapping", None):  # a class that finds the class by the folder, of which
            kind = mapping[type(config)]  # there is none here
        return kind.from_pretrained(None, config=config, state_dict=dict(self.parts), dtype=dtype)
