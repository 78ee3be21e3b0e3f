"""SpinQuant: rotations of the residual stream and of the values, learned on the model's loss (arXiv 2405.16406).

R1 and every R2 start as randomised Hadamard matrices and follow, by Cayley SGD, the cross-entropy of the next token,
activations and cache quantised, the rounding passed through by the straight-through estimator; 100 steps, the step
length falling linearly from `rate` to 0. Weights are not quantised while rotations are learned: the paper's setting for
weights that GPTQ quantises afterwards. R3 and R4 are Hadamard matrices, run online.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import DivergedError, SourceError
from rac.methods.rotations.cayley import CayleySGD
from rac.methods.rotations.result import Rotations, nearest
from rac.methods.rotations.simulate import Simulated, simulated
from rac.methods.transforms import Parts, hadamard
from rac.methods.transforms.rotate import require_rotatable

Note = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is."""

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
    """Learn R1 and R2 of a model whose norms are fused; its weights are left alone.

    Args:
        p: The model (`transforms.parts`), norms fused, no online maps.
        ids: Token ids (count, context) of a calibration text. The last `batch` sequences are held out: on them the loss
            is found before and after.
        steps: Steps of SGD.
        batch: Sequences of one step.
        lr: Longest step at the start; it falls linearly to 0. None: `rate` of the tokens of a step.
        momentum: Momentum of Cayley SGD.
        how: What is quantised while learning; 4 bits for activations and cache if None.
        seed: Seed of the Hadamard matrices that are the start, of R4, and of the order of sequences.
        note: Progress.

    Returns:
        `about` has the loss of the held-out sequences: "plain" (nothing quantised), "start", "end", nats per token.

    Raises:
        DivergedError: A loss is not finite, or stays above that of the start.
        SourceError: Too few sequences.
        TransformError: The model does not fit.
    """
    import torch

    require_rotatable(p)
    if len(ids) < 2 * batch or ids.shape[1] < 2:
        raise SourceError(f"{len(ids)} sequences of {ids.shape[1]} tokens, at least {2 * batch} are needed")
    how, began = how or Simulated(), time.perf_counter()
    lr = rate(batch * ids.shape[1]) if lr is None else lr
    data = torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(p.embedding.weight.device)
    held, data = data[-batch:], data[:-batch]
    r1, r2 = start(p, seed)
    optimiser = CayleySGD([r1, r2], lr, momentum)
    order = np.random.default_rng(seed)
    frozen = [w for w in p.model.parameters() if w.requires_grad]
    training, losses = p.model.training, []
    p.model.eval()
    for w in frozen:
        w.requires_grad_(False)
    try:
        plain = _mean_loss(p.model, held)
        first = last = _held(p, how, r1, r2, held, seed)
        for k in range(steps):
            at = order.choice(len(data), batch, replace=len(data) < batch)
            with simulated(p, how, r1, r2, r4=seed):
                loss = next_token_loss(p.model, data[torch.from_numpy(at)])
                loss.backward()
            losses.append(float(loss.detach()))
            _diverged(losses[-1], first, k + 1, lr, 2)
            optimiser.lr = lr * (1 - k / steps)
            optimiser.step()
            if (k + 1) % PATIENCE == 0 or k + 1 == steps:
                last = _held(p, how, r1, r2, held, seed)
                _diverged(last, first, k + 1, lr, 1.1)
            if note:
                note(f"spinquant, loss {losses[-1]:.4f}", k + 1, steps)
    finally:
        for w in frozen:
            w.requires_grad_(True)
        p.model.train(training)
    about = {
        "method": "spinquant",
        "steps": steps,
        "batch": batch,
        "context": ids.shape[1],
        "lr": lr,
        "momentum": momentum,
        "activations": how.activations,
        "cache": how.cache,
        "seed": seed,
        "plain": plain,
        "start": first,
        "end": last,
        "seconds": round(time.perf_counter() - began, 1),
    }
    one, each = (nearest(r.detach().cpu().numpy()) for r in (r1, r2))
    return Rotations(one, each, seed, about, tuple(losses))


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


def loss_of(p: Parts, ids: Any, how: Simulated, found: Rotations | None = None, *, r3: bool = True) -> float:
    """Mean loss, nats per token, of sequences (count, n) with activations and cache quantised.

    Args:
        p: A model; its norms are fused where there are rotations.
        ids: Token ids; one sequence after the other is run.
        how: What is quantised.
        found: R1 and R2, and with them R4; None: none of them.
        r3: Keys are rotated.
    """
    import torch

    if found is None:
        with simulated(p, how, r3=r3):
            return _mean_loss(p.model, torch.as_tensor(ids))
    r1, r2 = torch.from_numpy(found.r1), torch.from_numpy(found.r2)
    with simulated(p, how, r1, r2, r3=r3, r4=found.seed):
        return _mean_loss(p.model, torch.as_tensor(ids))


def _held(p: Parts, how: Simulated, r1: Any, r2: Any, ids: Any, seed: int) -> float:
    with simulated(p, how, r1.detach(), r2.detach(), r4=seed):
        return _mean_loss(p.model, ids)


def _mean_loss(model: Any, ids: Any) -> float:
    import torch

    with torch.no_grad():
        return float(np.mean([float(next_token_loss(model, one[None])) for one in ids]))


def _diverged(loss: float, first: float, step: int, lr: float, much: float) -> None:
    """DivergedError where a loss is not finite, or more than `much` times that of the start."""
    if not math.isfinite(loss) or loss > much * first:
        raise DivergedError(
            f"learning rotations diverged at step {step}: loss {loss:.4g}, {first:.4g} at the start; "
            f"try a smaller learning rate than {lr:g}"
        )
