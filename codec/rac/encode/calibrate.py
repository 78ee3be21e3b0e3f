"""What the inputs and outputs of a model's linear layers look like on a text: the only door to transformers.

The second moment E[x x^T] of the inputs of each layer, and for each output i the sensitivity E[(dL/dy_i)^2], L the
cross-entropy against labels drawn from the model's own predictions (the true Fisher).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import MissingDependencyError, SourceError

Note = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What calibration found for one weight matrix (out, in)."""

    second: NDArray[np.float32]
    """(in, in); layers that share an input share the array."""
    sensitivity: NDArray[np.float64] | None
    """(out,), or None where no backward pass was made."""


def calibrate(
    path: str | os.PathLike[str], text: str, *, tokens: int = 40960, context: int = 1024, fisher: bool = True,
    seed: int = 0, note: Note | None = None,
) -> dict[str, Layer]:  # fmt: skip
    """Run the model in folder `path` over `text`: a causal language model, or an encoder, which gets no backward pass.

    Args:
        path: A Hugging Face model folder with its tokenizer.
        text: Calibration text.
        tokens: Read so many of its tokens at most.
        context: Tokens of one sequence.
        fisher: Make the backward pass that the sensitivity needs.
        seed: Of the labels that are drawn.
        note: Progress.

    Returns:
        Weight name to what was found.

    Raises:
        MissingDependencyError: torch or transformers are not installed.
        SourceError: No model or tokenizer there, or the text is shorter than one sequence.
    """
    try:
        import torch
        import transformers
    except ImportError as e:
        raise MissingDependencyError(
            "calibration needs torch and transformers: pip install rac-codec[calibrate]"
        ) from e
    try:
        config: Any = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        causal = any("CausalLM" in a or "LMHead" in a for a in config.architectures or ())
        kind: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        model: Any = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as e:
        raise SourceError(f"no model that transformers can load: {e}", file=os.fspath(path)) from e
    model.eval()
    fisher = fisher and causal
    context = min(context, getattr(config, "max_position_embeddings", context))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:tokens])
    count = len(ids) // context
    if not count:
        raise SourceError(f"the calibration text has {len(ids)} tokens, one sequence needs {context}")
    found = _Moments(model, fisher)
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        # gradients begin at the embeddings: those of the weights are not wanted
        start = model.get_input_embeddings()(ids[None, i * context : (i + 1) * context]).detach().requires_grad_(fisher)
        with torch.set_grad_enabled(fisher):
            out = model(inputs_embeds=start, **({"use_cache": False} if causal else {}))
        if fisher:
            logits = out.logits[0].float()
            with torch.no_grad():  # drawing by the distribution function is much faster than torch.multinomial
                drawn = torch.rand(context, 1, generator=generator)
                labels = (torch.softmax(logits, -1).cumsum(-1) < drawn).sum(-1).clamp_(max=logits.shape[-1] - 1)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        found.tokens += context
        if note:
            note("calibrating", i + 1, count)
    return found.result()


class _Moments:
    """Hooks on every linear layer of a model."""

    def __init__(self, model: Any, fisher: bool) -> None:
        import torch

        self.tokens = 0
        self._second: dict[str, Any] = {}
        self._of: dict[str, str] = {}
        self._grad: dict[str, Any] = {}
        self._last: tuple[Any, str] = (None, "")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                module.register_forward_pre_hook(self._input(f"{name}.weight"))
                if fisher:
                    module.register_full_backward_hook(self._output(f"{name}.weight"))

    def _input(self, name: str) -> Callable[[Any, Any], None]:
        import torch

        def hook(_: Any, args: Any) -> None:
            x = args[0]
            if x is self._last[0]:  # the same input as the layer before: query, key and value
                self._of[name] = self._last[1]
                return
            self._last = (x, name)
            self._of[name] = name
            with torch.no_grad():
                flat = x.detach().reshape(-1, x.shape[-1])
                if name not in self._second:
                    self._second[name] = torch.zeros(flat.shape[1], flat.shape[1])
                self._second[name].addmm_(flat.T, flat)

        return hook

    def _output(self, name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, __: Any, grads: Any) -> None:
            g = grads[0].reshape(-1, grads[0].shape[-1]).double()
            self._grad[name] = self._grad.get(name, 0) + (g * g).sum(0)

        return hook

    def result(self) -> dict[str, Layer]:
        """Means over all tokens."""
        second = {name: (s / self.tokens).numpy() for name, s in self._second.items()}
        grads = {name: (g / self.tokens).numpy() for name, g in self._grad.items()}
        return {name: Layer(second[key], grads.get(name)) for name, key in self._of.items()}
