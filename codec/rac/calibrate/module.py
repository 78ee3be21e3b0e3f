"""Any module as it runs on batches: second moments of what its weights multiply, sensitivities of what comes out.

The loss is by default a random projection of all floating-point outputs, drawn anew for each batch, each output over
its length: the mean of its squared gradients is then what an error costs in squared relative output error.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.modules.conv import _ConvNd

from rac.calibrate.layers import Kron, Layer, Layers
from rac.calibrate.products import Watch
from rac.calibrate.sums import Sums
from rac.calibrate.text import SEED, Note, draw
from rac.container.zstd import Digest
from rac.errors import SourceError
from rac.models.linears import frozen, is_linear, tables

Loss = Callable[[Any, Any], Any]
"""Called with what a forward made and the batch; returns a scalar to go backward from."""
_SMALLEST = 1 << 14  # weights of the smallest matrix that a pack quantises
_WRONG = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def tensors(out: Any) -> Iterator[Any]:
    """The floating-point tensors of an output, however it is nested."""
    if isinstance(out, torch.Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from tensors(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from tensors(value)
    elif is_dataclass(out):
        for each in fields(out):
            yield from tensors(getattr(out, each.name))


def projected(generator: Any) -> Loss:
    """A loss: random projections of all outputs, each over its own length."""

    def loss(out: Any, _: Any) -> Any:
        parts = []
        for y in (y for y in tensors(out) if y.requires_grad):  # that a gradient can begin at
            at = torch.randn(y.shape, generator=generator).to(y.device)
            parts.append((y.float() * at).sum() / y.detach().float().norm().clamp(min=1e-30))
        return sum(parts) if parts else None

    return loss


def labelled(generator: Any) -> Loss:
    """A loss: cross-entropy of the output's `logits` (..., classes) against labels that are drawn from them."""

    def loss(out: Any, _: Any) -> Any:
        logits = out["logits"] if isinstance(out, Mapping) else getattr(out, "logits", out)
        if isinstance(logits, tuple | list):
            logits = logits[0]
        logits = logits.reshape(-1, logits.shape[-1]).float()
        with torch.no_grad():
            chances = torch.softmax(logits, -1)
            labels = draw(chances, torch.rand(len(logits), 1, generator=generator).to(logits.device))
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    return loss


LOSSES = {"output": projected, "labels": labelled}


def run(module: Any, batch: Any) -> Any:
    """A module on a batch: a mapping is given by name, a tuple or list by place, anything else as the one argument."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


def calibrate(
    module: Any,
    batches: Iterable[Any],
    *,
    names: Mapping[str, str] | None = None,
    forward: Callable[[Any, Any], Any] = run,
    loss: str | Loss | None = "output",
    note: Note | None = None,
) -> Layers:
    """Run a `torch.nn.Module` on batches and gather what `rac.pack(..., calibration=...)` quantises its weights by.

    A batch is what the module takes: a tensor, a tuple of arguments, or a mapping of them by name; `forward`, called
    with (module, batch), runs it otherwise. The module runs in evaluation mode with the data type and device that it
    has, and needs memory for the activations of one batch beside the second moments, 4 * in^2 bytes for each input.

    `loss` is "output": a weight's error counts by what it changes in all outputs, squared and relative; "labels": by
    what it changes in the distribution that the `logits` are; a function of (output, batch) that returns a scalar; or
    None: no backward pass is made. Where the backward pass fails all inputs and outputs count alike, and a warning
    says so. `names` maps beginnings of parameter names to those in the file that will be packed; without it they are
    found there by their values. `note` is called with ("calibrating", batches so far, 0).

    A warning names the weights that no batch has reached. SourceError where the module does not run on a batch, where
    there is none, or where none reaches a weight.
    """
    found, remarks = gather(module, batches, forward=forward, loss=loss, note=note)
    for remark in remarks:
        warnings.warn(f"rac: {remark}", stacklevel=3)
    named = dict(_renamed(name, layer, names or {}) for name, layer in found.items())
    return Layers(named, found.tokens, found.digest)


def gather(
    module: Any,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any, Any], Any],
    loss: str | Loss | None,
    note: Note | None,
) -> tuple[Layers, list[str]]:
    """What `calibrate` finds, by the module's own names, and what is to be said of it."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, a function or None, not {loss!r}")
        loss = LOSSES[loss](torch.Generator().manual_seed(SEED))
    parameters = _weights(module)
    if any(c.__module__.startswith("rac.runtime.") for m in module.modules() for c in type(m).__mro__):
        raise SourceError(f"layers of {type(module).__name__} are compressed in memory: load it with resident='dense'")
    if away := [name for name, p in parameters.items() if p.device.type == "meta"]:
        raise SourceError(f"weights are not there ({_some(away)}): load the module whole, without offloading")
    seen, count, failed = Sums(loss is not None), 0, None
    watch = Watch(parameters, seen)
    with frozen(module), _eager(module):
        for batch in batches:  # what makes them is not watched
            with watch:
                failed = _one(module, batch, forward, loss if seen.backward else None, count) or failed
            seen.end()
            seen.backward = seen.backward and not failed
            count += 1
            if note:
                note("calibrating", count, 0)
    if not count:
        raise SourceError("there is no batch to calibrate on")
    layers, wanted = seen.layers(parameters, count), _wanted(module)
    if not layers:
        raise SourceError(f"the batches reach none of the weights of {type(module).__name__} ({_some(wanted)})")
    remarks = [f"no backward pass ({failed}): all outputs count alike"] if failed else []
    if left := [name for name in wanted if name not in layers]:
        remarks.append(f"the batches do not reach {len(left)} of {len(wanted)} weights: {_some(left)}")
    return Layers(layers, count, _digest(layers)), remarks


def _digest(layers: Mapping[str, Layer]) -> str:
    h = Digest()
    for name, layer in layers.items():
        h.update(name.encode())
        moment = layer.moment
        parts = (moment.channels, moment.places) if isinstance(moment, Kron) else (layer.second,)
        for array in (*parts, layer.sensitivity, layer.sketch):
            if array is not None:
                h.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return h.value().hex()


def _renamed(name: str, layer: Layer, names: Mapping[str, str]) -> tuple[str, Layer]:
    """The name with the longest beginning that `names` has replaced; the layer of such a one goes by its name alone."""
    start = max((key for key in names if name.startswith(key)), key=len, default=None)
    return (name, layer) if start is None else (names[start] + name[len(start) :], replace(layer, sketch=None))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")


def _one(module: Any, batch: Any, forward: Callable[[Any, Any], Any], loss: Loss | None, number: int) -> str | None:
    """Forward and, with a loss, backward; what was wrong with the latter."""
    try:
        with torch.set_grad_enabled(loss is not None):
            out = forward(module, batch)
    except _WRONG as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise SourceError(f"{type(module).__name__} does not run on batch {number}: {why}") from e
    if loss is None:
        return None
    try:
        value = loss(out, batch)
        if value is None or not value.requires_grad:
            return "no floating-point output that depends on the weights"
        value.backward()
    except _WRONG as e:
        return " ".join(str(e).split())[:200]
    return None


@contextlib.contextmanager
def _eager(module: Any) -> Iterator[None]:
    """Nothing compiled, experts one after the other, attention without fused kernels, so that products are seen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    held = []
    for m in module.modules():
        config: Any = getattr(m, "config", None)
        if hasattr(m, "set_experts_implementation") and hasattr(config, "_experts_implementation"):
            held.append((m, config._experts_implementation))
            m.set_experts_implementation("eager")
    try:
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, before in held:
            m.set_experts_implementation(before)


def _weights(module: Any) -> dict[str, Any]:
    """Parameters by name, without embeddings and what is tied to them: these are read, and no text shows how often."""
    read = {id(p) for m in tables(module) for p in m.parameters()}
    return {name: p for name, p in module.named_parameters() if id(p) not in read}


def _wanted(module: Any) -> list[str]:
    """Names of the weights of layers that multiply, large enough to be quantised."""
    mine = {id(p) for p in _weights(module).values()}
    out = []
    for name, m in module.named_modules():
        kinds = isinstance(m, _ConvNd | torch.nn.MultiheadAttention) or is_linear(m)
        for key, p in m.named_parameters(recurse=False) if kinds else ():
            if id(p) in mine and p.dim() > 1 and p.numel() >= _SMALLEST and min(len(p), p.numel() // len(p)) >= 16:
                out.append(f"{name}.{key}" if name else key)
    return out
