"""Line charts as inline SVG: they follow the page's light or dark colours and need no library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posefabric.structures import PosefabricError

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 16, 40
_COLOURS = 8  # the page defines --series-0 to --series-7
_MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line: ``x`` and ``y`` of equal length; pairs that are not finite are left out.

    ``colour`` is a number, so that lines of one run share theirs over the charts of a page.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str = "step", log_y: bool = False
) -> str:
    """A ``<figure>`` with one chart and its legend; empty text where there is nothing to draw.

    Lines of more than 400 points are averaged in bins. ``log_y`` leaves out values <= 0.
    """
    lines = [(line, *_points(line, log_y)) for line in series]
    lines = [(line, x, y) for line, x, y in lines if len(x)]
    if not lines:
        return ""
    x_low = min(float(x[0]) for _, x, _ in lines)
    x_high = max(float(x[-1]) for _, x, _ in lines)
    if 0 < x_low < 0.1 * x_high:
        x_low = 0.0  # steps count from 1; the axis reads better from 0
    x_ticks = nice_ticks(x_low, x_high, 5)
    y_ticks = nice_ticks(
        min(float(y.min()) for _, _, y in lines), max(float(y.max()) for _, _, y in lines), 5
    )
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return (
            _LEFT + right * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in y_ticks:
        _, y = place(x_low, tick)
        label = tick_label(10**tick if log_y else tick)
        ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
                f"{tick_label(tick)}</text>"
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    spot = f'x="{middle:.1f}" y="{_HEIGHT - 5}" text-anchor="middle"'
    parts.append(f"<text {spot}>{html.escape(x_label)}</text>")
    for line, xs, ys in lines:
        parts.append(_path(line, [place(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]))
    parts.append("</svg>")
    keys = "".join(_key(line) for line, _, _ in lines)
    heading = f"<figcaption>{html.escape(title)}</figcaption>"
    return f'<figure class="chart">{heading}{"".join(parts)}<div class="keys">{keys}</div></figure>'


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) around ``low`` .. ``high``."""
    if high <= low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A short number: 1500 -> 1500, 20000 -> 20k, 0.00025 -> 2.5e-4."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        thousands, unit = (value / 1e6, "M") if abs(value) >= 1e6 else (value / 1e3, "k")
        return f"{thousands:g}{unit}"
    if abs(value) < 0.001:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**power:.3g}e{power}"
    return f"{value:.4g}"


def _points(line: Series, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(line.x, dtype=np.float64)
    y = np.asarray(line.y, dtype=np.float64)
    if x.shape != y.shape:
        raise PosefabricError(f"chart line {line.name}: {x.size} x values but {y.size} y values")
    keep = np.isfinite(x) & np.isfinite(y)
    if log_y:
        keep &= y > 0
    x, y = x[keep], y[keep]
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    if log_y:
        y = np.log10(y)
    if len(x) > _MOST_POINTS:
        bins = np.array_split(np.arange(len(x)), _MOST_POINTS)
        x = np.array([x[rows].mean() for rows in bins])
        y = np.array([y[rows].mean() for rows in bins])
    return x, y


def _path(line: Series, points: list[tuple[float, float]]) -> str:
    colour = f"var(--series-{line.colour % _COLOURS})"
    drawn = ""
    if len(points) > 1:
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        drawn = f'<polyline class="line" points="{text}" style="stroke:{colour}"{dash}/>'
    if len(points) <= 12:
        drawn += "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{colour}"/>' for x, y in points
        )
    return drawn


def _key(line: Series) -> str:
    style = "dashed" if line.dashed else "solid"
    mark = f'<i style="border-top:3px {style} var(--series-{line.colour % _COLOURS})"></i>'
    return f"<span>{mark}{html.escape(line.name)}</span>"
