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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import DivergedError, SourceError, TransformError
from rac.linalg.transform import hooked
from rac.methods.rotations.cayley import CayleyAdam
from rac.methods.rotations.result import Rotations, nearest
from rac.methods.rotations.spinquant import Note, start
from rac.methods.transforms import Parts
from rac.methods.transforms.fuse import fused
from rac.methods.transforms.rotate import require_rotatable

UNIFORM = 1.8
"""Kurtosis of a uniform law."""


def kurtosis(x: Any) -> Any:
    """(...) of each vector along the last axis of x (..., n): E[(x - mean)^4] / E[(x - mean)^2]^2."""
    c = x - x.mean(-1, keepdim=True)
    square = c.square()
    return square.square().mean(-1) / square.mean(-1).square().clamp(min=1e-30)


def gather(p: Parts, ids: NDArray[np.int64], most: int, seed: int = 0) -> tuple[Any, Any]:
    """A sample of what a model reads and of its values, in the coordinates that it has.

    Args:
        p: The model, its norms fused.
        ids: Token ids (count, context).
        most: Tokens that are kept of each layer, of its attention's input, its MLP's, and its values.
        seed: Seed of the choice of tokens.

    Returns:
        (2 x layers x tokens, width) and (layers, tokens x key heads, head_dim), torch float32; vectors that are
        nothing but zeros are left out of the former.
    """
    import torch

    count = min(most, ids.size)
    chosen = np.sort(np.random.default_rng(seed).choice(ids.size, count, replace=False))
    read: list[Any] = [[] for _ in range(2 * len(p.layers))]
    values: list[Any] = [[] for _ in p.layers]
    wanted = torch.empty(0, dtype=torch.int64)

    def keep(into: list[Any], first: int) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            into.append(out[0, wanted, first:].float().cpu())

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for i, layer in enumerate(p.layers):
            for handle in (
                layer.attention_norm.register_forward_hook(keep(read[2 * i], 0)),
                layer.mlp_norm.register_forward_hook(keep(read[2 * i + 1], 0)),
                layer.value.layer.register_forward_hook(keep(values[i], layer.value.start)),
            ):
                stack.callback(handle.remove)
        for at, sequence in enumerate(ids):
            inside = chosen[(chosen >= at * ids.shape[1]) & (chosen < (at + 1) * ids.shape[1])] - at * ids.shape[1]
            wanted = torch.from_numpy(inside)
            if len(inside):
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
    """Learn R1 and R2 of a model whose norms are fused; its weights are left alone.

    Args:
        p: The model (`transforms.parts`), norms fused, no online maps.
        ids: Token ids (count, context) of a calibration text.
        steps: Steps of Cayley Adam, for R1 and for R2.
        batch: Vectors of one step, drawn from all layers for R1, and of each layer for R2.
        lr: Longest step of Cayley Adam at the start; it falls linearly to 0.
        most: Tokens whose activations are kept: most x (2 x layers x width + ...) numbers of 4 bytes.
        seed: Seed of the Hadamard matrices that are the start, of R4, and of all choices.
        note: Progress.

    Returns:
        `about` has mean |kurtosis - 1.8| and the mean kurtosis over the whole sample, at the start and the end, and
        before any rotation. `history` is that of R1, then that of R2.

    Raises:
        DivergedError: What is minimised is not finite, or is not below that of the start in the end.
        SourceError: There are no tokens, or activations are not finite.
        TransformError: The model does not fit.
    """
    require_rotatable(p)
    if not fused(p):
        raise TransformError("the gains of the norms are not fused; call fuse_norms first")
    if named := [layer.name for layer in p.layers if hooked(layer.attention_out) or hooked(layer.mlp_out)]:
        raise TransformError(f"{named[0]} has an online transform; learn rotations before it is there")
    if not ids.size:
        raise SourceError("no tokens to learn rotations on")
    began = time.perf_counter()
    x, v = gather(p, ids, most, seed)
    gathered = time.perf_counter() - began
    r1, r2 = (r.detach().cpu().requires_grad_() for r in start(p, seed))
    about: dict[str, Any] = {
        "method": "kurtail",
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "tokens": min(most, ids.size),
        "seed": seed,
        "gather seconds": round(gathered, 1),
    }
    history: list[float] = []
    for name, r, data in (("r1", r1, x), ("r2", r2, v)):
        about[name] = {"before": _state(None, data), "start": _state(r, data)}
        history += _learn(name, r, data, steps, batch, lr, seed, note)
        about[name]["end"] = _state(r, data)
        old, new = about[name]["start"]["loss"], about[name]["end"]["loss"]
        if not new <= old:
            raise DivergedError(f"learning {name} diverged: |kurtosis - 1.8| {old:.4g}, then {new:.4g} (lr {lr:g})")
    about["seconds"] = round(time.perf_counter() - began, 1)
    first, second = (nearest(r.detach().numpy()) for r in (r1, r2))
    return Rotations(first, second, seed, about, tuple(history))


def _learn(
    name: str, r: Any, data: Any, steps: int, batch: int, lr: float, seed: int, note: Note | None
) -> list[float]:
    """Losses of the steps; `r` is changed in place."""
    import torch

    optimiser, order, losses = CayleyAdam([r], lr), np.random.default_rng(seed + 1), []
    vectors = data.shape[-2]
    for k in range(steps):
        at = torch.from_numpy(order.choice(vectors, min(batch, vectors), replace=False))
        loss = (kurtosis(data[..., at, :] @ r.to(data).mT) - UNIFORM).abs().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise DivergedError(f"learning {name} diverged at step {k + 1}: the kurtosis is {losses[-1]}")
        optimiser.lr = lr * (1 - k / steps)
        optimiser.step()
        if note:
            note(f"kurtail {name}, |kurtosis - 1.8| {losses[-1]:.4f}", k + 1, steps)
    return losses


def _state(r: Any, data: Any) -> dict[str, float]:
    """Mean |kurtosis - 1.8| and mean kurtosis of all vectors."""
    import torch

    with torch.no_grad():
        found = [kurtosis(part if r is None else part @ r.detach().to(data).mT) for part in data.split(8192, dim=-2)]
        k = torch.cat([f.flatten() for f in found])
        return {"loss": float((k - UNIFORM).abs().mean()), "kurtosis": float(k.mean())}
