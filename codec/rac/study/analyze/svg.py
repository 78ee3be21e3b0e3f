"""Plots as inline SVG: lines over an axis, and a map of coloured cells. Colours are CSS variables of the page.

All are 400 units wide, so that letters stay readable on a phone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 8, 30


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float | None]]]],
    x_label: str,
    y_label: str,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    height: int = 240,
    percent: bool = False,
    whole: bool = False,
) -> str:
    """Lines of (class, points); points without y leave a gap.

    With `log` the axis of y is one of powers of ten; with `whole` that of x has whole numbers only.
    """
    points = [(x, y) for _, p in series for x, y in p if y is not None and (y > 0 or not log)]
    if not points:
        return "<p>Nothing to plot.</p>"
    x0, x1 = x_range or (min(x for x, _ in points), max(x for x, _ in points))
    y0, y1 = y_range or (min(y for _, y in points), max(y for _, y in points))
    if log:
        y0, y1 = math.floor(math.log10(y0)), math.ceil(math.log10(y1))
    elif y_range is None:
        pad = 0.06 * ((y1 - y0) or abs(y1) or 1)
        y0, y1 = y0 - pad, y1 + pad
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        level = math.log10(y) if log else y
        return (
            _LEFT + (x - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT),
            height - _BOTTOM - (level - y0) / (y1 - y0) * (height - _TOP - _BOTTOM),
        )

    out = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(y_label)} by {html.escape(x_label)}">'
    ]
    levels = ticks(y0, y1, 4 if log else 5)
    for t in [t for t in levels if t == int(t)] if log else levels:
        y = at(x0, 10**t if log else t)[1]
        label = _power(int(t)) if log else f"{t * 100:g} %" if percent else f"{t:g}"
        out.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        out.append(f'<text x="{_LEFT - 4}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for t in (t for t in ticks(x0, x1, 6) if not whole or t == int(t)):
        x = at(t, 10**y0 if log else y0)[0]
        label = f"{t * 100:g} %" if percent else f"{t:g}"
        anchor = "end" if x > WIDTH - _RIGHT - 12 else "middle"
        out.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 13}" text-anchor="{anchor}">{label}</text>')
    out.append(f'<path class="axis" d="M{_LEFT} {height - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    out.append(
        f'<text class="label" x="{WIDTH - _RIGHT}" y="{height - 3}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    for kind, p in series:
        path, pen = [], "M"
        for px, py in p:
            if py is None or (log and py <= 0):
                pen = "M"
                continue
            x, y = at(px, py)
            path.append(f"{pen}{x:.1f} {min(max(y, 0), height):.1f}")
            pen = "L"
        if len(path) == 1:
            path.append("h.01")  # a dot
        out.append(f'<path class="line {kind}" d="{"".join(path)}"/>')
    return "".join(out) + "</svg>"


def _power(n: int) -> str:
    """10**n as SVG text."""
    if 0 <= n <= 3:
        return f"{10**n:,}"
    return f'10<tspan dy="-4" font-size="7">{n}</tspan>'


def cells(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], form: str = "+.2f"
) -> str:
    """A map: lowest values deepest in the colour of "less", highest in that of "more", 0 without a colour."""
    left, top, high = 44, 62, 15
    wide = (WIDTH - left - 2) / max(1, len(columns))
    most = max((abs(v) for row in values for v in row if v is not None), default=1.0) or 1.0
    height = top + high * len(rows) + 2
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="bits by layer and basis">']
    for j, name in enumerate(columns):
        x = left + (j + 0.5) * wide
        for k, word in enumerate(_wrap(name, max(6, int(wide / 5.4)))):
            out.append(f'<text x="{x:.1f}" y="{11 + 11 * k}" text-anchor="middle">{html.escape(word)}</text>')
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + i * high
        out.append(f'<text x="{left - 5}" y="{y + 11}" text-anchor="end">{html.escape(name)}</text>')
        for j, v in enumerate(row):
            x = left + j * wide
            if v is None:
                continue
            share = round(100 * abs(v) / most)
            side = "less" if v < 0 else "more"
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide - 1:.1f}" height="{high - 1}" '
                f'style="fill:color-mix(in oklab,var(--{side}) {share}%,var(--none))"/>'
            )
            at = f'class="{"on" if share > 60 else "cell"}" x="{x + wide / 2:.1f}" y="{y + 11}"'
            out.append(f'<text {at} text-anchor="middle">{format(v, form)}</text>')
    return "".join(out) + "</svg>"


def _wrap(text: str, width: int) -> list[str]:
    """Lines of whole words, at most five."""
    out = [""]
    for word in text.split():
        if out[-1] and len(out[-1]) + 1 + len(word) > width:
            out.append("")
        out[-1] = f"{out[-1]} {word}".strip()
    return out[:5]
