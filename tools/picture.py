"""Draw docs/quality.svg, size against quality of whole files, from the measured points of a table in docs/lossy.md.

    python tools/picture.py

The rows of "The whole model, embedding included" are tools/whole_file_bar.py's and tools/rivals.py's; this only draws.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
WEIGHTS = 134_515_008
"""Of SmolLM2-135M: whole-file bits are bytes * 8 / weights."""
BITS = (2.0, 9.0)
KL = (-3.1, 0.7)
"""Ranges of the axes; powers of ten."""
LEFT, RIGHT, TOP, BOTTOM = 78, 700, 20, 372
OURS, THEIRS = "#0b6e99", "#c2410c"
Point = tuple[str, float, float]


def points() -> list[Point]:
    """(name, whole-file bits per weight, KL in nats) of each row; RAC's have no name but the first."""
    text = (DOCS / "lossy.md").read_text(encoding="utf-8")
    section = text.partition("## The whole model, embedding included")[2].partition("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    return [
        (name.replace("RAC", ""), int(size.replace(",", "")) * 8 / WEIGHTS, float(kl))
        for name, size, _, _, _, kl, *_ in rows
        if size[:1].isdigit()
    ]


def place(bits: float, kl: float) -> tuple[float, float]:
    """Where a point lies, in pixels."""
    x = LEFT + (bits - BITS[0]) / (BITS[1] - BITS[0]) * (RIGHT - LEFT)
    y = BOTTOM - (math.log10(kl) - KL[0]) / (KL[1] - KL[0]) * (BOTTOM - TOP)
    return round(x, 1), round(y, 1)


def text(x: float, y: float, words: str, more: str = "") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'


def draw(found: list[Point]) -> str:
    """The picture."""
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 430" font-family="sans-serif" font-size="12">',
        '<rect width="720" height="430" fill="white"/>',
    ]
    for tick in range(2, 10):
        x, _ = place(tick, 1)
        out.append(f'<path d="M{x} {TOP}V{BOTTOM}" stroke="#ddd"/>')
        out.append(text(x, BOTTOM + 18, str(tick), 'text-anchor="middle"'))
    for power in range(-3, 1):
        _, y = place(BITS[0], 10.0**power)
        out.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#ddd"/>')
        out.append(text(LEFT - 8, y + 4, f"{10.0**power:g}", 'text-anchor="end"'))
    middle = (TOP + BOTTOM) / 2
    axis = "bits per weight, whole file (the original has 16): smaller is to the left"
    out.append(text((LEFT + RIGHT) / 2, 412, axis, 'text-anchor="middle"'))
    side = "change of the predictions (KL, nats): lower is better"
    out.append(text(22, middle, side, f'text-anchor="middle" transform="rotate(-90 22 {middle:.1f})"'))
    ours = [place(bits, kl) for name, bits, kl in found if not name]
    out.append(f'<path d="M{" L".join(f"{x} {y}" for x, y in ours)}" fill="none" stroke="{OURS}" stroke-width="2"/>')
    out += [f'<circle cx="{x}" cy="{y}" r="4" fill="{OURS}"/>' for x, y in ours]
    out.append(text(ours[0][0] - 12, ours[0][1] + 30, "RAC", f'fill="{OURS}" font-weight="bold"'))
    for name, bits, kl in found:
        if name:
            x, y = place(bits, kl)
            out.append(f'<path d="M{x - 4} {y - 4}l8 8m0 -8l-8 8" stroke="{THEIRS}" stroke-width="2"/>')
            close = any(b == bits and kl < k < 1.5 * kl for _, b, k in found)  # to the label of one right above
            before = any(n and 0 < b - bits < 0.5 and 0.9 < k / kl < 1.1 for n, b, k in found)  # another at its right
            anchor = 'text-anchor="end" ' if before else ""
            out.append(text(x + (-8 if before else 8), y + (10 if close else 4), name, f'{anchor}fill="{THEIRS}"'))
    out.append(text(RIGHT - 8, TOP + 18, "crosses: llama.cpp", f'fill="{THEIRS}" text-anchor="end"'))
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    """Write the picture."""
    (DOCS / "quality.svg").write_text(draw(points()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
