"""What a causal language model predicts on a text with other weights, against what it predicts with its own."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.given import Given
from rac.calibrate.layers import Layer, calibrate
from rac.calibrate.text import Note
from rac.errors import MismatchError, MissingDependencyError, SourceError
from rac.machine import room
from rac.models.linears import tables
from rac.models.predictions import check, log_probabilities, loss, perplexity, quiet, windows

Where = str | os.PathLike[str]
_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError)
"""What transformers raises for a folder or a GGUF file that it cannot make a model of."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a model predicts on a text, against the original."""

    kl: float
    """KL(original || model) per token, nats, mean over all positions."""
    top1: float
    """Share of positions where both predict the same token."""
    perplexity: float
    """Over all positions but the last of each window."""


def hold() -> int:
    """Bytes of log-probabilities of the original that are held: beyond that it runs again beside every file."""
    return room() // 2


def decibels(energy: float, error: float) -> float | None:
    """10 log10 of the ratio; None where one of the two is 0."""
    return 10 * math.log10(energy / error) if error and energy else None


def _modules() -> tuple[Any, Any]:
    """(torch, transformers)."""
    try:
        import torch
        import transformers
    except ImportError as e:
        why = "measuring on a text needs torch and transformers: pip install rac-codec[calibrate]"
        raise MissingDependencyError(why) from e
    return torch, transformers


def load_original(model: Where) -> tuple[Any, Any, Any]:
    """Configuration, model in float32 and tokenizer of the folder of a causal language model; or SourceError."""
    path = os.fspath(model)
    torch, auto = _modules()
    config = _config(path)
    try:
        kind: Any = auto.AutoModelForCausalLM
        if isinstance(model, Given):
            made: Any = model.load(kind, config, torch.float32).eval()
        else:
            made = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    except _ERRORS as e:
        raise SourceError(f"no model that transformers can load: {e}", file=path) from e
    return config, made, _tokenizer(path)


def check_text(path: str, text: str, tokens: int = 8192, context: int = 1024) -> None:
    """Check that `Measure` will take a folder and a text, without its weights; SourceError."""
    with quiet(_modules()[1]):
        config = _config(path)
        windows(_tokenizer(path), text, tokens, context, config, path)


def _config(path: str) -> Any:
    """The configuration of a causal language model; SourceError where the folder is of none."""
    auto = _modules()[1]
    if not os.path.isdir(path):
        raise SourceError("a text needs the Hugging Face folder of the original", file=path)
    try:
        config: Any = auto.AutoConfig.from_pretrained(path, local_files_only=True)
        kinds = config.architectures or ()
        if not any("CausalLM" in a or "LMHead" in a for a in kinds):
            raise SourceError(f"no causal language model but {', '.join(kinds) or 'unknown'}", file=path)
    except _ERRORS as e:
        raise SourceError(f"no model that transformers can load: {e}", file=path) from e
    return config


def _tokenizer(path: str) -> Any:
    try:
        return _modules()[1].AutoTokenizer.from_pretrained(path, local_files_only=True)
    except _ERRORS as e:
        raise SourceError(f"no tokenizer that transformers can load: {e}", file=path) from e


class Measure:
    """A causal language model and a text, to compare other weights of this model with it.

    At most `tokens` tokens are used, in windows of `context`; `note` is called with a model's name, windows done, and
    all of them. SourceError where there is no causal language model or no tokenizer in the Hugging Face folder `model`,
    or the text is shorter than one window; ValueError where `context` is below 2 or above `tokens`. Models are held and
    run, whole, on a `device` of torch.
    """

    def __init__(
        self,
        model: Where,
        text: str,
        tokens: int = 8192,
        context: int = 1024,
        note: Note | None = None,
        device: str = "cpu",
    ) -> None:
        check(tokens, context)
        self._device = device
        self.torch, self._transformers = _modules()
        self._path, self._text, self._note, self._model = os.fspath(model), text, note, model
        with quiet(self._transformers):
            self._config, self.model, tokenizer = load_original(model)
            cut = windows(tokenizer, text, tokens, context, self._config, self._path)
        self._context, self.tokens = len(cut[0]), len(cut) * len(cut[0])
        self.model.to(device)
        self._windows = [self.torch.tensor(ids, device=device) for ids in cut]
        self._held: list[Any] | None = None
        self._ours: dict[int, Any] = {}
        self._layers: Mapping[str, Layer] = {}
        self._energy = 0.0

    def load(self, state: Mapping[str, Any], name: str, tied: bool | None = None) -> Any:
        """The model with other weights by name, `tied` or as the original; MismatchError where they do not fit."""
        torch, config = self.torch, copy.deepcopy(self._config)
        if tied is not None:
            config.tie_word_embeddings = tied
        tensors, kind = {n: torch.as_tensor(v) for n, v in state.items()}, type(self.model)
        how = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            with quiet(self._transformers):
                model, found = kind.from_pretrained(None, config=config, state_dict=tensors, **how)
        except _ERRORS as e:
            raise MismatchError(f"no weights of the original's model: {e}", file=name) from e
        if missing := found["missing_keys"]:
            raise MismatchError(f"holds no tensor {min(missing)!r}, which the original has", file=name)
        if found["mismatched_keys"]:
            tensor, theirs, ours = min(found["mismatched_keys"])
            raise MismatchError(f"tensor {tensor!r} is {list(theirs)}, the original has {list(ours)}", file=name)
        if more := found["unexpected_keys"]:
            raise MismatchError(f"tensor {min(more)!r} is not in the original", file=name)
        model.tie_weights()
        return model.to(self._device).eval()

    def _predictions(self, model: Any, name: str | None) -> Iterator[Any]:
        """Log-probabilities (context, vocabulary) of each window, float16."""
        for i, window in enumerate(self._windows):
            with self.torch.no_grad():  # not around the yield: what comes next is not of this generator
                found = log_probabilities(model, window)
            yield found
            if self._note and name:
                self._note(name, i + 1, len(self._windows))

    def figures(self, model: Any = None, name: str = "original") -> Figures:
        """What a model of `load` predicts, or the original."""
        size = 2 * self.tokens * int(self._config.get_text_config().vocab_size)
        if self._held is None and size <= hold():
            self._held = list(self._predictions(self.model, "original"))
        ours = self._held or self._predictions(self.model, name if model is None else None)
        pairs = ((p, p) for p in ours) if model is None else zip(ours, self._predictions(model, name), strict=True)
        kl = top = total = 0.0
        for window, pair in zip(self._windows, pairs, strict=True):
            p, q = (x.float() for x in pair)
            kl += float((p.exp() * (p - q)).sum())
            top += float((p.argmax(-1) == q.argmax(-1)).sum())
            total += loss(q, window)
        n = self.tokens
        return Figures(kl / n, top / n, perplexity(total, len(self._windows), self._context))

    def divergence(self, model: Any, i: int) -> float:
        """KL(original || model) of window `i`, nats, summed: in their order these add up to the KL of `figures`."""
        with self.torch.no_grad():
            ours = self._ours.get(i)
            if ours is None:
                ours = log_probabilities(self.model, self._windows[i])
                if 2 * self.tokens * int(self._config.get_text_config().vocab_size) <= hold():
                    self._ours[i] = ours
            p, q = ours.float(), log_probabilities(model, self._windows[i]).float()
            return float((p.exp() * (p - q)).sum())

    def moments(self) -> None:
        """Find the second moments of the inputs of all linear layers on the text, which `weighted_snr` needs."""
        with quiet(self._transformers):
            how: dict[str, Any] = {"tokens": self.tokens, "context": self._context, "fisher": False}
            layers = calibrate(self._model, self._text, **how, note=self._note)
        mine = dict(self.model.named_parameters())  # experts have other names in files
        read = {id(p) for m in tables(self.model) for p in m.parameters()}
        self._layers = {n: layer for n, layer in layers.items() if n in mine and id(mine[n]) not in read}
        self._energy = sum(self._trace(name, self.model.get_parameter(name)) for name in self._layers)

    def weighted_snr(self, model: Any) -> float | None:
        """Output SNR over all linear layers, dB; None where there is no error or `moments` was not called."""
        own, other = self.model.get_parameter, model.get_parameter
        error = sum(self._trace(name, own(name) - other(name)) for name in self._layers)
        return decibels(self._energy, error)

    def _trace(self, name: str, w: Any) -> float:
        """tr(w S w') of a layer; w is (out, in)."""
        with self.torch.no_grad():
            second = self.torch.tensor(self._layers[name].second, device=self._device)
            return float(((w @ second) * w).cpu().sum(dtype=self.torch.float64))


class Divergence:
    """How far predictions on 8,192 tokens of a text, at most, are from the model's own once tensors were replaced."""

    def __init__(self, model: Where, text: str, tokens: int, note: Note | None = None, device: str = "cpu") -> None:
        self._measure = Measure(model, text, *_cut(tokens), note, device)
        own = {name: tensor.clone() for name, tensor in self._measure.model.state_dict().items()}  # not shared
        self._other = self._measure.load(own, os.fspath(model))
        self._lock = threading.Lock()

    def put(self, names: Sequence[str], w: NDArray[np.float32]) -> None:
        """Replace a tensor, which the model has under some of these names."""
        torch, state = self._measure.torch, self._other.state_dict()
        with self._lock, torch.no_grad():
            for name in names:
                if name in state:
                    state[name].copy_(torch.from_numpy(w).reshape(state[name].shape))

    def kl(self) -> float:
        """Nats per token."""
        return self._measure.figures(self._other, "packed").kl

    def over(self, window: int) -> float:
        """Nats of one window, summed."""
        return self._measure.divergence(self._other, window)


def _cut(tokens: int) -> tuple[int, int]:
    """Tokens that a divergence is measured on at most, of as many that were asked for, and those of a window."""
    return min(tokens, 8192), min(1024, tokens)


@dataclass(frozen=True, slots=True)
class Judge:
    """What makes a Divergence, and knows how much it will measure; the text is read when it is asked for."""

    model: Where
    read: Callable[[], str]
    tokens: int
    note: Note | None = None
    device: str = "cpu"

    def __call__(self) -> Divergence:
        """It, with two models in memory."""
        return Divergence(self.model, self.read(), self.tokens, self.note, self.device)

    def windows(self) -> tuple[int, int]:
        """How many windows there are, and tokens of each; no weights are read."""
        path = os.fspath(self.model)
        with quiet(_modules()[1]):
            cut = windows(_tokenizer(path), self.read(), *_cut(self.tokens), _config(path), path)
        return len(cut), len(cut[0])


def translated(path: str) -> dict[str, Callable[[], NDArray[np.float32]]]:
    """Tensors of a GGUF file under their Hugging Face names, as transformers reads them."""
    torch, transformers = _modules()
    folder, name = os.path.split(os.path.abspath(path))
    how = {"gguf_file": name, "dtype": torch.float32, "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):
        how["quantization_config"] = transformers.GgufConfig(gguf_file=name, dequantize=True)
    try:
        with quiet(transformers), contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting turns off
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    except ImportError as e:
        raise MissingDependencyError(f"transformers cannot read GGUF files: {e}", file=path) from e
    except _ERRORS as e:
        raise SourceError(f"no model that transformers can load: {e}", file=path) from e
    return {name: tensor.float().numpy for name, tensor in model.state_dict().items()}
