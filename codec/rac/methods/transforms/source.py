"""A transformed model as the source of a pack: its tensors and online maps, its files with the new configuration."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from rac.encode.sources import Attachment, Source, from_arrays, open_source
from rac.errors import SourceError, TransformError
from rac.methods.transforms.rules import Parts

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def source(p: Parts, folder: str | os.PathLike[str], dtype: str = "F32") -> Source:
    """What `pack_source` packs, like the folder that the model was loaded from.

    Args:
        p: The model, transformed.
        folder: The Hugging Face folder that it came from: tokenizer and other files travel along, config.json with
            what a transform has changed.
        dtype: Data type of the tensors: "F32", "BF16" or "F16". Half precision rounds the transformed weights once.

    Raises:
        TransformError: Nobody has found that the model still computes the same (`require_same`).
        SourceError: The folder cannot be read.
    """
    if p.deviation is None:
        raise TransformError("a transformed model is not packed before require_same has compared it with the original")
    import torch

    kind = getattr(torch, _DTYPES[dtype])
    own = p.model.state_dict()
    made: dict[Any, Any] = {}
    for value in own.values():  # tied weights stay one memory
        key = value.data_ptr(), value.shape
        if key not in made:
            made[key] = value.to(kind) if value.is_floating_point() else value
    arrays = {name: made[value.data_ptr(), value.shape] for name, value in own.items()}
    tensors = []
    for t in from_arrays(arrays).tensors:
        transform = p.online.get(t.name)
        if transform is not None:
            t = replace(t, online=transform.online, matrix=transform.matrix)
        tensors.append(t)
    files = [_config(p, a, _DTYPES[dtype]) for a in open_source(folder).attachments]
    return Source("hf", tuple(tensors), tuple(files), {"format": "pt"})


def _config(p: Parts, file: Attachment, dtype: str) -> Attachment:
    """The attachment; of config.json one with what the transforms have changed."""
    if file.name != "config.json":
        return file
    try:
        stated = json.loads(file.read())
    except ValueError as e:
        raise SourceError(f"config.json is no JSON: {e}") from e
    stated.pop("torch_dtype", None)
    stated |= {"tie_word_embeddings": bool(p.model.config.tie_word_embeddings), "dtype": dtype}
    return Attachment(file.name, (json.dumps(stated, indent=2, ensure_ascii=False) + "\n").encode())
