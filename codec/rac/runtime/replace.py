"""Layers of a transformers model in place of others: compressed ones, dense ones, and maps of their inputs.

Which layers can stay compressed is said in `places`. A compressed layer that becomes dense, for all of a model, for its
embeddings, for a merged adapter, changes its class and its weight, and stays the object that it is. So whatever holds
it, the layer of an adapter or the hook of an offloader, holds the dense one from then on.

A hook in front of a dense layer maps its input (format_spec/stages/online.md); a compressed layer does it by itself
(rac.runtime.layers). Files of transformers have no place for the map, so that such a model is not saved unless it is
folded: its weights then do it too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rac.errors import MismatchError, UnsupportedError
from rac.linalg.transform import Transform, hook, hooked, unhook
from rac.models.names import Names
from rac.records import Entry
from rac.runtime.held import Head, Held, Holding, hold, release, size_of
from rac.runtime.layers import Compressed, RacEmbedding, RacLinear
from rac.runtime.memory import Budget, megabytes
from rac.runtime.reads import read_by_others
from rac.runtime.workspace import Workspace
from rac.stages.table import is_resident

FLOATS = ("F32", "F16", "BF16")
_OWN = (
    *("head", "workspace", "dense_bytes", "_stored", "_resident", "_online", "transposed", "_map", "_views", "_kind"),
    "turned",
    "banded",
)


def worth(e: Entry) -> bool:
    """Whether the record of an index row is a matrix of floats, or one for each expert, that the coder made smaller."""
    return e.dtype in FLOATS and len(e.shape) in (2, 3) and is_resident(e.method)


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """Where the tensors of a file can stay compressed in a model."""

    single: Mapping[str, str]
    """Names of tensors to those of the parameters that they are."""
    fused: Mapping[str, tuple[str, ...]]
    """Names of parameters (experts, ., .) to those of the tensors that they are made of, expert after expert."""
    read: Mapping[str, str]
    """Paths of layers that are dense since another module reads their weight at each step, and the method that does."""


def places(model: Any, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Places:
    """Where tensors of a file, by these names, can stay compressed.

    These are weights of linear layers, embeddings and Conv1D, and of classes derived from them, and parameters with a
    matrix for each expert. Not those that transformers wants in float32 (the T5 feed-forward output), that others than
    their layer read at each step, or that transformers computes of what the file has, nor what is tied to one of these.
    `shapes` are of all tensors of the file: those that a parameter (experts, ., .) is made of are found with them.
    """
    names, read, found = list(names), read_by_others(model), Names(model)
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]

    def can(key: str) -> bool:
        return _can(model, key, kept) and key.rpartition(".")[0] not in read

    single: dict[str, str] = {}
    for name in names:
        key, converter, _ = found.key(name)
        if key in found.state and can(key) and (converter is None or (name == key and not shapes)):
            single[name] = key
    fused = _fused(found, set(names), shapes or {}, can)
    dense: set[str] = set()
    tied = list(getattr(model, "all_tied_weights_keys", {}).items())
    for _ in tied:  # what is tied to a dense weight is dense, and so on
        for pair in tied:
            if not all(can(key) for key in pair) or dense & set(pair):
                dense |= set(pair)
    single = {name: key for name, key in single.items() if key not in dense}
    _leave_parameters(model, single, fused)
    spared = {path: where for path, where in read.items() if _can(model, f"{path}.weight", kept)}
    return Places(single, {key: parts for key, parts in fused.items() if key not in dense}, spared)


def _leave_parameters(model: Any, single: dict[str, str], fused: Mapping[str, Any]) -> None:
    """Take from `single` the smallest layer of each model, of the ones in it too, that no parameter would be left of.

    transformers, and many programs, ask the first parameter of a model for its data type.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    inner = [(path, m) for path, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    for path, module in reversed(inner):
        prefix = f"{path}." if path else ""
        held = {*single.values(), *fused}
        mine = {f"{prefix}{n}": p for n, p in module.named_parameters() if p.is_floating_point()}
        if not mine or any(key not in held and tied.get(key) not in held for key in mine):
            continue
        free = [k for k in mine if k in single.values() and k not in tied and k not in tied.values()]
        if free:
            least = min(free, key=lambda k: mine[k].numel())
            for name in [n for n, key in single.items() if key == least]:
                del single[name]


def _fused(
    found: Names, worthy: set[str], shapes: Mapping[str, tuple[int, ...]], can: Callable[[str], bool]
) -> dict[str, tuple[str, ...]]:
    """Parameters that transformers stacks, or finds as they are: all that one of its conversions makes, or none."""
    made: dict[str, dict[str, list[str]]] = {}
    by: dict[str, WeightConverter] = {}
    for name in sorted(shapes, key=dot_natural_key):
        key, converter, pattern = found.key(name)
        if converter is not None:
            by[key] = converter
            made.setdefault(key, {}).setdefault(pattern, []).append(name)
    out: dict[str, tuple[str, ...]] = {}
    refused: set[int] = set()
    for key, parts in made.items():
        names = tuple(itertools.chain(*zip(*(parts.get(p, []) for p in by[key].source_patterns), strict=False)))
        whole = (key in found.state and tuple(found.state[key].shape)) or ()
        fits = (
            len(names) == sum(map(len, parts.values()))
            and set(names) <= worthy
            and len({shapes[n] for n in names}) == 1
        )
        if fits and can(key) and _stacks(by[key], [shapes[n] for n in names], whole):
            out[key] = names
        else:
            refused.add(id(by[key]))
    return {key: names for key, names in out.items() if id(by[key]) not in refused}


def _stacks(converter: WeightConverter, parts: list[tuple[int, ...]], whole: tuple[int, ...]) -> bool:
    """Whether a conversion stacks the matrices of experts, one below the other, or leaves a tensor of this shape."""
    kinds = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    if kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return Head(0, "", parts[0], len(parts)).fits(whole)
    return len(parts) == 1 and _turns(converter) and whole in (parts[0], (parts[0][0], *parts[0][:0:-1]))


def _turns(converter: WeightConverter | None) -> bool:
    """Whether a conversion swaps the last two of three dimensions where they are not as the model has them."""
    if converter is None or len(converter.operations) != 1:
        return False
    op = converter.operations[0]
    return type(op) is Transpose and bool(op.check_dims) and (op.dim0, op.dim1) == (1, 2)


def _can(model: Any, key: str, kept: list[str]) -> bool:
    """Whether a parameter can be held as a record."""
    path, _, leaf = key.rpartition(".")
    if any(re.search(rf"(?:^|\.){k}(?:\.|$)", path) for k in kept):
        return False
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.sparse and (type(module) is nn.Embedding or not _torch(module))
    if leaf == "weight" and isinstance(module, nn.Linear | Conv1D):
        return type(module) in (nn.Linear, Conv1D) or not _torch(module)
    own = module._parameters.get(leaf)
    return own is not None and own.dim() == 3 and own.shape[0] > 1 and not _torch(module)


def plain(model: Any, key: str) -> bool:
    """Whether a parameter is the weight of a layer that applies what a record states of its input."""
    return type(model.get_submodule(key.rpartition(".")[0])) in (nn.Linear, nn.Embedding, Conv1D)


def _torch(module: nn.Module) -> bool:
    """Whether the class of a module is torch's own, which others of its classes may know too well."""
    return type(module).__module__.startswith("torch.")


def replace(model: Any, heads: Mapping[str, Head], workspace: Workspace, dtype: torch.dtype) -> None:
    """Replace the layers of a model on the meta device whose weights the file has as records.

    `heads` go by names of parameters as `places` gives them; `workspace` is shared by all new layers, `dtype` that of
    the numbers between them. MismatchError where a record has another shape than its layer; the model is then partly
    replaced.
    """
    heads = dict(heads)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():  # one record for all that are tied
        for a, b in ((target, source), (source, target)):
            if a in heads and b not in heads and _can(model, b, []):
                heads[b] = heads[a]
    known = functools.cache(lambda: Names(model))  # for experts that are one tensor alone
    new: dict[int, nn.Module] = {}
    others: dict[str, dict[str, Head]] = {}
    for key, head in heads.items():
        path, _, leaf = key.rpartition(".")
        old = model.get_submodule(path)
        if head.parts == 1 and len(head.shape) == 3 and not head.fits(tuple(old._parameters[leaf].shape)):
            head = dataclasses.replace(head, turned=_turns(known().key(key)[1]))
        if not head.fits(tuple(old._parameters[leaf].shape)):
            what = f"the file has {list(head.shape)}, the layer needs {list(old._parameters[leaf].shape)}"
            raise MismatchError(what, unit=repr(key))
        with old._parameters[leaf].device:
            if type(old) is nn.Embedding:
                layer: Compressed = RacEmbedding(head, workspace, old.padding_idx, dtype)
            elif type(old) in (nn.Linear, Conv1D):
                layer = RacLinear(head, workspace, old.bias, isinstance(old, Conv1D), dtype)
            else:
                others.setdefault(path, {})[leaf] = head
                continue
        new[id(old)] = layer.train(old.training)
    for parent in list(model.modules()):
        parent._modules |= {name: new[id(child)] for name, child in parent._modules.items() if id(child) in new}
    for path, mine in others.items():
        hold(model.get_submodule(path), mine, workspace, dtype)


@torch.compiler.disable
def densify(*layers: Any, dtype: torch.dtype | None = None, folded: bool = False) -> bool:
    """Make these layers dense in their places; those that share a record share the weight. Others stay as they are.

    The data type is that of the numbers that come out of each layer, or `dtype`. Returns True where layers map their
    inputs still, by a hook now (rac.linalg.transform); `folded` folds such maps into the weights, which are rounded
    once more for it. RacError where a record is damaged, or its bytes are not in memory.
    """
    hooks = False
    made: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}  # of the record, which keeps it and so its id alive
    for layer in (layer for layer in layers if isinstance(layer, Holding)):
        online = layer.online() if isinstance(layer, RacLinear) else None
        for name in layer._names:
            source, record = layer.source(name), layer.record_of(name)
            if id(record) not in made:
                dense = source.dense().to(dtype or source.compute_dtype)
                if folded and online is not None:
                    dense = online.fold(dense.float()).to(dense.dtype)
                made[id(record)] = record, nn.Parameter(dense, requires_grad=False)
                if (read := source.workspace.weights.pop(id(record), None)) is not None:
                    read.become(made[id(record)][1])
        _bared(layer, {name: made[id(layer.record_of(name))][1] for name in layer._names})
        if online is not None and not folded:
            hook(layer, online)
            hooks = True
    return hooks


def _bared(layer: Any, weights: dict[str, nn.Parameter]) -> None:
    """Make a layer one of its dense class, with these weights."""
    if isinstance(layer, Held):
        release(layer, weights)
        return
    layer.workspace.forget(layer)
    kind: type[nn.Module] = nn.Embedding if isinstance(layer, RacEmbedding) else nn.Linear
    if isinstance(layer, RacLinear) and layer.transposed:
        kind = Conv1D
        layer.nx, layer.nf = layer.in_features, layer.out_features
        del layer.in_features, layer.out_features
    del layer.weight  # which may be a buffer
    for name in layer.beside:
        layer._buffers.pop(name, None)
    for name in _OWN:
        layer.__dict__.pop(name, None)
    del layer._as
    layer.__class__ = kind
    layer.weight = weights["weight"]


@dataclasses.dataclass(frozen=True, slots=True)
class Residency:
    """What a model holds in memory."""

    records: int
    """Weights that are records, or codes."""
    held: int
    """Bytes of records."""
    instead: int
    """Bytes of these weights, dense, in the data type of the file."""
    weights: int
    """Numbers of all weights, those that are records too."""
    others: Mapping[str, int]
    """Bytes of all other parameters, by name; what is tied once."""
    budget: Budget | None = None
    """Where records stay in the file: what of the memory is for what."""
    stay: str = Compressed.stay
    """What these weights do, for people."""

    def __str__(self) -> str:
        """One line."""
        dense = sum(self.others.values())
        most = sorted(self.others, key=lambda name: -self.others[name])[:3]
        named = ", ".join(f"{name} {megabytes(self.others[name])}" for name in most)
        held = f"{self.records} weights {self.stay}, {megabytes(self.held)} instead of {megabytes(self.instead)}"
        if self.budget is not None:
            held = held.replace("stay compressed", "stay in the file and are read when they are used")
            return f"{held}; memory for weights: {self.budget}"
        return f"{held}; dense: {megabytes(dense)}" + (
            f" ({named}{', ...' if len(self.others) > 3 else ''})" if most else ""
        )


def residency(model: Any) -> Residency:
    """What a model holds as records and what dense; buffers that are no records are left out."""
    seen: set[int] = set()
    records = held = instead = weights = 0
    budget: Budget | None = None
    stay = Compressed.stay
    for module in model.modules():
        for name in getattr(module, "_names", ()) if isinstance(module, Holding) else ():
            if id(record := module.record_of(name)) not in seen:
                seen.add(id(record))
                source, stay = module.source(name), getattr(module, "stay", stay)
                numbers = math.prod(source.shape)
                filed = module.filed(name) if record.device.type != "meta" else None
                size = getattr(source, "nbytes", record.nbytes)  # of codes, with their scales
                if filed is not None:
                    size, budget = filed.store.reader.stored_size(filed.tickets), filed.store.budget
                records, held, weights = records + 1, held + size, weights + numbers
                instead += size_of(source.shape, source.head.dtype)
    others = {n: p.nbytes for n, p in model.named_parameters() if id(p) not in seen}
    weights += sum(p.numel() for p in model.parameters() if id(p) not in seen)
    return Residency(records, held, instead, weights, others, budget, stay)


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Make all compressed layers of a model dense, in `dtype` or that of each layer; returns the model."""
    if densify(*model.modules(), dtype=dtype):
        guard(model)
    return model


def attach(model: Any, found: Mapping[str, Transform], file: str) -> None:
    """Give the layers of a model of transformers their maps, by the names that their weights have in a file.

    UnsupportedError where there is no plain linear layer of that width for one.
    """
    if not found:
        return
    where = places(model, found).single
    if homeless := sorted(found.keys() - where.keys()):
        what = f"has an online transform, and no layer of {type(model).__name__} that could run it"
        raise UnsupportedError(what, file=file, unit=repr(homeless[0]))
    for name, transform in found.items():
        layer = model.get_submodule(where[name].removesuffix(".weight"))
        if type(layer) is not nn.Linear or layer.in_features != transform.width:
            what = f"has an online transform ({transform.describe()}), its layer is a {type(layer).__name__}"
            raise UnsupportedError(what, file=file, unit=repr(where[name]))
        hook(layer, transform)
    guard(model)


def bind(model: Any) -> None:
    """Let `save_pretrained` refuse as long as weights of the model are in a file: it would save where they are."""
    model.save_pretrained = functools.partial(_save, model)


def _save(model: Any, *args: Any, **kwargs: Any) -> Any:
    far = (m for m in model.modules() if isinstance(m, Holding) and any(m.filed(n) is not None for n in m._names))
    if next(far, None) is not None:
        what = "the weights of this model stay in its file: copy that, or load it with another `resident` to save it"
        raise UnsupportedError(what, file=model.name_or_path)
    return type(model).save_pretrained(model, *args, **kwargs)


def guard(model: Any) -> None:
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


def adapt(model: Any) -> None:
    """Let `resize_token_embeddings` of a model make the embeddings, and an output layer, dense first.

    And `num_parameters` count the weights that are records.
    """
    model.resize_token_embeddings = functools.partial(_resize, model)
    model.num_parameters = functools.partial(_count, model)


def _count(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As of transformers; a weight that is a record has as many numbers as it stands for, none of them trainable."""
    left: set[int] = set()
    found: dict[int, int] = {}
    for m in model.modules():
        mine = {id(p): p.numel() for p in m._parameters.values() if p is not None}
        if only_trainable:
            mine = {id(p): p.numel() for p in m._parameters.values() if p is not None and p.requires_grad}
        elif isinstance(m, Holding):
            mine |= {id(m.record_of(name)): math.prod(m.source(name).shape) for name in m._names}
        found |= mine
        if exclude_embeddings and isinstance(m, nn.Embedding):
            left |= mine.keys()
    return sum(n for key, n in found.items() if key not in left)


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
    if name != "base_layer" or not (isinstance(layer, Holding) or hooked(layer) is not None):
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
