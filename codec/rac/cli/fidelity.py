"""What a lossy pack came to: a table by role, and the report for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from rac.container.output import write_whole
from rac.encode.align.recipe import Recipe
from rac.encode.encoded import Fidelity
from rac.encode.pack import Summary
from rac.study import role

ALARM = 10
"""Decibels of output signal to noise below which a layer is named."""


def by_role(layers: Sequence[Fidelity]) -> str:
    """A table with one line per role."""
    roles: dict[str, list[Fidelity]] = {}
    for f in layers:
        roles.setdefault(role(f.name), []).append(f)
    width = max([len(r) for r in roles] + [len("role")])
    lines = [f"{'role':<{width}}  tensors       weights  bits/w  SNR dB   least  rank  outliers"]
    for name, found in roles.items():
        weights = sum(math.prod(f.shape) for f in found)
        bits = 8 * sum(f.size for f in found) / weights
        mean, least = sum(f.snr for f in found) / len(found), min(f.snr for f in found)
        ranks = sorted({f.rank for f in found})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        lines.append(
            f"{name:<{width}}  {len(found):7,} {weights:13,} {bits:7.3f} {mean:7.2f} {least:7.2f} {rank:>5} "
            f"{sum(f.outliers for f in found):9,}"
        )
    return "\n".join(lines)


def write_report(path: str, done: Summary, recipe: Recipe) -> None:
    """Write a pack's totals and the fidelity of each quantised tensor to `path` as JSON; infinite ratios are null."""
    tensors = [
        asdict(f) | {"bits": f.bits, "role": role(f.name), "snr": f.snr if math.isfinite(f.snr) else None}
        for f in done.fidelity
    ]
    report = {
        "files": done.paths,
        "size": done.stored,
        "dense": done.dense,
        "weights": done.weights,
        "file_bits": 8 * done.stored / max(1, done.weights),
        "quantised": done.quantised,
        "quantised_bits": done.quantised_bits,
        "states": recipe.states,
        "passes": recipe.passes,
        "scale": recipe.scale,
        "about": dict(recipe.about),
        "unreached": recipe.unreached,
        "resumed": done.resumed,
        "alarms": [f.name for f in done.fidelity if f.snr < ALARM],
        "tensors": tensors,
    }
    write_whole(path, json.dumps(report, indent=1) + "\n")
