"""KurTail: rotations that take the tails from activations (arXiv 2503.01483).

A uniform quantiser wastes least on a uniform law, whose kurtosis is 1.8. R1 is learned on what attention and MLP of all
layers read, behind the fused norms, R2 of each layer on its values, so that the mean |kurtosis - 1.8| gets least: no
gradient passes the model, which runs once, without one, and only a sample of its activations is in memory. Kurtosis is
taken along what one scale quantises: all of a token, or one head of one token. R3 and R4 are Hadamard matrices.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.text import Note
from rac.errors import DivergedError, SourceError, TransformError
from rac.linalg.transform import hooked
from rac.methods.rotations.cayley import CayleyAdam
from rac.methods.rotations.result import Rotations, nearest
from rac.methods.rotations.spinquant import start
from rac.methods.transforms import Parts
from rac.methods.transforms.rotate import require_fused, require_rotatable

UNIFORM = 1.8
"""Kurtosis of a uniform law."""


def kurtosis(x: Any) -> Any:
    """(...) of each vector along the last axis of x (..., n): E[(x - mean)^4] / E[(x - mean)^2]^2."""
    c = x - x.mean(-1, keepdim=True)
    square = c.square()
    return square.square().mean(-1) / square.mean(-1).square().clamp(min=1e-30)


def gather(p: Parts, ids: NDArray[np.int64], most: int, seed: int = 0) -> tuple[Any, Any]:
    """A sample of what a model reads and of its values, in the coordinates that it has, its norms fused.

    Of token ids (count, context) `most` tokens are kept of each layer, of its attention's input, its MLP's, and its
    values: (2 x layers x tokens, width) and (layers, tokens x key heads, head_dim), torch float32; vectors that are
    nothing but zeros are left out of the former.
    """
    import torch

    chosen = np.sort(np.random.default_rng(seed).choice(ids.size, min(most, ids.size), replace=False))
    read: list[Any] = [[] for _ in range(2 * len(p.layers))]
    values: list[Any] = [[] for _ in p.layers]
    wanted = torch.empty(0, dtype=torch.int64)

    def keep(into: list[Any], first: int = 0) -> Any:
        return lambda _, args, out: into.append(out[0, wanted, first:].float().cpu())

    with contextlib.ExitStack() as stack, torch.no_grad():
        for i, layer in enumerate(p.layers):
            stack.enter_context(layer.attention_norm.register_forward_hook(keep(read[2 * i])))
            stack.enter_context(layer.mlp_norm.register_forward_hook(keep(read[2 * i + 1])))
            stack.enter_context(layer.value.layer.register_forward_hook(keep(values[i], layer.value.start)))
        for at, sequence in enumerate(ids):
            wanted = torch.from_numpy(chosen[chosen // ids.shape[1] == at] % ids.shape[1])
            if len(wanted):
                p.model.model(torch.from_numpy(sequence)[None].to(p.embedding.weight.device), use_cache=False)
    x = torch.cat([part for parts in read for part in parts])
    v = torch.stack([torch.cat(parts).unflatten(-1, (-1, p.head_dim)).flatten(0, 1) for parts in values])
    if not torch.isfinite(x).all() or not torch.isfinite(v).all():
        raise SourceError("the activations hold NaN or infinity")
    return x[x.any(-1)], v


def kurtail(
    p: Parts,
    ids: NDArray[np.int64],
    *,
    steps: int = 100,
    batch: int = 2048,
    lr: float = 1.0,
    most: int = 1024,
    seed: int = 0,
    note: Note | None = None,
) -> Rotations:
    """Learn R1 and R2 of a model (`transforms.parts`) whose norms are fused; its weights are left alone.

    `ids` (count, context) are token ids of a calibration text, of which `most` are kept: most x (2 x layers x width +
    ...) numbers of 4 bytes. `steps` of Cayley Adam, for R1 and for R2, take `batch` vectors each, drawn from all layers
    for R1, and of each layer for R2; the longest step falls linearly from `lr` to 0. `seed` is that of the Hadamard
    matrices that are the start, of R4, and of all choices.

    `about` of what is returned has mean |kurtosis - 1.8| and the mean kurtosis over the whole sample, at the start and
    the end, and before any rotation. `history` is that of R1, then that of R2.

    DivergedError where what is minimised is not finite, or is not below that of the start in the end; SourceError where
    there are no tokens, or activations are not finite; TransformError where the model does not fit.
    """
    require_rotatable(p)
    require_fused(p)
    if named := [layer.name for layer in p.layers if hooked(layer.attention_out) or hooked(layer.mlp_out)]:
        raise TransformError(f"{named[0]} has an online transform; learn rotations before it is there")
    if not ids.size:
        raise SourceError("no tokens to learn rotations on")
    began = time.perf_counter()
    x, v = gather(p, ids, most, seed)
    about: dict[str, Any] = {"method": "kurtail", "steps": steps, "batch": batch, "lr": lr}
    about |= {"tokens": min(most, ids.size), "seed": seed, "gather seconds": round(time.perf_counter() - began, 1)}
    history: list[float] = []
    found = []
    for name, r, data in zip(("r1", "r2"), start(p, seed), (x, v), strict=True):
        r = r.detach().cpu().requires_grad_()
        about[name] = {"before": _state(None, data), "start": _state(r, data)}
        for k, loss in enumerate(_learn(name, r, data, steps, batch, lr, seed), 1):
            history.append(loss)
            if note:
                note(f"kurtail {name}, |kurtosis - 1.8| {loss:.4f}", k, steps)
        about[name]["end"] = _state(r, data)
        old, new = about[name]["start"]["loss"], about[name]["end"]["loss"]
        if not new <= old:
            raise DivergedError(f"learning {name} diverged: |kurtosis - 1.8| {old:.4g}, then {new:.4g} (lr {lr:g})")
        found.append(nearest(r.detach().numpy()))
    about["seconds"] = round(time.perf_counter() - began, 1)
    return Rotations(found[0], found[1], seed, about, tuple(history))


def _learn(name: str, r: Any, data: Any, steps: int, batch: int, lr: float, seed: int) -> Iterator[float]:
    """Losses of the steps; `r` is changed in place."""
    import torch

    optimiser, order, vectors = CayleyAdam([r], lr), np.random.default_rng(seed + 1), data.shape[-2]
    for k in range(steps):
        at = torch.from_numpy(order.choice(vectors, min(batch, vectors), replace=False))
        loss = (kurtosis(data[..., at, :] @ r.to(data).mT) - UNIFORM).abs().mean()
        loss.backward()
        if not math.isfinite(value := float(loss.detach())):
            raise DivergedError(f"learning {name} diverged at step {k + 1}: the kurtosis is {value}")
        optimiser.lr = lr * (1 - k / steps)
        optimiser.step()
        yield value


def _state(r: Any, data: Any) -> dict[str, float]:
    """Mean |kurtosis - 1.8| and mean kurtosis of all vectors."""
    import torch

    with torch.no_grad():
        turned = (part if r is None else part @ r.detach().to(data).mT for part in data.split(8192, dim=-2))
        k = torch.cat([kurtosis(part).flatten() for part in turned])
        return {"loss": float((k - UNIFORM).abs().mean()), "kurtosis": float(k.mean())}
