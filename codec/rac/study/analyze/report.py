"""The report as one HTML page: nothing is fetched, it reads on a desktop and on a phone, in light and in dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from rac.study.analyze import svg
from rac.study.analyze.bases import NAMES
from rac.study.analyze.measures import CURVE, FIGURES

Report = Mapping[str, Any]
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

COLOURS = {
    "b0": ("#6b7280", "#9ca3af", "none"),
    "b1": ("#2563eb", "#60a5fa", "none"),
    "b2": ("#0891b2", "#22d3ee", "2 2"),
    "b3": ("#7c3aed", "#b69cff", "6 3"),
    "b4": ("#d97706", "#fbbf24", "6 3"),
    "b5": ("#dc2626", "#f87171", "none"),
    "b6": ("#059669", "#34d399", "none"),
    "b7": ("#be185d", "#f472b6", "6 3"),
    "b8": ("#4d7c0f", "#a3e635", "2 2"),
}
"""Colours of the bases in their order, on a light and on a dark page, and dashes: cool where rotated, warm where
aligned. The last three are those of learned rotations."""


def classes(ids: Iterable[str]) -> dict[str, str]:
    """Key of COLOURS by basis."""
    learned = [key for key in ids if key not in NAMES]
    own = {key: f"b{len(NAMES) + i % 3}" for i, key in enumerate(learned)}
    return {key: f"b{i}" for i, key in enumerate(NAMES)} | own


def _variables(which: int) -> str:
    own = (
        "--page:#fff;--ink:#1a1d21;--soft:#5b626b;--rule:#dfe3e8;--less:#0f766e;--more:#b45309;--none:#f3f4f6;--on:#fff",
        "--page:#15181c;--ink:#e6e8eb;--soft:#9aa3ad;--rule:#333a42;--less:#2dd4bf;--more:#f59e0b;--none:#23282e;--on:#0b0d0f",
    )[which]
    return own + "".join(f";--{key}:{pair[which]}" for key, pair in COLOURS.items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(0)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}"
    + "".join(
        f".{key}{{stroke:var(--{key});stroke-dasharray:{dash}}}i.{key}{{background:var(--{key})}}"
        for key, (_, _, dash) in COLOURS.items()
    )
    + """
body{margin:0 auto;max-width:1120px;padding:16px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;margin:.4em 0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:1.6em 0 .5em;overflow-wrap:anywhere}
.lead{max-width:75ch}.note{color:var(--soft);font-size:.87rem;max-width:75ch;margin:.4em 0}
section{min-width:0}.two{display:grid;grid-template-columns:1fr 1fr;gap:0 36px}
svg{width:100%;height:auto;display:block}svg text{font-size:10px;fill:var(--soft)}
svg text.cell{fill:var(--ink)}svg text.on{fill:var(--on)}
.heat{max-width:560px}.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.line{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.even{stroke:var(--soft);stroke-dasharray:1 3;stroke-width:1.2}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:1.2em 0 0;padding:6px 0;position:sticky;top:0;
background:var(--page);border-bottom:1px solid var(--rule);font-size:.87rem}
.legend span{display:inline-flex;align-items:center;gap:6px}.legend svg{width:26px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 6px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
tr:first-child th{color:var(--soft);font-weight:500;vertical-align:bottom;white-space:normal}
th:first-child{text-align:left;font-weight:500;position:sticky;left:0;background:var(--page)}
td.wide{text-align:left;white-space:normal;min-width:260px}
i.k{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:7px}
dt{font-weight:600;margin-top:.6em}dd{margin:0;max-width:75ch;color:var(--soft)}
details{margin:2em 0}summary{cursor:pointer}
@media(max-width:760px){body{padding:12px}.two{grid-template-columns:1fr}th,td{padding:4px 7px}
.scroll th:first-child{min-width:104px;max-width:128px;white-space:normal;overflow-wrap:anywhere}}
"""
)

EXPLAINED = {
    "Bits": "What the real coder takes for each weight, tables counted, when the step is such that the outputs of the "
    "layer have the error that they have in the original basis.",
    "Bits estimated": "The same from the differential entropy of the columns less the logarithm of the step: what "
    "coding at high rate comes to.",
    "Kurtosis": "Fourth moment over the square of the second: 3 for a Gaussian, more where few weights are far out. "
    "Of the whole matrix, where rows of different size look like outliers, and the mean over its rows.",
    "Max / rms": "The largest weight in units of the root mean square: what a scale that may not clip has to span.",
    "Effective rank": "e to the entropy of the singular values that sum to 1 (Roy and Vetterli, 2007). No rotation "
    "changes it, only the gain that is fused before one; of PCA and triangular it is that of W S^1/2, whose singular "
    "values are those of the outputs.",
    "Stable rank": "Sum of the squared singular values over the largest: as many directions of equal energy.",
    "Energy in top 10 %": "Share of the squared weights, in units of their steps, in the tenth of the columns that "
    "have most.",
    "Gini": "Inequality of the energies of columns: 0 where all are equal, near 1 where one has all.",
    "Output energy, output Gini": "The same of what each coordinate of the input gives the outputs by itself: the "
    "energy of its column times that of the coordinate.",
    "Entropy": "Differential entropy in bits at root mean square 1, by Vasicek's spacings with his correction: 2.047 "
    "for a Gaussian, which no distribution exceeds. Of all weights together, and the mean over columns, which a coder "
    "that knows the columns apart can reach.",
}
"""Each figure in one or two sentences."""
BASIS = 3.0  # bits for each number of a basis in a file: about the fewest that `rac pack` takes (docs/lossy.md)
CURVE_NOTE = """Share of the squared weights, in units of their steps, in the columns that have most; mean of all \
matrices. Dotted: every column has the same."""
OUTPUT = "Share of the output's energy that each coordinate of the input would give by itself; mean of all matrices."
SPREAD = "Numbers of weights by size, in units of the root mean square, on a logarithmic axis. Dotted: a Gaussian. "
MEANS = "Bits are those of the real coder at one output error; the other figures are of the matrix as it is quantised."
WITH = f"With basis: {BASIS:g} bits for each number of the basis that a file must hold, once for each input."


def html(report: Report) -> str:
    """The page."""
    title = escape(f"Bases of {report['about']['model']}")
    plots = [
        ("Bits at equal output error, by layer", _by_block(report), "Mean of the matrices of a layer, by weights."),
        ("Energy curves", _curves(report, "curve"), CURVE_NOTE),
        ("Output energy curves", _curves(report, "output_curve"), OUTPUT),
        *(_distribution(report, name) for name in report["histograms"]),
    ]
    below = "At equal output error; below 0 is better."
    parts = [
        f"<h1>{title}</h1>",
        f"<p class=lead>{_lead(report['about'])}</p>",
        _findings(report),
        _section("Means over all matrices", f"{_means(report)}<p class=note>{WITH}</p>", MEANS),
        _legend(report),
        '<div class="two">',
        *(_section(*plot) for plot in plots),
        "</div>",
        _section("Bits beyond the original, layers by bases", _heat(report), below),
        _section("Where aligned takes fewer bits than rotated", _counts(report)),
        _section("Gaussian matrices", _gaussian(report), "Kurtosis within 3 &plusmn; 0.3."),
        _section("Bases", _terms((b["name"], b["text"]) for b in report["bases"])),
        _section("What the figures are", _terms(EXPLAINED.items())),
        f"<details><summary>All {len(report['tensors'])} matrices: bits at equal output error</summary>",
        f"{_all(report)}</details>",
    ]
    return PAGE.format(title=title, style=STYLE, body="\n".join(parts))


def _lead(about: Report) -> str:
    some = "" if about["matrices"] == about["of"] else f" of {about['of']} (those that match {escape(about['layers'])})"
    error = "No text was given: error is that of the weights, and there are no bases that follow the inputs."
    if about["second_moment"] == "text":
        halves = "half of them to make the bases, the other half to judge them."
        error = (
            "Error is that of the layers' outputs, tr(E S E<sup>T</sup>): S, the second moment of a layer's inputs, "
            f"is found on {about['tokens']:,} tokens, "
            f"{'which both make the bases and judge them.' if about['seen'] else halves}"
        )
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
    against = f"{bits[best]:.3f}, against {bits['original']:.3f} of the original"
    out = [f"Fewest bits: <b>{escape(names[best])}</b>, {against}"]
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


def _table(heads: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Rows of a first cell and others that say what they are: `<td>` or another."""
    head = "".join(f"<th>{h}</th>" for h in heads)
    body = "".join(f"<tr><th>{first}</th>{''.join(cells)}</tr>" for first, cells in rows)
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _means(report: Report) -> str:
    kinds, weights = _kinds(report), report["about"]["weights"]
    inputs = {(key, one["input"]): b["basis_entries"] for one in report["tensors"] for key, b in one["bases"].items()}
    columns = [(key, head, form) for key, head, _, form in FIGURES]
    columns.insert(1, ("with", "with basis", ".3f"))
    rows = []
    for b in report["bases"]:
        m = dict(report["model"][b["id"]])
        entries = sum(n for (key, _), n in inputs.items() if key == b["id"])  # a basis for each input
        m["with"] = None if m["bits"] is None else m["bits"] + BASIS * entries / weights
        cells = [f"<td>{_cell(m[key], form)}</td>" for key, _, form in columns]
        rows.append((f'<i class="k {kinds[b["id"]]}"></i>{escape(b["name"])}', cells))
    return _table(("basis", *(escape(head) for _, head, _ in columns)), rows)


def _kinds(report: Report) -> dict[str, str]:
    return classes(b["id"] for b in report["bases"])


def _legend(report: Report) -> str:
    kinds = _kinds(report)
    items = "".join(
        f'<span><svg viewBox="0 0 26 8" class=key><path class="line {kinds[b["id"]]}" d="M1 4H25"/></svg>'
        f"{escape(b['name'])}</span>"
        for b in report["bases"]
    )
    return f"<p class=legend>{items}</p>"


def _by_block(report: Report) -> str:
    layers, kinds = [x for x in report["blocks"] if x["block"]], _kinds(report)
    ids = [b["id"] for b in report["bases"]]
    series = [(kinds[key], [(float(x["block"]), x["bases"][key]["bits"]) for x in layers]) for key in ids]
    return svg.lines(series, svg.Axes("layer", "bits per weight", height=280, whole=True))


def _curves(report: Report, key: str) -> str:
    series = [("even", [(0.0, 0.0), (1.0, 1.0)])]
    for b, kind in _kinds(report).items():
        if (y := report["model"].get(b, {}).get(key)) is not None:
            series.append((kind, [(i / CURVE, v) for i, v in enumerate(y)]))
    return svg.lines(series, svg.Axes("columns", "energy", (0, 1), (0, 1), percent=True))


def _distribution(report: Report, name: str) -> tuple[str, str, str]:
    """Title, plot and note."""
    one = next(t for t in report["tensors"] if t["name"] == name)
    edges = report["edges"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    total, wide = one["shape"][0] * one["shape"][1], edges[1] - edges[0]
    bell = [total * wide * math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in middles]
    series = [("even", [(x, y if y >= 0.5 else None) for x, y in zip(middles, bell, strict=True)])]
    for b, kind in _kinds(report).items():
        if counts := one["bases"].get(b, {}).get("histogram"):
            series.append((kind, [(x, c or None) for x, c in zip(middles, counts, strict=True)]))
    plot = svg.lines(series, svg.Axes("weight / root mean square", "weights", (-8, 8), log=True))
    kurtosis = _cell(one["bases"]["original"]["kurtosis"], ".2f")
    return f"Distribution: {name}", plot, f"{SPREAD}Kurtosis of the original {kurtosis}."


def _heat(report: Report) -> str:
    others = [b for b in report["bases"] if b["id"] != "original"]
    values = []
    for block in report["blocks"]:
        own, *bits = (block["bases"][key]["bits"] for key in ("original", *(b["id"] for b in others)))
        values.append([None if v is None or own is None else v - own for v in bits])
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
        cells = [f"<td>{c['fewer']} of {c['matrices']}</td>", f"<td>{c['blocks_fewer']} of {c['blocks']}</td>"]
        cells.append(f"<td class=wide>{where}{more}</td>")
        rows.append((f"{names[c['aligned']]} &lt; {names[c['rotated']]}", cells))
    return _table(("fewer bits", "matrices", "layers", "not so in"), rows)


def _gaussian(report: Report) -> str:
    n = len([one for one in report["tensors"] if one["bases"]])
    rows = []
    for b in report["bases"]:
        fine = report["gaussian"][b["id"]]
        rows.append((escape(b["name"]), [f"<td>{fine[key]} of {n}</td>" for key in ("kurtosis", "kurtosis_rows")]))
    return _table(("basis", "whole matrix", "mean of rows"), rows)


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in pairs) + "</dl>"


def _all(report: Report) -> str:
    names = {b["id"]: escape(b["name"]) for b in report["bases"]}
    rows = []
    for one in report["tensors"]:
        bits = (one["bases"].get(key, {}).get("bits") for key in names)
        rows.append((escape(one["name"]), [f"<td>{_cell(v, '.3f')}</td>" for v in bits]))
    return _table(("matrix", *names.values()), rows)
