"""What a lossy pack of large models would take, computed: shapes, costs of each operation, hours, memory and disk.

python tools/large_models.py      memory and disk alone, which need no measurement
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rac.calibrate.leading import RANK
from rac.calibrate.moments import OWN
from rac.calibrate.outer import size
from rac.encode.quantise.tensor import FEWEST as FEW
from rac.encode.quantise.tensor import PRODUCTS as LIMIT

PASSES = 1.2
"""Over all matrices: one, and four tries on one row in twenty."""
CALIBRATION = 40960
"""Tokens of a calibration, the default of `rac pack`."""
CORES = 64
HOUR = 3.6e12


@dataclass(frozen=True)
class Input:
    """A vector that matrices of a block multiply."""

    n: int
    rows: tuple[int, ...]
    """Outputs of each matrix that reads it."""
    copies: int = 1
    share: float = 1.0
    """Of the tokens, for each copy."""

    @property
    def dense(self) -> int:
        """Bytes where each copy has a second moment of n^2 numbers."""
        return 4 * self.copies * self.n**2

    @property
    def stored(self) -> int:
        """Bytes of second moments on the disk: of many experts leading directions, and that of all."""
        less = 4 * self.copies * self.n * (RANK + 1) + 4 * self.n**2
        return self.dense if self.copies == 1 or self.dense <= OWN else less

    @property
    def outer(self) -> int:
        """Bytes of second moments of gradients at outputs, of matrices that have few and are no experts'."""
        return sum(size(m, self.n) for m in self.rows if self.copies == 1)

    @property
    def held(self) -> int:
        """Bytes of sums while they are made, those of a batch of 2,048 tokens beside."""
        less = 4 * self.copies * self.n * (2 * RANK + 1) + 4 * self.n**2
        batch = int(4 * 2048 * self.share * self.copies * self.n)
        return self.dense if self.copies == 1 or self.dense <= OWN else less + batch


@dataclass(frozen=True)
class Model:
    """A chain of equal blocks."""

    name: str
    blocks: int
    width: int
    inputs: tuple[Input, ...]

    @property
    def matrices(self) -> list[tuple[Input, int]]:
        """Every matrix of a block: its input, and its outputs."""
        return [(i, m) for i in self.inputs for m in i.rows]

    @property
    def weights(self) -> int:
        """That are quantised."""
        return self.blocks * sum(i.copies * i.n * m for i, m in self.matrices)

    @property
    def moments(self) -> int:
        """Bytes of all second moments on the disk."""
        return self.blocks * sum(i.stored for i in self.inputs)

    @property
    def block(self) -> int:
        """Bytes at most in a backward step: a block as it is stored, its widest matrix in float32, sums, a batch."""
        weights = 2 * self.weights // self.blocks + 4 * max(i.n * m for i, m in self.matrices)
        return weights + sum(i.held * (len(i.rows) if i.copies == 1 else 1) for i in self.inputs)


def llama(name: str, blocks: int, width: int, inner: int) -> Model:
    """Grouped attention with keys and values of 1024; embeddings stay lossless."""
    inputs = (Input(width, (width, 1024, 1024)), Input(width, (width,)), Input(width, (inner, inner)))
    return Model(name, blocks, width, (*inputs, Input(inner, (width,))))


EXPERTS, ACTIVE, WIDTH, INNER = 384, 8, 7168, 2048
MODELS = (
    llama("8B", 32, 4096, 14336),
    llama("70B", 80, 8192, 28672),
    Model(
        "1T MoE",
        60,
        WIDTH,
        (
            Input(WIDTH, (WIDTH, WIDTH, WIDTH)),
            Input(WIDTH, (WIDTH,)),
            Input(WIDTH, (2 * INNER,), EXPERTS, ACTIVE / EXPERTS),  # gate and up are one parameter
            Input(INNER, (WIDTH,), EXPERTS, ACTIVE / EXPERTS),
        ),
    ),
)


@dataclass(frozen=True)
class Work:
    """Operations of a pack."""

    forward: float
    """Multiply-adds of tokens and weights, both passes."""
    moments: float
    """Numbers of second moments, for each token: with a backward pass every matrix has its own."""
    triangular: float
    """n^3 of different inputs."""
    feedback: float
    """Multiply-adds of one pass."""
    measuring: float
    """Multiply-adds."""
    weights: float

    @classmethod
    def of(cls, model: Model, tokens: int) -> Work:
        """All of a model."""
        b, every = model.blocks, model.matrices
        of_tokens = tokens * b * sum(i.copies * i.share * i.n * m for i, m in every)
        return cls(
            3 * of_tokens,
            tokens * b * sum(i.copies * i.share * i.n**2 for i, _ in every),
            b * sum(i.copies * i.n**3 for i in model.inputs),
            b * sum(i.copies * m * i.n**2 / 2 for i, m in every),
            2 * b * sum(i.copies * min(m * i.n**2, max(LIMIT, FEW * i.n**2)) for i, m in every),
            model.weights,
        )


RUN = ("forward", "backward", "ends")
"""Stages in which the model is run, two of three multiply-adds of a weight in the second."""
STAGES = ("calibration", "moments", "triangular", "feedback", "search", "coding", "measuring", "rest")


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of a core for each unit of Work; search, coding and rest for each weight."""

    forward: float
    moment: float
    triangular: float
    feedback: float
    search: float
    coding: float
    measuring: float
    rest: float
    passes: float
    """Over all matrices, tries on a sample among them."""

    @classmethod
    def measured(cls, found: Mapping[str, Any], model: Model) -> Costs:
        """Those of a pack that tools/lossy_at_scale.py has made of a model."""
        work, every = Work.of(model, found["tokens"]), found["all"]
        of = {name: 1e9 * every.get(name, 0.0) for name in every}
        one = sum(of.get(name, 0.0) for name in ("feedback", "search", "coding"))
        some = 1e9 * sum(found["sample"].values())
        ran = sum(of.get(name, 0.0) for name in RUN) + 1.5 * of.get("whole", 0.0)
        known = (*RUN, "whole", "moments", "triangular", "feedback", "search", "coding", "measuring")
        return cls(
            ran / max(1, work.forward),
            of.get("moments", 0.0) / max(1, work.moments),
            of.get("triangular", 0.0) / work.triangular,
            of.get("feedback", 0.0) / work.feedback,
            of["search"] / work.weights,
            of["coding"] / work.weights,
            of["measuring"] / work.measuring,
            sum(ns for name, ns in of.items() if name not in known) / work.weights,
            1 + some / one,
        )

    def hours(self, model: Model, tokens: int) -> dict[str, float]:
        """Of one core, by stage; those of a pass count as often as there are passes."""
        w = Work.of(model, tokens)
        each = {
            "calibration": self.forward * w.forward,
            "moments": self.moment * w.moments,
            "triangular": self.triangular * w.triangular,
            "feedback": self.passes * self.feedback * w.feedback,
            "search": self.passes * self.search * w.weights,
            "coding": self.passes * self.coding * w.weights,
            "measuring": self.measuring * w.measuring,
            "rest": self.rest * w.weights,
        }
        return {name: ns / HOUR for name, ns in each.items()}


def table(head: str, rows: list[list[str]]) -> None:
    """Print a table."""
    print(f"\n| {head} |\n|{' ---: |' * (head.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def hours(costs: Costs) -> None:
    """Print the time of the models."""
    rows = []
    for model in MODELS:
        found = costs.hours(model, CALIBRATION)
        total = sum(found.values())
        each = [f"{found[name]:,.1f}" for name in STAGES]
        rows.append([model.name, f"{model.weights / 1e9:,.1f}", *each, f"{total:,.1f}", f"{total / CORES:,.2f}"])
    head = f"model | quantised weights, 1e9 | {' | '.join(STAGES)} | all | all on {CORES} cores"
    table(head, rows)


def sizes(held: tuple[float, float]) -> None:
    """Print memory and disk of the models; `held`: bytes for each n^2 of a factor, for each weight of a matrix."""
    rows = []
    for m in MODELS:
        largest = max(max(held[0] * i.n**2, held[0] / 2 * i.n**2 + (4 + held[1]) * i.n * r) for i, r in m.matrices)
        every = (
            2 * m.weights,
            4 * CALIBRATION * m.width * (m.blocks + 1),
            m.moments,
            m.blocks * sum(i.outer for i in m.inputs),
            m.block,
            largest,
            4 * max(i.n**2 for i in m.inputs),
        )
        rows.append([m.name, *(f"{v / 1e9:,.1f}" for v in every)])
    table(
        "model | BF16 weights, disk | hidden states, disk | second moments, disk | more with `--effort max` | "
        "one block in calibration, memory | largest matrix, memory | largest second moment",
        rows,
    )


def blocks(found: Mapping[str, Any]) -> Model:
    """The model that tools/lossy_at_scale.py has packed."""
    return llama(f"{found['blocks']} blocks", found["blocks"], 4096, 14336)


def check(costs: Costs, found: Mapping[str, Any]) -> None:
    """Print what costs say of a pack beside what it took."""
    computed = {name: 3600 * h for name, h in costs.hours(blocks(found), found["tokens"]).items()}
    every, some = found["all"], found["sample"]
    took = {name: every.get(name, 0.0) for name in STAGES}
    took |= {name: took[name] + some.get(name, 0.0) for name in ("feedback", "search", "coding")}
    took["calibration"] = sum(every.get(name, 0.0) for name in (*RUN, "whole"))
    took["rest"] = found["core"] - sum(took[name] for name in STAGES if name != "rest")
    rows = [[name, f"{computed[name]:.1f}", f"{took[name]:.1f}"] for name in STAGES]
    all_of = sum(computed.values())
    rows.append(["all", f"{all_of:.1f}", f"{found['core']:.1f}"])
    table("stage | computed, core seconds | measured", rows)
    print(f"\n{found['blocks']} blocks, {found['tokens']} tokens: computed {all_of / found['core'] - 1:+.1%} off")


HELD = 8.5, 7.0
"""Bytes of a factor for each n^2, and of quantising for each weight, that tools/scaling.py has measured."""

if __name__ == "__main__":
    sizes(HELD)
