"""The scale at which the quantised tensors of a recipe meet a budget: what the bars and tests start from."""

from __future__ import annotations

from collections.abc import Sequence

from rac.encode import ties, workers
from rac.encode.align.recipe import Recipe
from rac.encode.allocate.budget import Search
from rac.encode.options import Budget


def solve(groups: Sequence[ties.Group], recipe: Recipe, budget: Budget, jobs: int = 1) -> Recipe:
    """The recipe at that scale, found by so many threads."""
    with workers.start(jobs) as threads:
        return Search(groups, recipe, threads).meet(budget)
