"""Which of four continuations is the true one: a task that any prose makes, with no label that anybody wrote.

A question is a run of `BEFORE` words and what may follow: the next `AFTER` words, or the words after another occurrence
of the last word that was read, so that each fits what stands right before it. The four and their order are drawn with a
seed. The model's choice is the continuation of the highest probability, in logarithms for each letter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.models.predictions import begin

BEFORE, AFTER, CHOICES = 32, 5, 4
APART = 64
"""Words between the true continuation and any other."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is read, what may follow, and which of these does."""

    before: str
    choices: tuple[str, ...]
    true: int


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model chose."""

    right: tuple[bool, ...]
    """Of each question."""
    loss: tuple[float, ...]
    """Of each true continuation, nats for a letter."""


def questions(text: str, count: int, seed: int = 0) -> list[Question]:
    """So many, evenly spread over a text; SystemExit where it is too short."""
    words, rng = text.split(), np.random.default_rng(seed)
    places = defaultdict(list)
    for i in range(len(words) - AFTER):
        places[words[i]].append(i + 1)
    found = []
    for start in np.linspace(BEFORE, len(words) - AFTER, count, endpoint=False).astype(int):
        for here in range(start, min(start + APART, len(words) - AFTER)):
            true = words[here : here + AFTER]
            others = [p for p in places[words[here - 1]] if abs(p - here) >= APART]
            others = [p for p in others if words[p] != true[0]]
            if len(others) >= CHOICES - 1:
                break
        else:
            raise SystemExit(f"the text is too short for {count} questions")
        at = [int(p) for p in rng.choice(others, CHOICES - 1, replace=False)]
        at.insert(where := int(rng.integers(CHOICES)), here)
        choices = tuple(" ".join(words[p : p + AFTER]) for p in at)
        found.append(Question(" ".join(words[here - BEFORE : here]), choices, where))
    return found


def losses(model: Any, before: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
    """Nats of each continuation of `before`, by one run: continuations follow each other and do not see each other."""
    import torch

    ids, place, group = list(before), list(range(len(before))), [-1] * len(before)
    for i, choice in enumerate(choices):
        ids += choice
        place += range(len(before), len(before) + len(choice))
        group += [i] * len(choice)
    of = torch.tensor(group)
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & ((of[None] == -1) | (of[None] == of[:, None]))
    with torch.no_grad():
        how = {"attention_mask": seen[None, None], "position_ids": torch.tensor([place]), "use_cache": False}
        logits = model(torch.tensor([ids]), logits_to_keep=len(ids) - len(before) + 1, **how).logits[0]
    predicted = logits.float().log_softmax(-1)
    found, start = [], 1
    for choice in choices:
        rows = [0, *range(start, start + len(choice) - 1)]
        found.append(-float(predicted[rows, list(choice)].sum()))
        start += len(choice)
    return found


def answers(model: Any, tokenizer: Any, asked: Sequence[Question]) -> Answers:
    """What a causal language model of transformers chooses."""
    right, loss, front = [], [], begin(tokenizer)
    for one in asked:
        before = [*front, *tokenizer(one.before, add_special_tokens=False).input_ids]
        choices = [tokenizer(f" {c}", add_special_tokens=False).input_ids for c in one.choices]
        each = [x / len(c) for x, c in zip(losses(model, before, choices), one.choices, strict=True)]
        right.append(each.index(min(each)) == one.true)
        loss.append(each[one.true])
    return Answers(tuple(right), tuple(loss))


def mean(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """(mean, its standard error)."""
    x = np.asarray(values, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))
