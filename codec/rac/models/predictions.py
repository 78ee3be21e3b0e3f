"""What a causal language model predicts on a text, window by window: shared by `rac compare` and `rac perplexity`.

Windows follow each other without overlap, every one begins with an empty context, and what is left behind the last
whole one is not measured. Where a tokenizer puts begin-of-text in front of a text, every window begins with that.
torch and transformers are handed in or met through their objects, never imported here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import SourceError

_BEHIND = {"camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"}
_BEHIND |= {"xlm-roberta", "xlm-roberta-xl", "xmod"}


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers, and no reports of what is raised here as an error."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def positions(config: Any, context: int) -> int:
    """The longest sequence of at most `context` tokens that a model has positions for, as its text configuration says.

    Models after RoBERTa count positions from behind the padding token; XLNet's -1 means any number.
    """
    stated = getattr(config, "max_position_embeddings", None) or 0
    most = stated if stated > 0 else context
    padding = getattr(config, "pad_token_id", None) if getattr(config, "model_type", "") in _BEHIND else None
    return min(context, most if padding is None else most - padding - 1)


def check(tokens: int, context: int) -> None:
    """ValueError where `tokens` tokens have no window of `context`, or a window has nothing to predict."""
    if not 2 <= context <= tokens:
        raise ValueError("a window needs at least 2 tokens, and as many must be asked for")


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts in front of every text, and behind it."""
    text = "a"
    plain, whole = (list(tokenizer(text, add_special_tokens=special).input_ids) for special in (False, True))
    more = len(whole) - len(plain)
    at = next((i for i in range(more + 1) if whole[i : i + len(plain)] == plain), 0)
    return (whole[:at], whole[at + len(plain) :]) if more > 0 else ([], [])


def begin(tokenizer: Any) -> list[int]:
    """Ids that a tokenizer puts in front of every text: begin-of-text, for models that have never read without it.

    None where it puts something behind a text too, as those of encoders do.
    """
    front, behind = around(tokenizer)
    return [] if behind else front


def windows(tokenizer: Any, text: str, tokens: int, context: int, config: Any, file: str) -> list[list[int]]:
    """At most `tokens` ids of `text` in windows of `context`, no longer than the model's positions.

    Each begins with what the tokenizer puts in front of a text. SourceError, which names `file`, where the text is
    shorter than one window.
    """
    ids, front = tokenizer(text, add_special_tokens=False, verbose=False).input_ids, begin(tokenizer)
    context = positions(config, context)
    found: list[list[int]] = split(ids, context, front)[: tokens // context].tolist()
    if not found:
        need = max(1, context - len(front))
        what = f"the text has {len(ids)} tokens, {tokens} are asked for, one window needs {need}"
        raise SourceError(what, file=file)
    return found


def split(
    ids: Sequence[int] | NDArray[np.int64], context: int, front: Sequence[int] = (), behind: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Token ids in whole sequences (count, context), each with `front` and `behind` around one of its own or more."""
    body = max(1, context - len(front) - len(behind))
    count = len(ids) // body
    own = np.asarray(ids[: count * body], np.int64).reshape(count, body)
    beside = [np.tile(np.asarray(some, np.int64), (count, 1)) for some in (front, behind)]
    return np.concatenate([beside[0], own, beside[1]], 1)


def log_probabilities(model: Any, window: Any) -> Any:
    """(context, vocabulary), float16, of one window of ids (context,) on the model's device."""
    out = model(window[None], use_cache=False).logits[0].float()
    return out.log_softmax(-1).half()


def loss(predicted: Any, window: Any) -> float:
    """Nats of all positions but the last, summed; `predicted` as `log_probabilities` gives it, in float32."""
    return -float(predicted[:-1].gather(1, window[1:, None]).sum())


def perplexity(total: float, count: int, context: int) -> float:
    """Perplexity: exp of the mean loss. `total` is in nats, summed over `count` windows of `context` tokens."""
    return math.exp(total / (count * (context - 1)))
