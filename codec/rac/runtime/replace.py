"""Which layers of a transformers model can stay compressed, and putting them in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from rac.errors import MismatchError
from rac.records import Entry
from rac.runtime.layers import Compressed, Head, RacEmbedding, RacLinear
from rac.runtime.workspace import Workspace
from rac.stages.table import is_resident

FLOATS = ("F32", "F16", "BF16")


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
