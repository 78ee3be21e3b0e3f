"""The frame, the style and the explanations of the HTML report."""

from collections.abc import Iterable

from rac.study.analyze.bases import NAMES

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
