"""The last word of a passage, to be guessed from what stands before it: a task like LAMBADA, from any prose.

Passages are runs of whole sentences of some `WORDS` words whose last word has occurred before in the passage, has at
least five letters and is no name (it is not written with a capital). A guess is right where each token of the word is
the likeliest one, the text up to it given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

WORDS = 70
"""Words of a passage, at least; up to half as many more, until a sentence ends in a fitting word."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What is read, and the word that follows."""

    before: str
    word: str


@dataclass(frozen=True, slots=True)
class Guesses:
    """How a model did."""

    right: float
    """Share of words."""
    loss: float
    """Mean of the negative logarithm of the word's probability, nats."""


def passages(text: str, count: int) -> list[Passage]:
    """So many passages, evenly spread over the text; fewer where it has fewer."""
    sentences = re.split(r"(?<=[.!?])[\"']?\s+(?=[\"'A-Z])", " ".join(text.split()))
    found, start = [], 0
    while start < len(sentences):
        words: list[str] = []
        for end in range(start, len(sentences)):
            words += sentences[end].split()
            last = re.fullmatch(r"([a-z]{5,})[.!?]", words[-1])
            earlier = last and re.search(rf"\b{last[1]}\b", " ".join(words[:-1]))
            if len(words) >= WORDS and last and earlier and len(words) <= 1.5 * WORDS:
                found.append(Passage(" ".join(words[:-1]), last[1]))
            if len(words) >= WORDS:
                break
        start = end + 1
    if not found:
        raise SystemExit("no passage of this text ends in a fitting word")
    step = max(1, len(found) // count)
    return found[::step][:count]


def guesses(model: Any, tokenizer: Any, asked: list[Passage]) -> Guesses:
    """What a causal language model of transformers says."""
    import torch

    right, loss = 0, 0.0
    for one in asked:
        before = tokenizer(one.before, add_special_tokens=False).input_ids
        word = tokenizer(" " + one.word, add_special_tokens=False).input_ids
        with torch.no_grad():
            ids = torch.tensor([before + word])
            logits = model(ids, logits_to_keep=len(word) + 1).logits[0, :-1].float().log_softmax(-1)
        right += logits.argmax(-1).tolist() == word
        loss -= float(logits[range(len(word)), word].sum())
    return Guesses(right / len(asked), loss / len(asked))
