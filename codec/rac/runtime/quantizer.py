"""What transformers calls a quantizer: `from_pretrained` for folders whose weights are records.

Importing this registers it under "rac". In the safetensors files of such a folder a compressed weight is a U8 tensor
of one dimension: the record, byte for byte (runtime/record.py). All other tensors are as they always are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rac.container.wire import MAJOR, MINOR
from rac.errors import MismatchError, SourceError, UnsupportedError
from rac.runtime import record, replace
from rac.runtime.disk import Store
from rac.runtime.held import Head, Holding
from rac.runtime.layers import RacLinear
from rac.runtime.made import Made, Making
from rac.runtime.workspace import Workspace

METHOD, FORMAT = "rac", f"{MAJOR}.{MINOR}"


@register_quantization_config(METHOD)
class RacConfig(QuantizationConfigMixin):
    """`quantization_config` of a model whose weights are records.

    `format_version` is that of the .rac format that the records are in; UnsupportedError where it is not known. `made`
    says how weights are made of several tensors (rac.runtime.made). Not saved are `threads` that decode, one per core
    up to 8 by default, and for models that are made of an archive the heads of `records`, by names of the file, and
    the `store` where these stay in the file.
    """

    def __init__(
        self,
        format_version: str = FORMAT,
        threads: int | None = None,
        records: dict[str, Head] | None = None,
        made: Iterable[Mapping[str, Any]] = (),
        store: Store | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        if format_version.split(".")[0] != str(MAJOR):
            raise UnsupportedError(f"format version {format_version} is not supported (this reader knows {MAJOR})")
        self.format_version = format_version
        self.threads, self.records, self.store = threads, records, store
        ways = [Making.of(one["stated"], one["dtype"], one["names"]) for one in made]
        self.made = list(dict.fromkeys([*ways, *(h.making for h in (records or {}).values() if h.making)]))

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        out = {"quant_method": self.quant_method, "format_version": self.format_version}
        return out | ({"made": [one.to_dict() for one in self.made]} if self.made else {})


@register_quantizer(METHOD)
class RacHfQuantizer(HfQuantizer):
    """Puts compressed layers in their places before the weights are loaded, which then are the records."""

    quantization_config: RacConfig
    _names: Sequence[str] = ()
    """Of the tensors that are records."""
    requires_calibration = True  # weights are packed by `rac pack`, not here

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        records = (
            config.records if config.records is not None else heads(kwargs.get("checkpoint_files") or [], config.made)
        )
        where = replace.places(model, records).single
        if homeless := sorted(records.keys() - where.keys()):
            raise MismatchError(f"no layer of {type(model).__name__} can hold the record of {homeless[0]!r}")
        new, workspace = {where[n]: h for n, h in records.items()}, Workspace(config.threads, config.store)
        replace.replace(model, new, workspace, torch.get_default_dtype())
        config.records, config.store, self._names = None, None, list(records)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without those that would make something else of a record."""
        found = [c for c in weight_conversions if isinstance(c, WeightConverter)]
        dropped = [c for c in found if any(c.rename_source_key(n)[1] is not None for n in self._names)]
        return [c for c in weight_conversions if c not in dropped]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for layer in model.modules():
            if isinstance(layer, Holding):
                layer.settle()
            if isinstance(layer, RacLinear) and layer.bias is not None:  # what tying has padded
                layer.bias.data = layer.bias.data[: layer.out_features]
            if isinstance(layer, PreTrainedModel):  # it computes what the dense one does, in every branch
                vars(layer.config).pop("_is_quantized", None)
        replace.adapt(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return replace.dequantize(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the records again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are; the weights have no gradient."""
        return True


def heads(files: list[str], ways: Sequence[Making] = ()) -> dict[str, Head]:
    """The records in safetensors files, by name; `ways` in which several make up one. RacError where one is damaged."""
    out = {}
    for file in files:
        with safe_open(file, framework="np") as f:
            for name in f.keys():  # noqa: SIM118 - no mapping
                part = f.get_slice(name)
                shape = part.get_shape()
                if part.get_dtype() == "U8" and len(shape) == 1 and part[0:4].tobytes() == b"RREC":
                    out[name] = _head(part[0 : shape[0]], ways, file, name)
    return out


def _head(data: Any, ways: Sequence[Making], file: str, name: str) -> Head:
    """The head of bytes of records: of one, of experts, or of what weights are made of."""
    spans = record.split(data)
    tensors = [record.parse(data[a:b]).tensor for a, b in spans]
    found = {(t.dtype, t.shape) for t in tensors}
    if len(found) == 1:
        return Head(len(data), *found.pop(), len(spans))
    for way in (w for w in ways if len(spans) % len(w.names) == 0):
        each = len(way.names)
        try:
            made = [Made(data[spans[i][0] : spans[i + each - 1][1]], way) for i in range(0, len(spans), each)]
        except SourceError:
            continue
        shapes = {one.tensor.shape for one in made}
        if len(shapes) == 1:
            return Head(len(data), way.dtype, shapes.pop(), len(made), making=way)
    raise MismatchError("holds records of tensors of several shapes", file=file, unit=repr(name))
