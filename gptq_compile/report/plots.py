# SPDX-License-Identifier: Apache-2.0
"""Plots as inline SVG: no script, no fonts, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 34


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        name: in the legend. ``points``: (x, y); those that are not finite, or not positive on a log axis, are left out.
        labels: what a pointer over each point says. ``line``: joined by a line instead of marked by dots.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    line: bool = False


def plot(series: Sequence[Series], x_title: str, y_title: str, *, log: bool = False) -> str:
    """An SVG of all series on common axes; y starts at 0 unless it is logarithmic."""
    shown = [
        [(i, x, y) for i, (x, y) in enumerate(s.points) if math.isfinite(x + y) and (y > 0 or not log)] for s in series
    ]
    points = [p for part in shown for p in part]
    if not points:
        return '<p class="none">nothing was measured</p>'
    low_x, high_x = min(p[1] for p in points), max(p[1] for p in points)
    ticks = _log_ticks([p[2] for p in points]) if log else _ticks(max(p[2] for p in points))
    low, high = ticks[0], ticks[-1]
    scale = math.log10 if log else float

    def place_x(x: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((x - low_x) / (high_x - low_x) if high_x > low_x else 0.5)

    def place_y(y: float) -> float:
        part = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * part

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)} over {escape(x_title)}">']
    for tick in ticks:
        y = place_y(tick)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in dict.fromkeys((low_x, (low_x + high_x) / 2, high_x)):
        anchor = {low_x: "start", high_x: "end"}.get(x, "middle")
        out.append(f'<text x="{place_x(x):.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="{anchor}">{_short(x)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    out.append(f'<text x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_title)}</text>')
    out.append(
        f'<text transform="translate(12 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    for number, (one, part) in enumerate(zip(series, shown, strict=True)):
        if one.line:
            path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for _, x, y in part)
            out.append(f'<polyline class="s{number}" points="{path}"/>')
            continue
        for i, x, y in part:
            title = f"<title>{escape(one.labels[i])}</title>" if i < len(one.labels) else ""
            out.append(f'<circle class="s{number}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3">{title}</circle>')
    out.append("</svg>")
    legend = "".join(f'<span class="s{i}">&#9632;</span> {escape(s.name)} &nbsp; ' for i, s in enumerate(series))
    return f"<figure>{''.join(out)}<figcaption>{legend}</figcaption></figure>"


def _ticks(high: float) -> list[float]:
    """0 and up to six round numbers, the last at least ``high``."""
    if high <= 0:
        return [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(high))
    step = next(s * unit / 10 for s in (2, 5, 10, 20, 50) if high / (s * unit / 10) <= 5)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    step = -(-(high - low) // 6)
    return [10.0**e for e in range(low, high + step, step)]


def _short(x: float) -> str:
    return f"{x:.0f}" if x == int(x) or abs(x) >= 100 else f"{x:.1f}"
