"""What a lossy pack is calibrated on: the texts that the caller names, or what suits the source where none is named."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from rac.calibrate.builtin import AUTO
from rac.calibrate.pooling import pooling
from rac.calibrate.text import TOKENIZERS
from rac.encode.options import Calibration, Made
from rac.errors import MissingDependencyError

SELF, NONE = "self", "none"
_NEEDS = ("torch", "transformers", "filelock")
_WEIGHTS = "quantised from the weights alone"
_WORSE = "the divergence is several times that of a calibrated file (docs/lossy.md: 0.28 nats against 0.07 at 3 bits)"

Given = str | os.PathLike[str] | Sequence[str] | None


def calibration_for(given: Given, src: Any, tokens: int, cache: str | None, made: tuple[Made, ...] = ()) -> Calibration:
    """The calibration of a lossy pack of `src`: on the texts that are `given`, and what was `made` before.

    The folder of a causal language model is calibrated on the built-in mix and on text that it writes itself unless the
    caller says otherwise, that of a sentence encoder on the mix; anything else is quantised from the weights alone.
    `remark` says which it was, and why. MissingDependencyError where one is to be calibrated unasked, and torch or
    transformers is missing: a file several times worse than it need be is worse than an error that names both ways out.
    """
    why_not = _no_language_model(src)
    if given is None and made:
        given = NONE
    if given is None:
        names, remark = _usual(src, why_not)
        return Calibration(names, tokens, cache, remark=remark, named=False)
    names = Calibration.texts_of(given)
    if not names and not made and why_not is None:
        return Calibration((), tokens, cache, remark=f"{_WEIGHTS}: {_WORSE}")
    if AUTO in names and why_not is not None:
        remark = f"calibrated on the built-in mix alone: {why_not}"
        return Calibration(tuple(n for n in names if n != SELF), tokens, cache, made, remark)
    return Calibration(names, tokens, cache, made)


def _usual(src: Any, why_not: str | None) -> tuple[tuple[str, ...], str]:
    """The texts where the caller has named none, and what is said of it."""
    reads = isinstance(src, str | os.PathLike) and any(os.path.exists(os.path.join(src, name)) for name in TOKENIZERS)
    encoder = why_not is not None and reads and bool(pooling(src))
    if why_not is not None and not encoder:
        return (), f"{_WEIGHTS}: {why_not}"
    if missing := [name for name in _NEEDS if find_spec(name) is None]:
        raise MissingDependencyError(
            f"a model of text is calibrated unless you say otherwise, which needs {' and '.join(missing)}: "
            "pip install rac-codec[calibrate]; --calibrate none packs from the weights alone"
        )
    other = "--calibrate none: from the weights alone"
    if encoder:
        return (AUTO,), f"calibrated on the built-in mix; {other}"
    if os.path.isdir(src) and not reads:
        return (SELF,), f"calibrated on the model's own text, as the folder has no tokenizer for the mix; {other}"
    return (AUTO, SELF), f"calibrated on the built-in mix and the model's own text; {other}"


def _no_language_model(src: Any) -> str | None:
    """Why `src` is no folder of a causal language model; None: it is one, as far as its configuration says."""
    if isinstance(src, str) and not os.path.lexists(src):
        return None  # a repository, or nothing: what it is shows when it is there
    if not isinstance(src, str | os.PathLike) or not os.path.isdir(src):
        return "only the folder of a language model is calibrated unasked"
    try:
        with open(os.path.join(src, "config.json"), encoding="utf-8") as f:
            kinds = json.load(f).get("architectures")
    except (OSError, ValueError, AttributeError):
        return "the folder has no config.json that could be read"
    names = [k for k in kinds if isinstance(k, str)] if isinstance(kinds, list) else []
    if not names:
        return "config.json names no architecture"
    if any("CausalLM" in name or "LMHead" in name for name in names):
        return None
    return f"{names[0]} is no causal language model"
