"""What recovery learns from: the text of the calibration, what follows it, and a part that no step sees."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.text import text_ids

TOKENS = 1024  # of a step
CONTEXT = 1024  # of a sequence at most: attention costs the square of it
HELD = 4  # lessons of a text that are held out, at most; of a short one an eighth
LEAST = 4  # lessons without which nothing is learned


class TooLittleError(Exception):
    """There is too little text."""


@dataclass(frozen=True, slots=True)
class Lessons:
    """Token ids of the text: each entry is what one step takes."""

    train: NDArray[np.int64]  # (n, rows, context)
    held: NDArray[np.int64]  # (m, rows, context), which no step sees


@dataclass(frozen=True, slots=True)
class Text:
    """A text that a model was calibrated on."""

    ids: NDArray[np.int64]  # (count, context) what the calibration took of it
    whole: str | None = None  # the text; None: the model has written it, and there is no more


def lessons(path: str | os.PathLike[str], texts: Sequence[Text], steps: int) -> Lessons:
    """So many lessons of all texts alike, or as many as they have; TooLittleError where these are a few.

    What follows the part that a calibration took comes first: the quantised model fits that part better than any other.
    """
    each = -(-steps // max(1, len(texts)))
    train, held = list[list[NDArray[np.int64]]](), list[NDArray[np.int64]]()
    for text in texts:
        context = text.ids.shape[1]
        flat = text.ids.reshape(-1)
        if text.whole is not None:
            more, longest = text_ids(os.fspath(path), text.whole, flat.size + (each + HELD) * TOKENS)
            if np.array_equal(more[: flat.size], flat):
                flat = np.concatenate([more[flat.size :], flat])
            context = min(context, longest)
        context = min(context, CONTEXT)
        rows = max(1, TOKENS // context)
        made = len(flat) // (rows * context)
        every = list(flat[: made * rows * context].reshape(made, rows, context))
        out = min(HELD, made // 8)
        held += every[:out]  # of what no calibration took
        train.append(every[out : out + each])
    mixed = [one for some in itertools.zip_longest(*train) for one in some if one is not None]
    shape = mixed[0].shape if mixed else ()
    mixed, held = ([one for one in some if one.shape == shape] for some in (mixed, held))
    if len(mixed) < LEAST or not held:
        raise TooLittleError(f"{len(mixed)} pieces of {TOKENS} tokens to learn from, and {len(held)} to judge by")
    return Lessons(np.stack(mixed), np.stack(held))
