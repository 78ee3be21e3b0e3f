"""docs/architectures.csv, and what docs/compatibility.md says of it; needs neither torch nor transformers."""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "architectures.csv"
PAGE = ROOT / "docs" / "compatibility.md"
CELLS = ("lossless", "dense", "compressed", "bits", "calibrated", "hf")
TITLES = {"bits": "4 bits", "hf": "`--format hf`"}
BEGIN, END = "<!-- python tools/arch_matrix.py --summary --write -->\n", "<!-- until here -->\n"
PART = r"text does not reach: (?!.*other layers)"
REASONS = {
    PART: "a text does not reach a part of the model, which is quantised "
    "from its weights alone, and the pack says so: ",
    r"text does not reach": "to be mended: a text does not reach: ",
    r"WRONG .*did not reach": "a text does not reach all layers; these are quantised from their weights alone, "
    "and the pack says so",
    r"- .*no tensor (is large enough|can be quantised)": "refused, meant: the tiny model has no matrix that is large "
    "enough",
    r"- .*`--calibrate none` works": "refused in one line, which names `--calibrate none`",
    r"- ": "refused: ",
    r"WRONG ": "to be mended: ",
    r"ERROR ": "to be mended: ",
}
"""What a cell means, by how it begins; the first one that fits. Where that ends in a colon, the cell follows."""

Rows = dict[str, dict[str, str]]


def stated() -> Rows:
    """Rows of docs/architectures.csv, by architecture."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {r["architecture"]: r for r in csv.DictReader(file)}


def write(rows: Rows) -> None:
    """Replace docs/architectures.csv."""
    with TABLE.open("w", newline="") as file:
        out = csv.DictWriter(file, ["architecture", *CELLS], lineterminator="\n")
        out.writeheader()
        out.writerows(row for _, row in sorted(rows.items()))


def _reason(value: str) -> str:
    found = next(text for pattern, text in REASONS.items() if re.match(pattern, value))
    value = value.removeprefix("text does not reach:")
    more = re.sub(r"\s*\[[^]]*\]$", "", value.split(" ", 1)[1]).replace("|", "\\|") if found.endswith(": ") else ""
    return found + more


def summary(rows: Rows) -> str:
    """How many cells are ok, and which are not and why: two tables in Markdown."""
    cells = {c: [r[c] for r in rows.values()] for c in CELLS}
    counts = {
        "ok": {c: sum(v == "ok" for v in found) for c, found in cells.items()},
        "but for a part": {c: sum(bool(re.match(PART, v)) for v in found) for c, found in cells.items()},
        "refused in one line": {c: sum(v.startswith("- ") for v in found) for c, found in cells.items()},
    }
    counts["to be mended"] = {c: len(rows) - sum(n[c] for n in counts.values()) for c in CELLS}
    whole = sum(all(r[c] == "ok" for c in CELLS) for r in rows.values())
    lines = [f"{len(rows)} architectures, {whole} of them ok in all six cells.", ""]
    lines += ["| | " + " | ".join(TITLES.get(c, c) for c in CELLS) + " |", "| --- |" + " ---: |" * len(CELLS)]
    lines += [f"| {name} | " + " | ".join(str(found[c]) for c in CELLS) + " |" for name, found in counts.items()]
    why: dict[str, list[str]] = {}
    for kind, row in sorted(rows.items()):
        mine = {c: _reason(row[c]) for c in CELLS if row[c] != "ok"}
        for reason in dict.fromkeys(mine.values()):
            where = ", ".join(TITLES.get(c, c) for c in mine if mine[c] == reason)
            why.setdefault(f"{where}: {reason}".rstrip(": "), []).append(kind)
    if why:
        lines += ["", "What is not ok (each cell is in [architectures.csv](architectures.csv)):", ""]
        lines += ["| what | architectures |", "| --- | --- |"]
        lines += [f"| {reason} | {', '.join(kinds)} |" for reason, kinds in sorted(why.items())]
    return "\n".join(lines) + "\n"


def on_page(page: str) -> str:
    """The part of docs/compatibility.md that `summary` makes."""
    return page.split(BEGIN)[1].split(END)[0]


def write_page() -> None:
    """Put the summary of docs/architectures.csv on docs/compatibility.md."""
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + on_page(page) + END, BEGIN + summary(stated()) + END))
