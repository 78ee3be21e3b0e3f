"""Folders of models with weights that torch pickled: `pytorch_model.bin`, its shards, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from rac.encode.sources.model import Source, SourceTensor
from rac.encode.sources.others import torch

_WEIGHTS = re.compile(r"(.*/)?(\w+_)?(pytorch_model|adapter_model|consolidated|model)[^/]*\.(bin|pt|pth)")


def weights(files: Sequence[str]) -> list[str]:
    """The files that hold weights, by their names: optimisers and arguments of a training are pickles, too."""
    return [f for f in files if _WEIGHTS.fullmatch(f)]


def read(root: str, files: Sequence[str]) -> Source:
    """The tensors of these files; a name that another file has already is `FILE::NAME`."""
    found, taken = [], set[str]()
    tensors: list[SourceTensor] = []
    for file in files:
        found.append(torch.checkpoint(f"{root}/{file}", file, True))
        for t in found[-1].tensors:
            again = t.name in taken
            tensors.append(replace(t, name=f"{file}::{t.name}") if again else t)
            taken.add(t.name)
    return torch.whole("hf", root, tensors, found)
