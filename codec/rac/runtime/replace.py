"""Layers of a transformers model in place of others: compressed ones, dense ones, and maps of their inputs.

Which layers can stay compressed is said in `places`. A compressed layer that becomes dense, for all of a model, for its
embeddings, for a merged adapter, changes its class and its weight, and stays the object that it is. So whatever holds
it, the layer of an adapter or the hook of an offloader, holds the dense one from then on.

A hook in front of a dense layer maps its input (format_spec/stages/online.md); a compressed layer does it by itself
(rac.runtime.layers). Files of transformers have no place for the map, so that such a model is not saved unless it is
folded: its weights then do it too.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from rac.errors import MismatchError, UnsupportedError
from rac.linalg.transform import Transform, hook, hooked, unhook
from rac.records import Entry
from rac.runtime.layers import Compressed, Head, RacEmbedding, RacLinear
from rac.runtime.workspace import Workspace
from rac.stages.table import is_resident

FLOATS = ("F32", "F16", "BF16")
_OWN = ("head", "workspace", "dense_bytes", "_stored", "_resident", "_online", "transposed")


def worth(e: Entry) -> bool:
    """Whether the record of an index row is a matrix of floats that the coder made smaller."""
    return e.dtype in FLOATS and len(e.shape) == 2 and is_resident(e.method)


def places(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names of a file to the names of the parameters that they are, as transformers loads them.

    Only weights of plain linear layers, embeddings and Conv1D are listed: subclasses may look at their weight, and
    so do the layers that transformers wants in float32 (the T5 feed-forward output). What transformers makes of
    several tensors is not listed either, nor what is tied to a weight that is not.
    """
    known = get_model_conversion_mapping(model)
    renamings = [c for c in known if isinstance(c, WeightRenaming)]
    converters = [c for c in known if isinstance(c, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    out: dict[str, str] = {}
    for name in names:
        key, converter = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, converter = rename_source_key(name, [], [], prefix, state)
        if converter is None and key in state and _plain(model, key, kept):
            out[name] = key
    tied = list(getattr(model, "all_tied_weights_keys", {}).items())
    dense: set[str] = set()
    for _ in tied:  # what is tied to a dense weight is dense, and so on
        for pair in tied:
            if not all(_plain(model, key, kept) for key in pair) or dense & set(pair):
                dense |= set(pair)
    return {name: key for name, key in out.items() if key not in dense}


def _plain(model: Any, key: str, kept: list[str]) -> bool:
    """Whether a parameter is the weight of a layer that can be replaced."""
    path, _, leaf = key.rpartition(".")
    if leaf != "weight" or any(re.search(rf"(?:^|\.){k}(?:\.|$)", path) for k in kept):
        return False
    module = model.get_submodule(path)
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.sparse
    return type(module) in (nn.Linear, Conv1D)


def replace(model: Any, heads: Mapping[str, Head], workspace: Workspace, dtype: torch.dtype) -> None:
    """Replace the layers of a model on the meta device whose weights the file has as records.

    `heads` go by names of parameters as `places` gives them; `workspace` is shared by all new layers, `dtype` that of
    the numbers between them. MismatchError where a record has another shape than its layer; the model is then partly
    replaced.
    """
    heads = dict(heads)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():  # one record for all that are tied
        for a, b in ((target, source), (source, target)):
            if a in heads and b not in heads and _plain(model, b, []):
                heads[b] = heads[a]
    new: dict[int, nn.Module] = {}
    for key, head in heads.items():
        old = model.get_submodule(key.removesuffix(".weight"))
        if tuple(old.weight.shape) != head.shape:
            what = f"the file has {list(head.shape)}, the layer needs {list(old.weight.shape)}"
            raise MismatchError(what, unit=repr(key))
        with old.weight.device:
            if isinstance(old, nn.Embedding):
                layer: Compressed = RacEmbedding(head, workspace, old.padding_idx, dtype)
            else:
                layer = RacLinear(head, workspace, old.bias, isinstance(old, Conv1D), dtype)
        new[id(old)] = layer.train(old.training)
    for parent in list(model.modules()):
        parent._modules |= {name: new[id(child)] for name, child in parent._modules.items() if id(child) in new}


def densify(*layers: Any, dtype: torch.dtype | None = None, folded: bool = False) -> bool:
    """Make these layers dense in their places; those that share a record share the weight. Others stay as they are.

    The data type is that of the numbers that come out of each layer, or `dtype`. Returns True where layers map their
    inputs still, by a hook now (rac.linalg.transform); `folded` folds such maps into the weights, which are rounded
    once more for it. RacError where a record is damaged, or its bytes are not in memory.
    """
    hooks = False
    made: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}  # of the record, which keeps it and so its id alive
    for layer in layers:
        if not isinstance(layer, Compressed):
            continue
        record, online = layer.weight, layer.online() if isinstance(layer, RacLinear) else None
        if id(record) not in made:
            dense = layer.dense().to(dtype or layer.compute_dtype)
            if folded and online is not None:
                dense = online.fold(dense.float()).to(dense.dtype)
            made[id(record)] = record, nn.Parameter(dense, requires_grad=False)
        layer.workspace.forget(layer)
        kind: type[nn.Module] = nn.Embedding if isinstance(layer, RacEmbedding) else nn.Linear
        if isinstance(layer, RacLinear) and layer.transposed:
            kind = Conv1D
            layer.nx, layer.nf = layer.in_features, layer.out_features
            del layer.in_features, layer.out_features
        del layer.weight  # which may be a buffer
        layer.weight = made[id(record)][1]
        for name in _OWN:
            layer.__dict__.pop(name, None)
        del layer._as
        layer.__class__ = kind  # type: ignore[assignment]
        if online is not None and not folded:
            hook(layer, online)
            hooks = True
    return hooks


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Make all compressed layers of a model dense, in `dtype` or that of each layer; returns the model."""
    if densify(*model.modules(), dtype=dtype):
        _guard(model)
    return model


def attach(model: Any, found: Mapping[str, Transform], file: str) -> None:
    """Give the layers of a model of transformers their maps, by the names that their weights have in a file.

    UnsupportedError where there is no plain linear layer of that width for one.
    """
    if not found:
        return
    where = places(model, found)
    if homeless := sorted(found.keys() - where.keys()):
        what = f"has an online transform, and no layer of {type(model).__name__} that could run it"
        raise UnsupportedError(what, file=file, unit=repr(homeless[0]))
    for name, transform in found.items():
        layer = model.get_submodule(where[name].removesuffix(".weight"))
        if type(layer) is not nn.Linear or layer.in_features != transform.width:
            what = f"has an online transform ({transform.describe()}), its layer is a {type(layer).__name__}"
            raise UnsupportedError(what, file=file, unit=repr(where[name]))
        hook(layer, transform)
    _guard(model)


def _guard(model: Any) -> None:
    """Let `save_pretrained` refuse."""
    model.save_pretrained = types.MethodType(_refuse, model)


def _refuse(model: Any, *_: Any, **__: Any) -> None:
    raise UnsupportedError(
        f"{type(model).__name__} has layers with online transforms, which such files cannot state; "
        "rac.runtime.fold(model) puts them into the weights"
    )


@torch.no_grad()
def fold(model: Any) -> Any:
    """Put the maps into the weights, rounded to their data type, and take the hooks away; returns the model."""
    for layer in model.modules():
        _fold(layer)
    model.__dict__.pop("save_pretrained", None)
    return model


@torch.no_grad()
def _fold(layer: Any) -> None:
    """Where a hook maps the layer's input, put the map into the weight, rounded to its data type, and unhook it."""
    if (transform := hooked(layer)) is not None:
        w = layer.weight
        wide = w if w.dtype == torch.float64 else w.float()
        layer.weight = nn.Parameter(transform.fold(wide).to(w.dtype), requires_grad=w.requires_grad)
        unhook(layer)


def resizable(model: Any) -> None:
    """Let `resize_token_embeddings` of a model make the embeddings, and an output layer, dense first."""
    model.resize_token_embeddings = functools.partial(_resize, model)


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    if new_num_tokens is not None or pad_to_multiple_of is not None:
        densify(model.get_input_embeddings(), model.get_output_embeddings())
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


_OUTPUTS = ("lora", "ia3", "vera")
"""Kinds of adapters of peft that ask a layer for its output alone, until they are merged."""


def _wrapped(module: nn.Module, name: str, layer: nn.Module | None) -> None:
    """Called for each module that becomes part of another: what reads the weight of a layer gets a dense one.

    Adapters of peft call what they adapt `base_layer`, and what is trained in whole or for some tokens
    `original_module`.
    """
    where = type(module).__module__.split(".")
    if layer is None or where[0] != "peft":
        return
    if name == "original_module":
        densify(*layer.modules())
    if name != "base_layer" or not (isinstance(layer, Compressed) or hooked(layer) is not None):
        return
    if where[2] not in _OUTPUTS:
        if getattr(layer, "transposed", False):
            what = f"a {type(module).__name__} of {'.'.join(where[:3])} cannot adapt the Conv1D that it would become"
            raise UnsupportedError(f"{what}; load the model dense")
        _bare(module, layer)
    for method in ("merge", "update_layer"):
        if hasattr(type(module), method):
            setattr(module, method, functools.partial(_needing if method == "merge" else _updated, module, method))


def _updated(module: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """`update_layer` of an adapter's layer: some variants of LoRA read the weight, or begin with a part of it."""
    asked = kwargs | (vars(kwargs["config"]) if "config" in kwargs else {})
    begin = asked.get("init_lora_weights", True)
    if asked.get("use_dora") or (isinstance(begin, str) and begin != "gaussian"):
        return _needing(module, method, *args, **kwargs)
    return getattr(type(module), method)(module, *args, **kwargs)


def _needing(module: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """A method of an adapter's layer that reads the weight of what it adapts, or adds to it."""
    _bare(module, module.get_base_layer())
    return getattr(type(module), method)(module, *args, **kwargs)


def _bare(module: Any, layer: Any) -> None:
    """Make what an adapter adapts a dense layer without a map: it works on what the input was before that."""
    densify(layer, folded=True)
    _fold(layer)
    if isinstance(layer, Conv1D):  # peft took it for nn.Linear, whose weight is the other way round
        module.fan_in_fan_out = True


register_module_module_registration_hook(_wrapped)
