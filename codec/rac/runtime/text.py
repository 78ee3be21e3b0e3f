"""The simplest proofs that a model runs: text that it writes, and how well it predicts one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from rac.errors import UnsupportedError
from rac.models.predictions import check, log_probabilities, loss, quiet, windows
from rac.models.predictions import perplexity as of_loss

Note = Callable[[str, int, int], None]


def causal(model: Any) -> None:
    """UnsupportedError unless a model predicts the next token of a text."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedError(f"{type(model).__name__} is no causal language model", file=model.name_or_path)


def perplexity(
    model: Any, tokenizer: Any, text: str, tokens: int = 8192, context: int = 1024, note: Note | None = None
) -> tuple[float, int, int]:
    """Perplexity of a causal language model on a text, the number of windows, and the tokens of each.

    The protocol of docs/lossy.md: windows that do not overlap, each with begin-of-text where the tokenizer puts that in
    front, no other special tokens, all positions but the last of each.

    ValueError where `context` is below 2 or above `tokens`, SourceError where the text is shorter than one window,
    UnsupportedError where the model is no causal language model.
    """
    check(tokens, context)
    causal(model)
    cut = windows(tokenizer, text, tokens, context, model.config, model.name_or_path)
    total = 0.0
    for i, ids in enumerate(cut, 1):
        window = torch.tensor(ids, device=model.device)
        with torch.no_grad():
            total += loss(log_probabilities(model, window).float(), window)
        if note:
            note("perplexity", i, len(cut))
    return of_loss(total, len(cut), len(cut[0])), len(cut), len(cut[0])


def generate(
    model: Any, tokenizer: Any, prompt: str, tokens: int = 64, seed: int | None = None, stream: bool = False
) -> Any:
    """At most `tokens` ids (n,) that the model writes behind the prompt, which has no chat template put around it.

    With a `seed` tokens are drawn, as the model's generation settings say, else the likeliest one is taken. `stream`
    writes the text to standard output as it comes.

    ValueError where the prompt has no token, UnsupportedError where the model is no causal language model.
    """
    causal(model)
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not given.input_ids.shape[1]:
        raise ValueError("the prompt is empty")
    how: dict[str, Any] = {"do_sample": seed is not None}
    if seed is None:  # settings of drawing, which would be warned of
        how |= {"temperature": None, "top_p": None, "top_k": None}
    else:
        torch.manual_seed(seed)
    if stream:
        how["streamer"] = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with quiet(transformers):
        out = model.generate(**given, max_new_tokens=tokens, **how)
    return out[0, given.input_ids.shape[1] :]
