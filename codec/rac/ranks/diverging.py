"""The divergence of a model at a scale, measured by all ranks: windows of the text are the items of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from rac.calibrate.evaluate import Divergence, Judge
from rac.encode import ties
from rac.encode.encoded import Encoded, decoded
from rac.ranks.crew import Crew, Made, Plan
from rac.ranks.stage import Item, Stage
from rac.stages.words import from_words


@dataclass(slots=True)
class Diverging:
    """A model, of which a rank holds two in memory from its first window on: its own and the packed one."""

    crew: Crew
    judge: Judge
    groups: Mapping[str, ties.Group]
    """The quantised tensors by name."""
    take: Callable[[str], Encoded | None]
    """A tensor as some rank has left it, by its name."""
    _model: Divergence | None = None
    _scale: float | None = None

    def at(self, scale: float, what: str) -> float:
        """Nats per token at the scale that was tried last: sums of windows, added up in their order."""
        from rac.ranks.agree import agree  # imports torch

        agree(self.crew.store, "kl", {})
        count, tokens = self.judge.windows()
        items = tuple(Item(number, (), tokens) for number in range(count))
        stage = Stage(
            f"kl{scale!r}", f"measuring the divergence: {what} at {scale:+.3f}", items, lambda row: float(row[1])
        )
        with ThreadPoolExecutor(1) as pool:
            plan = Plan(stage, lambda item: (self._window, (scale, item.number)), lambda _: 0, pool)
            markers = replace(self.crew, jobs=1).do(plan)
        total = 0.0
        for number in range(count):
            total += markers[number].rows[0][1]
        return total / (count * tokens)

    def _window(self, scale: float, number: int) -> Made:
        """What a window comes to."""
        if self._model is None:
            self._model = self.judge()
        if self._scale != scale:
            for name, group in self.groups.items():
                e = self.take(name)
                assert e is not None  # noqa: S101 - its stage is done
                names = (name, *(alias for alias, _ in group.aliases))
                self._model.put(names, from_words(decoded(e), group.tensor.dtype))
            self._scale = scale
        return Made([["nats", self._model.over(number)]])
