"""The part of a model that reads text, how it is fed, and how much of a text it takes at once: found by running it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from rac.calibrate.wide import Wide
from rac.errors import SourceError

SEES = {
    "pixel_values": ("images", "images/"),
    "pixel_values_videos": ("videos", "images/"),
    "input_features": ("sound", "audio/"),
    "input_values": ("sound", "audio/"),
    "audio_values": ("sound", "audio/"),
}
"""What models call their main input, what that is, and what `--calibrate` takes for it."""
ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)
"""What models raise for inputs that are none of theirs."""
_SHORTEST = 16  # tokens of a sequence below which no shorter one is tried


class _Stop(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Reader:
    """A model, or the part of one, that reads token ids."""

    model: Any
    name: str
    """Its name within the whole model; "" where that is what it is."""
    causal: bool
    """Whether it predicts each token from those before it."""
    context: int
    """The longest sequence that it takes, of those that were asked for."""


def feed(model: Any, causal: bool, ids: Any) -> dict[str, Any]:
    """Arguments of a model's forward pass for token ids (n, context): an encoder and a decoder both get them."""
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    given = {"input_ids": ids}
    taken = inspect.signature(model.forward).parameters
    if both and "decoder_input_ids" in taken:
        given["decoder_input_ids"] = ids
    if causal or both or "use_cache" in taken:
        given["use_cache"] = False
    return given


def is_causal(kind: Any, config: Any) -> bool:
    """Whether a class of transformers is a causal language model, one that sees or hears beside it among them."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = {name for table in names for name in table.values()}
    return kind.__name__ in known and not config.is_encoder_decoder


def find(model: Any, causal: bool, context: int, file: str) -> Reader:
    """What of a model reads text, run for it; SourceError, which names other ways, where nothing does."""
    kind, main = type(model).__name__, getattr(model, "main_input_name", "input_ids")
    why = ""
    for name, module in _candidates(model):
        mine = causal if not name else is_causal(type(module), module.config)
        try:
            return Reader(module, name, mine, _fitting(module, mine, context))
        except ERRORS as e:
            why = why or str(e).split("\n")[0]
    what, how = SEES.get(main, ("", ""))
    if not what and ("pixel_values" in why or "NoneType" in why):
        taken = inspect.signature(model.forward).parameters
        what, how = next((way for name, way in SEES.items() if name in taken), (what, how))
    because = f"it reads {what}" if what else why or "it reads something else"
    ways = f"`--calibrate {how}` and rac.calibrate take these" if what else "rac.calibrate takes any inputs"
    raise SourceError(f"{kind} cannot be calibrated on a text ({because}): {ways}, `--calibrate none` works", file=file)


def _candidates(model: Any) -> Iterator[tuple[str, Any]]:
    """The model, and, where it is no encoder whose output a decoder reads, parts of it.

    Causal language models come first, of others the larger before the smaller.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if main not in SEES or not model.config.is_encoder_decoder:
        if main not in SEES:
            yield "", model
        parts = [(name, m) for name, m in model.named_modules() if name and _reads(m)]
        yield from sorted(parts, key=_rank)


def _rank(part: tuple[str, Any]) -> tuple[bool, int]:
    module = part[1]
    return not is_causal(type(module), module.config), -sum(p.numel() for p in module.parameters())


def _reads(module: Any) -> bool:
    if not isinstance(module, transformers.PreTrainedModel) or module.main_input_name in SEES:
        return False
    if "input_ids" not in inspect.signature(module.forward).parameters:
        return False
    with contextlib.suppress(*ERRORS):
        return module.get_input_embeddings() is not None
    return False


def _fitting(model: Any, causal: bool, context: int) -> int:
    """The longest sequence, at most `context`, that runs: some models have positions for fewer tokens than they say."""
    fewer = [context - n for n in (1, 2, 4, 8)] + [context >> n for n in range(1, 20)]
    shorter = iter(n for n in fewer if n >= _SHORTEST)
    while True:
        try:
            _attempt(model, causal, context)
            return context
        except (IndexError, RuntimeError, ValueError):
            if (context := next(shorter, 0)) == 0:
                raise


def _attempt(model: Any, causal: bool, context: int) -> None:
    """Run `context` tokens: to the first block of a causal model, or to the end."""
    words = 32
    with contextlib.suppress(*ERRORS):
        words = max(4, min(words, model.get_input_embeddings().num_embeddings))
    ids = torch.arange(context)[None] % (words - 3) + 3  # the first are often padding, which has no position
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(Wide())
        for module in model.modules() if causal else ():
            if isinstance(module, torch.nn.ModuleList) and len(module) > 1:
                stack.enter_context(module[0].register_forward_pre_hook(_stop))
        with contextlib.suppress(_Stop):
            model(**feed(model, causal, ids))


def _stop(*_: Any) -> None:
    raise _Stop
