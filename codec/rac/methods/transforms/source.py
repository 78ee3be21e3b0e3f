"""Whether a transformed model computes what it did, and such a model as the source of a pack."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from rac.encode.sources import Attachment, Source, from_arrays, open_source
from rac.errors import SourceError, TransformError
from rac.methods.transforms.rules import Parts
from rac.models.linears import frozen

MOST = 1e-3
"""Largest difference of logits, as a share of the largest logit, at which a model still computes the same."""
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def logits(model: Any, tokens: Any) -> Any:
    """(batch, n, vocabulary) float64 of token ids (n,) or (batch, n); no gradient, and dropout is off."""
    import torch

    with frozen(model), torch.no_grad():
        return model(tokens if tokens.ndim == 2 else tokens[None], use_cache=False).logits.double()


def deviation(model: Any, transformed: Any, tokens: Any) -> float:
    """Max |difference of logits| / max |logit| of the original and what came of it; infinite where there is a NaN.

    `model` may be the logits (`logits`), where it is transformed in place; `tokens` are ids (n,) or (batch, n).
    """
    before, after = (x if hasattr(x, "ndim") else logits(x, tokens) for x in (model, transformed))
    found = float((after - before).abs().max() / before.abs().max())
    return found if found == found else float("inf")


def require_same(model: Any, p: Parts, tokens: Any, most: float = MOST) -> float:
    """The deviation of a transformed model from what it was (`deviation`); TransformError where it is above `most`.

    Only a model that passes here can be packed.
    """
    found = deviation(model, p.model, tokens)
    if found > most:
        what = f"logits differ by {found:.2e} of the largest, {most:g} is allowed; it is not packed"
        raise TransformError(f"the transform has changed what the model computes: {what}")
    p.deviation = found
    return found


def source(p: Parts, folder: str | os.PathLike[str], dtype: str = "F32") -> Source:
    """What `pack_source` packs, like the Hugging Face folder that the model was loaded from.

    Tokenizer and other files of the folder travel along, config.json with what a transform has changed. `dtype` of the
    tensors is "F32", "BF16" or "F16"; half precision rounds the transformed weights once.

    TransformError where nobody has found that the model still computes the same (`require_same`); SourceError where the
    folder cannot be read.
    """
    if p.deviation is None:
        raise TransformError("a transformed model is not packed before require_same has compared it with the original")
    import torch

    kind = getattr(torch, _DTYPES[dtype])
    arrays, made = {}, {}
    for name, value in p.model.state_dict().items():
        key = value.data_ptr(), value.shape  # tied weights stay one memory
        if key not in made:
            made[key] = value.to(kind) if value.is_floating_point() else value
        arrays[name] = made[key]
    maps: dict[str, dict[str, Any]] = {name: {"online": t.online, "matrix": t.matrix} for name, t in p.online.items()}
    tensors = [replace(t, **maps.get(t.name, {})) for t in from_arrays(arrays).tensors]
    stored = open_source(folder, dequantise=True)
    files = tuple(_config(p, a, _DTYPES[dtype]) for a in stored.attachments)
    return Source("hf", tuple(tensors), files, {"format": "pt"}, dequantised=stored.dequantised)


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
