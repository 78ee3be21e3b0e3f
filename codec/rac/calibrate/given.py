"""The tensors of a model folder as a caller has them, where its files state them otherwise: quantised weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rac.frameworks import Part, torch_dtype


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
