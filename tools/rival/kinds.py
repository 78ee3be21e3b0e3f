"""What is measured of a model on a text, by its kind: predictions of a causal language model, embeddings of an encoder.

A kind says how its cells are headed, which figure is the loss (0 for the original; rates are compared where it is
equal), how much of a text it takes, and whether it can be tuned afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rac.calibrate.evaluate import Measure
from rac.calibrate.passes import model_class
from rac.calibrate.pooling import pooled, pooling
from rac.calibrate.reader import is_causal

WORDS = 5
"""Words of a sentence, at least."""
Tensors = Mapping[str, Any]


class Predictions:
    """A causal language model: KL, top-1 and perplexity on so many tokens."""

    heads, loss, amount, learns = ("KL", "top-1", "perplexity"), "kl", 8192, True

    def __init__(self, folder: Path, text: str, tokens: int, _: int | None = None) -> None:
        self._measure = Measure(folder, text, tokens)

    def original(self) -> dict[str, float]:
        """Figures of the original."""
        return asdict(self._measure.figures())

    def of(self, tensors: Tensors, name: str) -> dict[str, float]:
        """Figures of the model with these tensors in the place of its own."""
        model = self._measure.load({**self._measure.model.state_dict(), **tensors}, name)
        return asdict(self._measure.figures(model, name))

    @staticmethod
    def cells(found: Mapping[str, float], spread: str) -> str:
        """Cells of a table, `spread` behind the loss."""
        return f" {found['kl']:.4f}{spread} | {found['top1']:.2%} | {found['perplexity']:.3f} |"


class Sentences:
    """A sentence encoder: cosine of the embeddings of so many sentences, or passages, with those of the original.

    An embedding is what the folder says that it pools, else the mean over a sentence's tokens.
    """

    heads, loss, amount, learns = ("1 - mean cosine", "lowest cosine"), "far", 300, False

    def __init__(self, folder: Path, text: str, count: int, words: int | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        how: dict[str, Any] = {"local_files_only": True}
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **how)
        self._model: Any = AutoModel.from_pretrained(folder, dtype="float32", **how).eval()
        found = passages(text, count, words) if words else sentences(text, count)
        self._inputs = [tokenizer(s, truncation=True, return_tensors="pt") for s in found]
        self._state = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._how = pooling(folder) or ["mean_tokens"]
        self._own = self._embeddings()

    def _embeddings(self) -> Any:
        """(sentences, width) of the model as it is."""
        import torch

        with torch.no_grad():
            hidden = (self._model(**one).last_hidden_state[0].double() for one in self._inputs)
            return torch.stack([pooled(states, self._how) for states in hidden])

    def original(self) -> dict[str, float]:
        """Figures of the original."""
        return self._figures(self._own)

    def of(self, tensors: Tensors, name: str) -> dict[str, float]:
        """Figures of the model with these tensors in the place of its own; KeyError where it has none of a name."""
        import torch

        state = dict(self._state)
        for key, w in ((key, torch.as_tensor(w)) for key, w in tensors.items()):
            if w.is_floating_point():  # files have numbers of positions too, which transformers makes itself
                state[key] = w.reshape(self._state[key].shape)
        self._model.load_state_dict(state)
        return self._figures(self._embeddings())

    def _figures(self, embeddings: Any) -> dict[str, float]:
        cosine = (self._own * embeddings).sum(1)
        return {"far": 1 - float(cosine.mean()), "lowest": float(cosine.min())}

    @staticmethod
    def cells(found: Mapping[str, float], spread: str) -> str:
        """Cells of a table, `spread` behind the loss."""
        return f" {found['far']:.5f}{spread} | {found['lowest']:.4f} |"


Kind = type[Predictions] | type[Sentences]


def kind_of(folder: Path) -> Kind:
    """What to measure of the model in a Hugging Face folder."""
    return Predictions if is_causal(*model_class(str(folder))) else Sentences


def sentences(text: str, count: int) -> list[str]:
    """So many sentences, evenly spread over a text; SystemExit where it has fewer."""
    found = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"\u2010\s+", "", text)):  # a manual's words are parted at line ends
        found += re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))
    found = [s for s in found if len(s.split()) >= WORDS and s[-1] in ".!?"]
    if len(found) < count:
        raise SystemExit(f"the text has {len(found)} sentences, {count} are asked for")
    return [found[i] for i in np.linspace(0, len(found), count, endpoint=False).astype(int)]


def passages(text: str, count: int, words: int) -> list[str]:
    """So many passages of `words` words each, evenly spread over a text; SystemExit where it has fewer."""
    every = text.split()
    if len(every) < count * words:
        raise SystemExit(f"the text has {len(every)} words, {count} passages of {words} are asked for")
    return [" ".join(every[i : i + words]) for i in np.linspace(0, len(every) - words, count).astype(int)]
