"""The training: steps down on a vector of numbers, judged on text that is held out, resumed where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.folder import Folder
from rac.calibrate.text import Note
from rac.container import zstd
from rac.recover.lessons import Lessons
from rac.recover.model import Part, Trained
from rac.recover.teacher import divergence, lesson, teach

GRID = 256  # a gain is 1 + k / GRID, k an i8 (format_spec/stages/trellis.md)
SEED = 0
RATE = 4e-3  # what a gain of the middle curvature moves in a step, about, where the divergence is LARGE
LARGE = 0.4  # nats
DAMP, FAR, TINY = 0.1, 3.0, 1e-30  # least curvature, of the middle one; how far a gain moves at most, in rates
WARM, END = 0.05, 0.25  # share of the steps in which the rate rises; what is left of it at the end
BETAS = 0.9, 0.98
LATE = 3  # in the mean of what steps have come to step t weighs about t to this power: it follows, and noise is out
LOOKS = 4  # how often the held-out text is looked at
KEPT = 10  # steps after which the state is written
WORSE = 3.0  # times the divergence at the beginning from which on steps have diverged
SMALL = 0.05  # nats that count as the divergence at the beginning at least, where steps are looked at
RECENT = 8  # steps, no fewer, whose median is looked at: single lessons, of other kinds of text, differ several times
_VECTORS = "theta", "mean", "square", "middle", "best"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train."""

    steps: int
    most: int  # bytes that all gains may take in the file
    types: Mapping[str, str] = field(default_factory=dict)  # data types of the vectors, by name
    coarse: int = 4  # gains are multiples of so many steps of the grid, of more where they would take too many bytes
    rate: float = field(default_factory=lambda: RATE)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What training has come to."""

    gains: Mapping[str, NDArray[np.int8]]  # (R,) of a matrix, in steps of the grid
    vectors: Mapping[str, NDArray[np.float32]]  # as the data type of the file holds them
    before: float  # nats a token on the held-out text
    after: float
    steps: int  # after which this was found; 0: nothing was better than what was there
    why: str = ""  # what ended the training before its last step


def coarse(x: Any, step: int) -> Any:
    """Gains as a file holds them."""
    most = 127 // step
    return 1 + torch.clamp(torch.round((x - 1) * (GRID / step)), -most, most) * (step / GRID)


def gains_of(theta: NDArray[np.float32], parts: list[Part]) -> dict[str, NDArray[np.int8]]:
    """The gains in a vector that is as a file holds it, in steps of the grid, by the name of their matrix."""
    each = {part.name: np.rint((theta[part.at] - 1) * GRID) for part in parts if part.gains}
    return {name: k.astype(np.int8) for name, k in each.items()}


def size_of(gains: Mapping[str, NDArray[np.int8]]) -> int:
    """Bytes of their sections in a file."""
    return sum(len(zstd.shorter(k.tobytes(), 19)) for k in gains.values() if k.any())


class Training:
    """One training, whose state is in a folder; what the original predicts may be in another, for several."""

    def __init__(
        self, model: Trained, lessons: Lessons, plan: Plan, folder: Folder, note: Note, taught: Folder | None = None
    ) -> None:
        self.model, self.lessons, self.plan, self.folder, self.note = model, lessons, plan, folder, note
        self.taught = taught or folder
        self._every = max(1, plan.steps // LOOKS)

    def teach(self) -> None:
        """Let the original, whose weights are in the model now, say what it predicts."""
        every = np.concatenate([self.lessons.train, self.lessons.held])
        teach(self.model.logits, every, self.taught, lambda i: self.note("recovery: the original", i, len(every)))

    def _as_stored(self, theta: Any, step: int) -> Any:
        return self.model.rounded(theta, self.plan.types, lambda x: coarse(x, step))

    def held(self, theta: Any, step: int) -> float:
        """Nats a token on the held-out text of numbers as a file would hold them."""
        now = self.model.theta.clone()
        self.model.use(self._as_stored(theta, step))
        with torch.no_grad():
            each = [self._loss(ids).item() for ids in self.lessons.held]
        self.model.use(now)
        return math.fsum(each) / len(each)

    def _loss(self, ids: NDArray[np.int64]) -> Any:
        taught = lesson(self.taught, ids, self.model.device)
        return divergence(self.model.logits(torch.from_numpy(np.ascontiguousarray(ids))), taught)

    def _order(self, step: int) -> int:
        """The lesson of a step: all of them before one comes again, each time in another order."""
        n = len(self.lessons.train)
        return int(np.random.default_rng((SEED, step // n)).permutation(n)[step % n])

    def _rate(self, step: int) -> float:
        """Rises over the first steps, then falls in a straight line: the mean takes the noise out, the rest goes on.

        How far there is to go is as the root of the divergence, and so is a gradient: over its square, the inverse.
        """
        warm = max(1.0, WARM * self.plan.steps)
        down = max(0.0, (step + 1 - warm) / max(1.0, self.plan.steps - warm))
        rate = self.plan.rate * min(1.0, math.sqrt(self.folder.state["before"] / LARGE))
        return rate * min(1.0, (step + 1) / warm) * (1 - (1 - END) * min(1.0, down))

    def run(self) -> Recovered:
        """Train, from where the folder's state is."""
        model, plan, state = self.model, self.plan, self.folder.state
        if "step" not in state:
            first = self.held(model.theta, plan.coarse)
            state.update(step=0, before=first, best=first, recent=[], at=0, why="")
            zero = torch.zeros_like(model.theta)
            self._save(model.theta, zero, zero, model.theta, model.theta)
        theta, m, v, middle, best = (self._read(kind) for kind in _VECTORS)
        model.use(theta)
        while state["step"] < plan.steps and not state["why"]:
            self._step(state, m, v)
            middle.lerp_(model.theta, (LATE + 1) / (LATE + max(1, state["step"])))
            last = state["step"] == plan.steps or bool(state["why"])
            looked = state["step"] % self._every == 0 or state["step"] == plan.steps
            if looked and (now := self.held(middle, plan.coarse)) < state["best"]:
                state.update(best=now, at=state["step"])
                best = middle.clone()
            if state["step"] % KEPT == 0 or last:
                self._save(model.theta, m, v, middle, best)
        return self._found(best)

    def _step(self, state: dict[str, Any], m: Any, v: Any) -> None:
        step = state["step"]
        loss = self._loss(self.lessons.train[self._order(step)])
        loss.backward()
        found = loss.item()
        recent = [*state["recent"], found][-RECENT:]
        far = len(recent) == RECENT and median(recent) > WORSE * max(state["before"], SMALL)
        if far or not math.isfinite(found):
            state["why"] = f"the steps diverged: {found:.3g} nats in step {step + 1}, {state['before']:.3g} at first"
            return
        self._move(step, m, v)
        state.update(step=step + 1, recent=recent)
        self.note("recovery", step + 1, self.plan.steps)

    def _move(self, step: int, m: Any, v: Any) -> None:
        """Go down along the mean of the gradients over that of their squares, which stands for the curvature.

        Adam divides by its root. A few steps are mostly noise: that costs as much as the curvature says, and is worth
        the least where it is large.
        """
        g = self.model.gradient() * self.model.scale
        m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        mean, square = (x / (1 - b ** (step + 1)) for x, b in zip((m, v), BETAS, strict=True))
        middle = square.sqrt().mean()
        move = (mean * middle / (square + DAMP * middle**2 + TINY)).clamp_(-FAR, FAR)
        self.model.use(self.model.theta - self._rate(step) * self.model.scale * move)

    def _read(self, kind: str) -> Any:
        found = np.array(self.folder.array(f"{kind}-{self.folder.state['step']:05}.npy"))
        return torch.from_numpy(found).to(self.model.device)

    def _save(self, *vectors: Any) -> None:
        step = self.folder.state["step"]
        names = [f"{kind}-{step:05}.npy" for kind in _VECTORS]
        for name, x in zip(names, vectors, strict=True):
            self.folder.put(name, x.detach().cpu().numpy())
        self.folder.commit(drop=lambda name: name.split("-")[0] in _VECTORS and name not in names)

    def _found(self, best: Any) -> Recovered:
        """The best numbers as a file holds them, gains so coarse that they take no more bytes than they may."""
        model, plan, state = self.model, self.plan, self.folder.state
        step, after = plan.coarse, state["best"]
        while True:
            theta = self._as_stored(best, step).cpu().numpy()
            gains = gains_of(theta, model.parts)
            if size_of(gains) <= plan.most or step > GRID:
                break
            step *= 2
        if step != plan.coarse:
            after = self.held(best, step)
        vectors = {part.name: theta[part.at].copy() for part in model.parts if not part.gains}
        if state["at"] == 0 or not after < state["before"]:
            return Recovered({}, {}, state["before"], state["before"], 0, state["why"])
        return Recovered(gains, vectors, state["before"], after, state["at"], state["why"])
