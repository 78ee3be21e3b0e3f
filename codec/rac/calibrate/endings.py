"""What a backward pass begins at: a language model's predictions, or what an encoder makes of a text.

The mean squared gradient is in either case what an error costs: in nats of the predictions, or in squared relative
error of the output, which of an embedding of length 1 is twice what its cosine loses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rac.calibrate.module import projected, tensors
from rac.calibrate.pooling import pooled
from rac.calibrate.tables import Tables
from rac.calibrate.text import SEED, draw


class Ending(ABC):
    """What is done with a model's output of each sequence."""

    at_once: int | None = None
    """Positions of a sequence whose output may be made apart from the others; None: all are needed."""

    @abstractmethod
    def backward(self, out: Any, sequence: int, start: int, tables: Tables) -> None:
        """Go backward from the output at positions `start` and up of a sequence."""

    @abstractmethod
    def made(self, out: Any) -> Any:
        """What counts of an output, for `apart`."""

    @abstractmethod
    def apart(self, ours: Any, theirs: Any) -> float:
        """What errors cost that made `theirs` of `ours`, as half of squared gradients times errors foretells it."""

    def outputs(self, context: int) -> int:
        """How many things that count come of a sequence of `context` tokens."""
        return 1


class Predictions(Ending):
    """Scores of tokens: backward from the cross-entropy, summed, of labels that are drawn from them."""

    at_once = 256  # logits are large

    def __init__(self, context: int) -> None:
        self._context, self._next, self._at = context, 0, torch.empty(0)
        self._generator = torch.Generator()

    def outputs(self, context: int) -> int:
        """A prediction a token."""
        return context

    def _draws(self, sequence: int) -> Any:
        """(context, 1): where in their distributions labels are drawn, the same of each sequence, whoever asks."""
        if sequence < self._next - 1:  # ranks take them in any order
            self._next = 0
        if not self._next:
            self._generator.manual_seed(SEED)
        while self._next <= sequence:
            self._at = torch.rand(self._context, 1, generator=self._generator)
            self._next += 1
        return self._at

    def backward(self, out: Any, sequence: int, start: int, tables: Tables) -> None:
        """Go backward from the logits (1, n, vocabulary)."""
        logits = out.logits[0]
        at = self._draws(sequence)[start : start + len(logits)].to(logits.device)
        with torch.no_grad():
            gradient = torch.softmax(logits.float(), -1)
            labels = draw(gradient, at)
            tables.said(gradient)
            gradient[torch.arange(len(labels), device=labels.device), labels] -= (
                1  # the derivative is known: no second softmax
            )
        logits.backward(gradient.to(logits.dtype))

    def made(self, out: Any) -> Any:
        """Log-probabilities (n, vocabulary)."""
        return out.logits[0].float().log_softmax(-1)

    def apart(self, ours: Any, theirs: Any) -> float:
        """The divergence, nats summed."""
        return float((ours.exp() * (ours - theirs)).sum().cpu())


class Outputs(Ending):
    """All that comes out, each tensor over its length, projected at random.

    But what pools the last hidden state: where a file has no weights for it, transformers draws some.
    """

    def backward(self, out: Any, sequence: int, start: int, tables: Tables) -> None:
        """Go backward from the projection; RuntimeError where nothing depends on the weights."""
        loss = projected(torch.Generator().manual_seed(SEED + sequence))(self._counted(out), None)
        if loss is None:
            raise RuntimeError("no output in floating point")
        loss.backward()

    def _counted(self, out: Any) -> Any:
        if isinstance(out, Mapping) and "last_hidden_state" in out:
            return {key: value for key, value in out.items() if key != "pooler_output"}
        return out

    def made(self, out: Any) -> Any:
        """Tensors (numbers,), each over its length."""
        every = (y.detach().float().reshape(-1) for y in tensors(self._counted(out)))
        return [y / y.norm().clamp(min=1e-30) for y in every]

    def apart(self, ours: Any, theirs: Any) -> float:
        """Half the squared relative errors of all tensors."""
        return 0.5 * sum(float((a - b).square().sum().cpu()) for a, b in zip(ours, theirs, strict=True))


class Embedding(Outputs):
    """One embedding of the sequence, of length 1, projected at random."""

    def __init__(self, how: Sequence[str]) -> None:
        self._how = how

    def _counted(self, out: Any) -> Any:
        hidden = getattr(out, "last_hidden_state", None)
        return super()._counted(out) if hidden is None else pooled(hidden[0].float(), self._how)


def ending(model: Any, causal: bool, context: int, how: Sequence[str]) -> Ending:
    """Where a backward pass of a model begins, whose folder says `how` its tokens are pooled."""
    if causal or getattr(model.config, "is_encoder_decoder", False):
        return Predictions(context)
    return Embedding(how) if how else Outputs()
