"""What recovery learns from: the text of the calibration, what follows it, and a part that no step sees."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.text import text_ids
from rac.models.predictions import split

TOKENS = 1024  # of a step
CONTEXT = 1024  # of a sequence at most: attention costs the square of it
HELD = 4  # lessons of a text that are held out, at most
SHORT = 8  # of a short text one of so many is held out
LEAST = 4  # lessons without which nothing is learned
ONE_OF = 4  # one lesson of so many is of a text of no kind in particular


class TooLittleError(Exception):
    """There is too little text."""


@dataclass(frozen=True, slots=True)
class Lessons:
    """Token ids of the text: each entry is what one step takes."""

    train: NDArray[np.int64]  # (n, rows, context)
    held: NDArray[np.int64]  # (m, rows, context), which no step sees


@dataclass(frozen=True, slots=True)
class Text:
    """A text to learn from."""

    ids: NDArray[np.int64]  # (count, context) what a calibration took of it
    whole: str | None = None  # the text; None: the model has written it, and there is no more


def lessons(path: str | os.PathLike[str], texts: Sequence[Text], steps: int, general: str | None = None) -> Lessons:
    """So many lessons of all texts alike, or as many as they have; TooLittleError where these are a few.

    Of a `general` text comes one lesson of ONE_OF, and one that is held out. What follows the part
    that a calibration took comes first: the quantised model fits that part better than any other.
    """
    others = steps // ONE_OF if general else 0
    each = -(-(steps - others) // max(1, len(texts)))
    found = [_cut(path, text, each, HELD) for text in texts]
    if len(own := [one for train, _ in found for one in train]) < LEAST or not any(held for _, held in found):
        seen = sum(len(held) for _, held in found)
        raise TooLittleError(f"{len(own)} pieces of {TOKENS} tokens to learn from, and {seen} to judge by")
    if general:
        unseen = Text(texts[0].ids[:0], general)
        found.append(_cut(path, unseen, min(others, len(own) // (ONE_OF - 1)), 1))
    mixed = [one for some in itertools.zip_longest(*(train for train, _ in found)) for one in some if one is not None]
    shape = mixed[0].shape
    mixed, held = ([x for x in some if x.shape == shape] for some in (mixed, [x for _, y in found for x in y]))
    return Lessons(np.stack(mixed), np.stack(held))


def _cut(
    path: str | os.PathLike[str], text: Text, most: int, held: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """At most so many lessons of a text to learn from, and to be held out, an eighth of all at most."""
    context, flat, front = text.ids.shape[1], text.ids.reshape(-1), list[int]()
    if text.whole is not None:
        need = max(most + held, held * SHORT)
        found = text_ids(os.fspath(path), text.whole, flat.size + need * TOKENS)
        context, front = min(context, found.longest), found.front
        flat = text.ids[:, len(front) :].reshape(-1)
        if np.array_equal(found.ids[: flat.size], flat):
            flat = np.concatenate([found.ids[flat.size :], flat])
    context = min(context, CONTEXT)
    cut, rows = split(flat, context, front), max(1, TOKENS // context)
    made = len(cut) // rows
    every = list(cut[: made * rows].reshape(made, rows, cut.shape[1]))
    out = min(held, made // SHORT)
    return every[out : out + most], every[:out]  # held out is what no calibration took
