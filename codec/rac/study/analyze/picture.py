"""The report as a picture: matplotlib's only door in the package."""

from __future__ import annotations

import importlib.util
import io
import itertools
from collections.abc import Mapping
from typing import Any

from rac.errors import MissingDependencyError
from rac.study.analyze.measures import CURVE
from rac.study.analyze.report import COLOURS, classes


def require() -> None:
    """MissingDependencyError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("pictures need matplotlib: pip install rac-codec[plot]")


def png(report: Mapping[str, Any]) -> bytes:
    """Bits by layer, energy curves, a distribution and the map of layers and bases."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ((bits, energy), (spread, heat)) = figure.subplots(2, 2)
    kinds = classes(b["id"] for b in report["bases"])
    blocks = report["blocks"]
    layers = [x for x in blocks if x["block"]]
    shown = report["histograms"][-1] if report["histograms"] else None
    one = next((t for t in report["tensors"] if t["name"] == shown), None)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(report["edges"])]
    for b in report["bases"]:
        key, how = b["id"], {"color": COLOURS[kinds[b["id"]]][0], "label": b["name"], "lw": 1.4}
        bits.plot([int(x["block"]) for x in layers], [_number(x["bases"][key]["bits"]) for x in layers], **how)
        if report["model"][key]["curve"] is not None:
            energy.plot([i / CURVE for i in range(CURVE + 1)], report["model"][key]["curve"], **how)
        counts = one["bases"].get(key, {}).get("histogram") if one else None
        if counts:
            spread.semilogy(middles, [c or float("nan") for c in counts], **how)
    bits.set(title="bits per weight at equal output error", xlabel="layer")
    bits.legend(fontsize=8)
    for axis in (bits.xaxis, heat.yaxis):
        axis.get_major_locator().set_params(integer=True)
    energy.set(title="energy in the largest columns", xlabel="share of columns", xlim=(0, 1), ylim=(0, 1))
    spread.set(title=f"distribution: {shown}", xlabel="weight / root mean square")
    others = [b for b in report["bases"] if b["id"] != "original"]
    values = [
        [_number(x["bases"][b["id"]]["bits"]) - _number(x["bases"]["original"]["bits"]) for b in others] for x in blocks
    ]
    if values and others:
        most = max((abs(v) for row in values for v in row if v == v), default=1.0) or 1.0
        image = heat.imshow(values, aspect="auto", cmap="BrBG_r", vmin=-most, vmax=most)
        names = [b["name"].replace(" + ", " +\n").replace(", ", ",\n") for b in others]
        heat.set_xticks(range(len(others)), names, fontsize=8)
        heat.set(title="bits beyond the original", ylabel="layer")
        figure.colorbar(image, ax=heat)
    figure.suptitle(f"Bases of {report['about']['model']}")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _number(x: float | None) -> float:
    return float("nan") if x is None else x
