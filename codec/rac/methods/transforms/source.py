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
    """Max |difference of logits| / max |logit|; infinite where there is a NaN.

    Args:
        model: The original, or its logits (`logits`), where it is transformed in place.
        transformed: What came of it.
        tokens: Ids (n,) or (batch, n), on the device of the models.
    """
    before, after = (x if hasattr(x, "ndim") else logits(x, tokens) for x in (model, transformed))
    found = float((after - before).abs().max() / before.abs().max())
    return found if found == found else float("inf")


def require_same(model: Any, p: Parts, tokens: Any, most: float = MOST) -> float:
    """The deviation of a transformed model from what it was (`deviation`); only one that passes here can be packed.

    Raises:
        TransformError: It is above `most`.
    """
    found = deviation(model, p.model, tokens)
    if found > most:
        raise TransformError(
            f"the transform has changed what the model computes: logits differ by {found:.2e} of the largest, "
            f"{most:g} is allowed; it is not packed"
        )
    p.deviation = found
    return found


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
    arrays, made = {}, {}
    for name, value in p.model.state_dict().items():
        key = value.data_ptr(), value.shape  # tied weights stay one memory
        if key not in made:
            made[key] = value.to(kind) if value.is_floating_point() else value
        arrays[name] = made[key]
    maps: dict[str, dict[str, Any]] = {name: {"online": t.online, "matrix": t.matrix} for name, t in p.online.items()}
    tensors = [replace(t, **maps.get(t.name, {})) for t in from_arrays(arrays).tensors]
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
