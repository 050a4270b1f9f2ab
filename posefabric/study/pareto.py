"""Which arms no other beats at their cost, and the plots of it (extra viz)."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posefabric.run import write_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """An arm: its mean cost, its mean measure, and the standard deviation of that over runs."""

    name: str
    cost: float
    value: float
    spread: float = 0.0


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats (no dearer, no worse, and one of them better), by cost."""
    front = [
        p
        for p in points
        if not any(
            q.cost <= p.cost and q.value >= p.value and (q.cost, q.value) != (p.cost, p.value)
            for q in points
        )
    ]
    return sorted(front, key=lambda point: (point.cost, point.name))


def plot_pareto(points: Sequence[Point], path: Path, *, x_label: str, y_label: str) -> bool:
    """A PNG with the points, their spread and the front. False, and a log line, without viz."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed (extra viz): no plots of the study are drawn")
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for point in points:
        axes.errorbar(point.cost, point.value, yerr=point.spread or None, fmt="o", capsize=3)
        axes.annotate(
            point.name,
            (point.cost, point.value),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    front = pareto_front(points)
    axes.step(
        [p.cost for p in front],
        [p.value for p in front],
        where="post",
        color="grey",
        linewidth=1,
        zorder=0,
    )
    costs = [point.cost for point in points]
    if min(costs) > 0 and max(costs) > 5 * min(costs):
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomic(path, buffer.getvalue())
    return True
