"""The report as one HTML page: nothing is fetched, it reads on a desktop and on a phone, in light and in dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rac.study.analyze import svg
from rac.study.analyze.measures import CURVE
from rac.study.analyze.page import EXPLAINED, PAGE, STYLE

Report = Mapping[str, Any]
HEAD = (
    ("bits", "bits", ".3f"),
    ("kurtosis", "kurtosis", ".2f"),
    ("kurtosis_rows", "of rows", ".2f"),
    ("outlier", "max / rms", ".1f"),
    ("effective_rank", "effective rank", ".0f"),
    ("stable_rank", "stable rank", ".1f"),
    ("top10", "energy, top 10 %", ".1%"),
    ("gini", "Gini", ".3f"),
    ("output_top10", "output energy, top 10 %", ".1%"),
    ("output_gini", "output Gini", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("entropy_columns", "of columns", ".3f"),
    ("estimate", "bits estimated", ".3f"),
)
"""Columns of the table of means: key, head, format."""
BASIS = 3.0
"""Bits for each number of a basis that a file must hold: about the fewest that `rac pack` takes (docs/lossy.md)."""


def html(report: Report) -> str:
    """The page."""
    ids = [b["id"] for b in report["bases"]]
    about = report["about"]
    title = f"Bases of {about['model']}"
    spread = "Numbers of weights by size, in units of the root mean square, on a logarithmic axis. Dotted: a Gaussian. "
    plots = [
        ("Bits at equal output error, by layer", _by_block(report), "Mean of the matrices of a layer, by weights."),
        (
            "Energy curves",
            _curves(report, "curve"),
            "Share of the squared weights, in units of their steps, in the columns that have most; mean of all "
            "matrices. Dotted: every column has the same.",
        ),
        (
            "Output energy curves",
            _curves(report, "output_curve"),
            "Share of the output's energy that each coordinate of the input would give by itself; mean of all "
            "matrices.",
        ),
        *(
            (
                f"Distribution: {name}",
                _distribution(report, name),
                f"{spread}Kurtosis of the original {_kurtosis(report, name)}.",
            )
            for name in report["histograms"]
        ),
    ]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=lead>{_lead(about)}</p>",
        _findings(report),
        _section(
            "Means over all matrices",
            _table(report),
            "Bits are those of the real coder at one output error; "
            "the other figures are of the matrix as it is quantised.",
        ),
        _legend(report),
        '<div class="two">',
        *(_section(*plot) for plot in plots),
        "</div>",
        _section(
            "Bits beyond the original, layers by bases", _heat(report), "At equal output error; below 0 is better."
        ),
        _section("Where aligned takes fewer bits than rotated", _counts(report)),
        _section("Gaussian matrices", _gaussian(report), "Kurtosis within 3 &plusmn; 0.3."),
        _section("Bases", _terms((b["name"], b["text"]) for b in report["bases"])),
        _section("What the figures are", _terms(EXPLAINED)),
        f"<details><summary>All {len(report['tensors'])} matrices: bits at equal output error</summary>",
        f"{_all(report, ids)}</details>",
    ]
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(parts))


def _lead(about: Report) -> str:
    some = "" if about["matrices"] == about["of"] else f" of {about['of']} (those that match {escape(about['layers'])})"
    if about["second_moment"] == "text":
        error = (
            "Error is that of the layers' outputs, tr(E S E<sup>T</sup>): S, the second moment of a layer's inputs, "
            f"is found on {about['tokens']:,} tokens, "
            + (
                "which both make the bases and judge them."
                if about["seen"]
                else "half of them to make the bases, the other half to judge them."
            )
        )
    else:
        error = "No text was given: error is that of the weights, and there are no bases that follow the inputs."
    gains = "" if about["fused"] else " Gains of norms are not fused: there are no rules for this architecture."
    return (
        f"{about['matrices']}{some} matrices, {about['weights']:,} weights, in "
        f"{about['seconds']['all']:.0f} s. {error} "
        f"All bases are coded at the error that the original has at about {about['rate']:g} bits, by a trellis of "
        f"{about['states']} states and the entropy coder of the format.{gains}"
    )


def _findings(report: Report) -> str:
    model, names = report["model"], {b["id"]: b["name"] for b in report["bases"]}
    bits = {key: m["bits"] for key, m in model.items() if m["bits"] is not None}
    if len(bits) < 2:
        return ""
    best = min(bits, key=lambda key: bits[key])
    out = [
        f"Fewest bits: <b>{escape(names[best])}</b>, {bits[best]:.3f}, against {bits['original']:.3f} of the original"
    ]
    if "hadamard" in bits:
        out.append(f"rotated {bits['hadamard']:.3f}")
    for c in report["counts"]:
        if c["aligned"] == "triangular" and c["rotated"] in ("hadamard", "hadamard-feedback"):
            out.append(f"aligned below {escape(names[c['rotated']])} in {c['fewer']} of {c['matrices']} matrices")
    return f"<p class=lead>{'; '.join(out)}.</p>"


def _section(head: str, body: str, note: str = "") -> str:
    said = f"<p class=note>{note}</p>" if note else ""
    return f"<section><h2>{escape(head)}</h2>{body}{said}</section>"


def _cell(v: float | None, form: str) -> str:
    return "&ndash;" if v is None else format(v, form)


def _table(report: Report) -> str:
    entries, weights = _basis_entries(report), report["about"]["weights"]
    heads = [HEAD[0], ("with", "with basis", ".3f"), *HEAD[1:]]
    rows = []
    for b in report["bases"]:
        m = dict(report["model"][b["id"]])
        bits = m["bits"]
        m["with"] = None if bits is None else bits + BASIS * entries.get(b["id"], 0) / weights
        cells = "".join(f"<td>{_cell(m[key], form)}</td>" for key, _, form in heads)
        rows.append(f'<tr><th><i class="k {_class(report, b["id"])}"></i>{escape(b["name"])}</th>{cells}</tr>')
    head = "".join(f"<th>{escape(h)}</th>" for _, h, _ in heads)
    note = f"With basis: {BASIS:g} bits for each number of the basis that a file must hold, once for each input."
    return (
        f"<div class=scroll><table><tr><th>basis</th>{head}</tr>{''.join(rows)}</table></div><p class=note>{note}</p>"
    )


def _basis_entries(report: Report) -> dict[str, int]:
    """Numbers of bases that a file must hold, one basis for each input."""
    found = {(key, one["input"]): b["basis_entries"] for one in report["tensors"] for key, b in one["bases"].items()}
    out: dict[str, int] = {}
    for (key, _), n in found.items():
        out[key] = out.get(key, 0) + n
    return out


def _class(report: Report, key: str) -> str:
    known = ("original", "hadamard", "hadamard2", "hadamard-feedback", "pca", "triangular")
    if key in known:
        return f"b{known.index(key)}"
    learned = [b["id"] for b in report["bases"] if b["id"] not in known]
    return f"b{len(known) + learned.index(key) % 3}"


def _legend(report: Report) -> str:
    items = "".join(
        f'<span><svg viewBox="0 0 26 8" class=key><path class="line {_class(report, b["id"])}" d="M1 4H25"/></svg>'
        f"{escape(b['name'])}</span>"
        for b in report["bases"]
    )
    return f"<p class=legend>{items}</p>"


def _by_block(report: Report) -> str:
    series = [
        (
            _class(report, b["id"]),
            [(float(x["block"]), x["bases"][b["id"]]["bits"]) for x in report["blocks"] if x["block"]],
        )
        for b in report["bases"]
    ]
    return svg.lines(series, "layer", "bits per weight", height=280, whole=True)


def _curves(report: Report, key: str) -> str:
    series = [("even", [(0.0, 0.0), (1.0, 1.0)])]
    for b in report["bases"]:
        if (y := report["model"][b["id"]][key]) is not None:
            series.append((_class(report, b["id"]), [(i / CURVE, v) for i, v in enumerate(y)]))
    return svg.lines(series, "columns", "energy", x_range=(0, 1), y_range=(0, 1), percent=True)


def _distribution(report: Report, name: str) -> str:
    one = next(t for t in report["tensors"] if t["name"] == name)
    edges = report["edges"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    total, wide = one["shape"][0] * one["shape"][1], edges[1] - edges[0]
    bell = [total * wide * math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in middles]
    series = [("even", [(x, y if y >= 0.5 else None) for x, y in zip(middles, bell, strict=True)])]
    for b in report["bases"]:
        counts = one["bases"].get(b["id"], {}).get("histogram")
        if counts:
            series.append((_class(report, b["id"]), [(x, c or None) for x, c in zip(middles, counts, strict=True)]))
    return svg.lines(series, "weight / root mean square", "weights", x_range=(-8, 8), log=True)


def _kurtosis(report: Report, name: str) -> str:
    one = next(t for t in report["tensors"] if t["name"] == name)
    return _cell(one["bases"]["original"]["kurtosis"], ".2f")


def _heat(report: Report) -> str:
    others = [b for b in report["bases"] if b["id"] != "original"]
    values = []
    for block in report["blocks"]:
        own = block["bases"]["original"]["bits"]
        values.append(
            [None if (v := block["bases"][b["id"]]["bits"]) is None or own is None else v - own for b in others]
        )
    names = [block["block"] or "other" for block in report["blocks"]]
    return f"<div class=heat>{svg.cells(names, [b['name'] for b in others], values)}</div>"


def _counts(report: Report) -> str:
    if not report["counts"]:
        return "<p>No aligned bases: give a text.</p>"
    names = {b["id"]: escape(b["name"]) for b in report["bases"]}
    rows = []
    for c in report["counts"]:
        worst = sorted(c["not"].items(), key=lambda item: -item[1])[:5]
        where = "; ".join(f"{escape(n)} (+{v:.3f})" for n, v in worst) or "nowhere"
        more = f" and {len(c['not']) - 5} more" if len(c["not"]) > 5 else ""
        rows.append(
            f"<tr><th>{names[c['aligned']]} &lt; {names[c['rotated']]}</th><td>{c['fewer']} of {c['matrices']}</td>"
            f"<td>{c['blocks_fewer']} of {c['blocks']}</td><td class=wide>{where}{more}</td></tr>"
        )
    head = "<tr><th>fewer bits</th><th>matrices</th><th>layers</th><th>not so in</th></tr>"
    return f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"


def _gaussian(report: Report) -> str:
    n = len([one for one in report["tensors"] if one["bases"]])
    rows = [
        f"<tr><th>{escape(b['name'])}</th><td>{g['kurtosis']} of {n}</td><td>{g['kurtosis_rows']} of {n}</td></tr>"
        for b in report["bases"]
        if (g := report["gaussian"][b["id"]])
    ]
    head = "<tr><th>basis</th><th>whole matrix</th><th>mean of rows</th></tr>"
    return f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"


def _terms(pairs: Any) -> str:
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in pairs) + "</dl>"


def _all(report: Report, ids: Sequence[str]) -> str:
    names = {b["id"]: b["name"] for b in report["bases"]}
    head = "".join(f"<th>{escape(names[key])}</th>" for key in ids)
    rows = [
        f"<tr><th>{escape(one['name'])}</th>"
        + "".join(f"<td>{_cell(one['bases'].get(key, {}).get('bits'), '.3f')}</td>" for key in ids)
        + "</tr>"
        for one in report["tensors"]
    ]
    return f"<div class=scroll><table><tr><th>matrix</th>{head}</tr>{''.join(rows)}</table></div>"
