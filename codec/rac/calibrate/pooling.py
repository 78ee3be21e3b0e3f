"""How a sentence encoder makes one embedding of a text, as its folder says (sentence-transformers' `modules.json`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_POOLED: dict[str, Callable[[Any], Any]] = {
    "cls_token": lambda hidden: hidden[0],
    "mean_tokens": lambda hidden: hidden.mean(0),
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "max_tokens": lambda hidden: hidden.amax(0),
    "weightedmean_tokens": lambda hidden: (hidden * _rising(hidden)).sum(0),
    "lasttoken": lambda hidden: hidden[-1],
}
"""Names of `pooling_mode_...` to what makes (width,) of hidden states (tokens, width)."""


def _rising(hidden: Any) -> Any:
    places = hidden.new_ones(len(hidden), 1).cumsum(0)
    return places / places.sum()


LENGTHS = 16, 64, 256
"""Tokens of the sequences that a sentence encoder is calibrated on: what is embedded is short or long."""
_LEAST = 1 << 13  # characters of a text for each of these lengths


def pooling(folder: str | os.PathLike[str]) -> list[str]:
    """Names of how a folder's encoder pools, of which the embeddings are joined; none where it says nothing known."""
    try:
        modules = json.loads((Path(folder) / "modules.json").read_text(encoding="utf-8"))
        places = [str(m["path"]) for m in modules if str(m["type"]).endswith("Pooling")]
        config = json.loads((Path(folder) / places[0] / "config.json").read_text(encoding="utf-8")) if places else {}
        model = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if any("CausalLM" in str(kind) for kind in model.get("architectures") or ()):
            return []  # its predictions are what it is calibrated by
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return []
    if not isinstance(config, Mapping):
        return []
    given = config.get("pooling_mode", [])  # of newer ones: "mean", or several
    named = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    short = {name: name.removesuffix("s").removesuffix("_token") for name in _POOLED}
    return [name for name in _POOLED if config.get(f"pooling_mode_{name}") is True or short[name] in named]


def readings(
    folder: str | os.PathLike[str], text: str | None, tokens: int, context: int
) -> list[tuple[str | None, int, int]]:
    """Text, tokens and longest sequence of each calibration that a model on a text comes to: one of most models.

    An encoder that pools has one for each length, on a part of the text of its own; `context` is the longest.
    """
    lengths = [n for n in LENGTHS if n <= context] if text is not None and pooling(folder) else []
    count = min(len(lengths), len(text or "") // _LEAST)
    if text is None or count < 2:
        return [(text, tokens, min(context, LENGTHS[-1]) if lengths else context)]
    at = [len(text) * k // count for k in range(count + 1)]
    return [(text[a:b], tokens // count, n) for a, b, n in zip(at, at[1:], lengths[-count:], strict=False)]


def pooled(hidden: Any, how: Sequence[str]) -> Any:
    """The embedding, of length 1, of hidden states (tokens, width)."""
    import torch

    joined = torch.cat([_POOLED[name](hidden) for name in how])
    return joined / joined.norm().clamp(min=1e-30)
