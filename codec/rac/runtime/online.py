"""Layers that map their input before the weight (format_spec/stages/online.md), for weights that are dense.

A hook in front of the layer does it; a compressed layer does it by itself (rac.runtime.layers). Files of transformers
have no place for the map, so that such a model is not saved unless it is folded: its weights then do it too.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rac.errors import UnsupportedError
from rac.linalg.transform import Transform, hook, hooked, unhook
from rac.runtime.replace import places


def attach(model: Any, found: Mapping[str, Transform], file: str) -> None:
    """Give the layers of a model of transformers their maps, by the names that their weights have in a file.

    UnsupportedError where there is no plain linear layer of that width for one.
    """
    where = places(model, found) if found else {}
    if homeless := sorted(found.keys() - where.keys()):
        what = f"has an online transform, and no layer of {type(model).__name__} that could run it"
        raise UnsupportedError(what, file=file, unit=repr(homeless[0]))
    for name, transform in found.items():
        layer = model.get_submodule(where[name].removesuffix(".weight"))
        if type(layer) is not nn.Linear or layer.in_features != transform.width:
            what = f"has an online transform ({transform.describe()}), its layer is a {type(layer).__name__}"
            raise UnsupportedError(what, file=file, unit=repr(where[name]))
        hook(layer, transform)
    if found:
        guard(model)


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
        fold_layer(layer)
    model.__dict__.pop("save_pretrained", None)
    return model


@torch.no_grad()
def fold_layer(layer: Any) -> None:
    """Where a hook maps the layer's input, put the map into the weight, rounded to its data type, and unhook it."""
    if (transform := hooked(layer)) is not None:
        w = layer.weight
        wide = w if w.dtype == torch.float64 else w.float()
        layer.weight = nn.Parameter(transform.fold(wide).to(w.dtype), requires_grad=w.requires_grad)
        unhook(layer)
