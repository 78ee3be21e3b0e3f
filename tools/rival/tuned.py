"""What comes after quantising: a factor for each row and each column of every matrix, learned while all codes stay.

WaterSIC-FT (arXiv 2603.04956) learns these; they also are what QTIP (arXiv 2406.11235) learns of its vectors of signs,
once these are numbers. Lessons, steps, rate and judge are not those of the papers but of RAC's recovery, so that codes
are compared, and what is learned beside them. Factors are FP16. Left out: QTIP's tuning between blocks, norms, head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.builtin import learned
from rac.calibrate.folder import Folder
from rac.calibrate.passes import Asked, load_model, model_class
from rac.recover.lessons import Lessons, Text, lessons
from rac.recover.model import Part, Trained, UnfitError
from rac.recover.run import Plan, Training

BITS = {"watersic": (16, 0), "qtip": (15, 15)}
"""Bits that factors of a row and of a column take beside what a method has already, of others 16."""
ROWS, COLUMNS = " rows", " columns"
Floats = NDArray[np.float32]


class Scaled(Trained):
    """A model whose linear layers inside the blocks get a factor for each row and each column."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        self._columns: dict[int, Any] = {}
        super().__init__(model, names)

    def _linear(self, module: Any) -> Callable[[Any], Any]:
        inner = super()._linear(module)

        def forward(x: Any) -> Any:
            factors = self._columns.get(id(module))
            return inner(x if factors is None else x * factors)

        return forward

    def train(self, matrices: Iterable[str], vectors: Iterable[str] = ()) -> None:
        """Train factors, 1 at first, of these; UnfitError where one of them is no (outputs, inputs) linear layer."""
        self.parts, end, modules = [], 0, []
        for name in matrices:
            module, _ = self._at(name) or (None, "")
            if module not in self._inside or not isinstance(module, torch.nn.Linear):
                raise UnfitError(f"{name} is no linear layer inside the blocks")
            modules.append(module)
            for kind, n in zip((ROWS, COLUMNS), module.weight.shape, strict=True):
                self.parts.append(Part(name + kind, False, slice(end, end + n)))
                end += n
        self.theta, self.scale = torch.ones(end), torch.ones(end)
        self._leaves = [torch.nn.Parameter(self.theta[part.at]) for part in self.parts]  # share the memory of theta
        for i, module in enumerate(modules):
            self._gains[id(module)], self._columns[id(module)] = self._leaves[2 * i : 2 * i + 2]


@dataclass(frozen=True, slots=True)
class School:
    """What all models are tuned on: the original, a text of which a calibration took `ids`, and so many steps."""

    folder: Path
    text: str
    ids: NDArray[np.int64]  # (count, context)
    steps: int

    def lessons(self) -> Lessons:
        """Those of RAC's recovery: one of four is of the built-in mix."""
        return lessons(self.folder, [Text(self.ids, self.text)], self.steps, learned())

    def tuned(self, matrices: Mapping[str, Floats], work: Path, taught: Path) -> tuple[dict[str, Floats], str]:
        """Matrices times their factors, and what is to say of it; states are kept in `work`, so that it goes on.

        What the original predicts is kept in `taught`, for all.
        """
        path = os.fspath(self.folder)
        kind, config = model_class(path)
        model = Scaled(load_model(kind, Asked(path, 1, 1, False), config, "auto"), matrices)
        types = {name + part: "F16" for name in matrices for part in (ROWS, COLUMNS)}
        folders = (Folder(at.parent, at.name) for at in (work, taught))
        training = Training(model, self.lessons(), Plan(self.steps, 0, types), next(folders), told, next(folders))
        training.teach()
        for name, w in matrices.items():
            model.put(name, w)
        model.train(matrices)
        found = training.run()
        said = f"{found.before:.4f} to {found.after:.4f} nats on held-out text after {found.steps} steps {found.why}"
        return {name: scaled(w, name, found.vectors) for name, w in matrices.items()}, said


def scaled(w: Floats, name: str, factors: Mapping[str, Floats]) -> Floats:
    """A matrix times the factors of its rows and columns, where there are any."""
    if not factors:
        return w
    return w * factors[name + ROWS][:, None] * factors[name + COLUMNS]


def told(what: str, done: int, of: int) -> None:
    """Say now and then how far it is."""
    if done % 20 == 0:
        print(f"{what} {done}/{of}", flush=True)


def bits(method: str, shapes: Iterable[Sequence[int]]) -> int:
    """Bits that the factors of matrices of these shapes take."""
    of_row, of_column = BITS.get(method, (16, 16))
    return sum(of_row * rows + of_column * columns for rows, columns in shapes)
