"""SpinQuant: rotations of the residual stream and of the values, learned on the model's loss (arXiv 2405.16406).

R1 and every R2 start as randomised Hadamard matrices and follow, by Cayley SGD, the cross-entropy of the next token,
activations and cache quantised. Weights are not quantised meanwhile: the paper's setting for weights that GPTQ
quantises afterwards. R3 and R4 are Hadamard matrices, run online (docs/methods/spinquant.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.text import Note
from rac.encode.options import silent
from rac.errors import DivergedError, SourceError
from rac.methods.rotations.cayley import CayleySGD
from rac.methods.rotations.result import Rotations, nearest
from rac.methods.rotations.simulate import Simulated, simulated
from rac.methods.transforms import Parts, hadamard
from rac.methods.transforms.rotate import require_rotatable
from rac.models.linears import frozen

RATE, TOKENS = 1.5, 16384
"""Longest step of the authors' scripts, and tokens of one of their steps: 8 sequences of 2,048."""
PATIENCE = 20
"""Steps after which the held-out sequences are looked at: the losses of steps are those of other sequences each."""


def spinquant(
    p: Parts,
    ids: NDArray[np.int64],
    *,
    steps: int = 100,
    batch: int = 2,
    lr: float | None = None,
    momentum: float = 0.0,
    how: Simulated | None = None,
    seed: int = 0,
    note: Note | None = None,
) -> Rotations:
    """Learn R1 and R2 of a model (`transforms.parts`) whose norms are fused; its weights are left alone.

    `ids` (count, context) are token ids of a calibration text. The last `batch` sequences are held out: on them the
    loss is found before and after. `steps` of Cayley SGD with `momentum` take `batch` sequences each; the longest falls
    linearly from `lr` (None: `rate` of the tokens of a step) to 0. `how` says what is quantised meanwhile; None: 4 bits
    for activations and cache. `seed` is that of the Hadamard matrices that are the start, of R4, and of the order of
    sequences.

    `about` of what is returned has the loss of the held-out sequences: "plain" (nothing quantised), "start", "end",
    nats per token.

    DivergedError where a loss is not finite, or stays above that of the start; SourceError where there are too few
    sequences, TransformError where the model does not fit.
    """
    import torch

    require_rotatable(p)
    if len(ids) < 2 * batch or ids.shape[1] < 2:
        raise SourceError(f"{len(ids)} sequences of {ids.shape[1]} tokens, at least {2 * batch} are needed")
    how, began = how or Simulated(), time.perf_counter()
    lr = rate(batch * ids.shape[1]) if lr is None else lr
    about: dict[str, Any] = {"method": "spinquant", "steps": steps, "batch": batch, "context": ids.shape[1], "lr": lr}
    about |= {"momentum": momentum, "activations": how.activations, "cache": how.cache, "seed": seed}
    data = torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(p.embedding.weight.device)
    held, data = data[-batch:], data[:-batch]
    few, order = len(data) < batch, np.random.default_rng(seed)
    batches = [data[torch.from_numpy(order.choice(len(data), batch, replace=few))] for _ in range(steps)]
    r1, r2 = start(p, seed)
    optimiser = CayleySGD([r1, r2], lr, momentum)
    with frozen(p.model):
        about["plain"] = mean_loss(p.model, held)
        within = partial(simulated, p, how, r1, r2, r4=seed)
        losses, ends = _learn(p.model, within, batches, held, optimiser, note or silent)
    about |= {"start": ends[0], "end": ends[-1], "seconds": round(time.perf_counter() - began, 1)}
    one, each = (nearest(r.detach().cpu().numpy()) for r in (r1, r2))
    return Rotations(one, each, seed, about, tuple(losses))


def _learn(
    model: Any, within: Callable[[], Any], batches: Sequence[Any], held: Any, optimiser: CayleySGD, note: Note
) -> tuple[list[float], list[float]]:
    """Losses of the steps, `within` what is simulated; and of the held-out sequences, from the start to the end."""

    def judged() -> float:
        with within():
            return mean_loss(model, held)

    lr, losses, ends = optimiser.lr, [], [judged()]
    for k, ids in enumerate(batches):
        with within():
            loss = next_token_loss(model, ids)
            loss.backward()
        losses.append(float(loss.detach()))
        _diverged(losses[-1], ends[0], k + 1, lr, 2)
        optimiser.lr = lr * (1 - k / len(batches))
        optimiser.step()
        if (k + 1) % PATIENCE == 0 or k + 1 == len(batches):
            ends.append(judged())
            _diverged(ends[-1], ends[0], k + 1, lr, 1.1)
        note(f"spinquant, loss {losses[-1]:.4f}", k + 1, len(batches))
    return losses, ends


def rate(tokens: int) -> float:
    """Longest step for so many tokens of a step: the authors' at theirs, with the root of the number at others.

    A gradient is a mean, and the noise of it falls with that root; at RATE, steps of few tokens follow the noise
    (docs/methods/spinquant.md).
    """
    return RATE * math.sqrt(tokens / TOKENS)


def start(p: Parts, seed: int) -> tuple[Any, Any]:
    """R1 (width, width) and R2 (layers, head_dim, head_dim), randomised Hadamard matrices, float64, for gradients.

    R1 has the signs of `seed`, R2 of layer i those of seed + 3 i + 1, as `transforms.quarot` has.
    """
    import torch

    def dense(n: int, s: int) -> Any:
        return hadamard(n, s).apply(torch.eye(n, dtype=torch.float64)).T.contiguous()

    device = p.embedding.weight.device
    r1 = dense(p.width, seed).to(device).requires_grad_()
    r2 = torch.stack([dense(p.head_dim, seed + 3 * i + 1) for i in range(len(p.layers))])
    return r1, r2.to(device).requires_grad_()


def next_token_loss(model: Any, ids: Any) -> Any:
    """Mean cross-entropy of tokens 1, 2, ... of sequences (batch, n), nats."""
    import torch

    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def mean_loss(model: Any, ids: Any) -> float:
    """Mean loss, nats per token, of sequences (count, n), one after the other."""
    import torch

    with torch.no_grad():
        return float(np.mean([float(next_token_loss(model, one[None])) for one in ids]))


def _diverged(loss: float, first: float, step: int, lr: float, much: float) -> None:
    """DivergedError where a loss is not finite, or more than `much` times that of the start."""
    if not math.isfinite(loss) or loss > much * first:
        what = f"loss {loss:.4g}, {first:.4g} at the start; try a smaller learning rate than {lr:g}"
        raise DivergedError(f"learning rotations diverged at step {step}: {what}")


def loss_of(p: Parts, ids: Any, how: Simulated, found: Rotations | None = None, *, r3: bool = True) -> float:
    """Mean loss, nats per token, of sequences (count, n), one after the other, with activations and cache quantised.

    The norms of the model are fused where there are rotations, `found`: R1 and R2, and with them R4. With `r3` keys are
    rotated.
    """
    import torch

    of = () if found is None else (torch.from_numpy(found.r1), torch.from_numpy(found.r2))
    with simulated(p, how, *of, r3=r3, r4=None if found is None else found.seed):
        return mean_loss(p.model, torch.as_tensor(ids))
