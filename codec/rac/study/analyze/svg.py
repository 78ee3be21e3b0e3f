"""Plots as inline SVG, 400 units wide so that letters are readable on a phone; colours are CSS variables."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

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


Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True, slots=True)
class Axes:
    """Two axes, their labels and what they span: all points, where no range is given."""

    x_label: str
    y_label: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log: bool = False  # whether the axis of y is one of powers of ten
    height: int = 240
    percent: bool = False  # whether both axes are of shares
    whole: bool = False  # whether the axis of x has whole numbers only

    def spanned(self, points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
        """Least and largest x, and y or its logarithm."""
        x0, x1 = self.x_range or (min(x for x, _ in points), max(x for x, _ in points))
        y0, y1 = self.y_range or (min(y for _, y in points), max(y for _, y in points))
        if self.log:
            y0, y1 = math.floor(math.log10(y0)), math.ceil(math.log10(y1))
        elif self.y_range is None:
            pad = 0.06 * ((y1 - y0) or abs(y1) or 1)
            y0, y1 = y0 - pad, y1 + pad
        return x0, x1 if x1 > x0 else x0 + 1, y0, y1 if y1 > y0 else y0 + 1

    def label(self, t: float) -> str:
        """A number beside an axis."""
        return f"{t * 100:g} %" if self.percent else f"{t:g}"


def lines(series: Sequence[tuple[str, Points]], axes: Axes) -> str:
    """Lines of (class, points); points without y leave a gap."""
    points = [(x, y) for _, p in series for x, y in p if y is not None and (y > 0 or not axes.log)]
    if not points:
        return "<p>Nothing to plot.</p>"
    x0, x1, y0, y1 = axes.spanned(points)
    right, floor = WIDTH - _RIGHT, axes.height - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (right - _LEFT)

    def down(level: float) -> float:
        return floor - (level - y0) / (y1 - y0) * (floor - _TOP)

    x_label, y_label = html.escape(axes.x_label), html.escape(axes.y_label)
    out = [f'<svg viewBox="0 0 {WIDTH} {axes.height}" role="img" aria-label="{y_label} by {x_label}">']
    for t in ticks(y0, y1, 4 if axes.log else 5):
        if not axes.log or t == int(t):
            label = _power(int(t)) if axes.log else axes.label(t)
            out.append(f'<path class="grid" d="M{_LEFT} {down(t):.1f}H{right}"/>')
            out.append(f'<text x="{_LEFT - 4}" y="{down(t) + 3.5:.1f}" text-anchor="end">{label}</text>')
    for t in ticks(x0, x1, 6):
        if not axes.whole or t == int(t):
            anchor = "end" if across(t) > right - 12 else "middle"
            out.append(f'<text x="{across(t):.1f}" y="{floor + 13}" text-anchor="{anchor}">{axes.label(t)}</text>')
    out.append(f'<path class="axis" d="M{_LEFT} {floor}H{right}"/>')
    out.append(f'<text class="label" x="{right}" y="{axes.height - 3}" text-anchor="end">{x_label}</text>')
    for kind, p in series:
        path, pen = [], "M"
        for x, y in p:
            if y is None or (axes.log and y <= 0):
                pen = "M"
                continue
            level = min(max(down(math.log10(y) if axes.log else y), 0), axes.height)
            path.append(f"{pen}{across(x):.1f} {level:.1f}")
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


def cells(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A map: lowest values deepest in the colour of "less", highest in that of "more", 0 without a colour."""
    left, top, high = 44, 62, 15
    wide = (WIDTH - left - 2) / max(1, len(columns))
    most = max((abs(v) for row in values for v in row if v is not None), default=1.0) or 1.0
    height = top + high * len(rows) + 2
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="bits by layer and basis">']
    for j, name in enumerate(columns):
        x = left + (j + 0.5) * wide
        words = textwrap.wrap(name, max(6, int(wide / 5.4)), break_long_words=False, break_on_hyphens=False)
        for k, word in enumerate(words[:5]):
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
            out.append(f'<text {at} text-anchor="middle">{v:+.2f}</text>')
    return "".join(out) + "</svg>"
