"""One part's fabric as a panel of the architecture figure: stations, tracks, headings.

Only :mod:`posefabric.deploy.metro` imports this module's users of matplotlib, at drawing time.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple

from posefabric.space.architecture import Architecture, Cell, Edge, Part, Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND_COLOURS = {"same": "#2563c9", "finer": "#e2711d", "coarser": "#1f9d61"}
INK, PALE, LINE = "#1d2430", "#8b94a3", "#c5ccd6"
UNIT_WH = (1.36, 0.92)  # inches between neighbouring layers and scales

_SCALES = 4
_SLOTS = {"same": 0, "finer": 1, "coarser": 2}
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.66, 0.72, 1.12, 0.68  # margins of a panel, in units
_WIDE, _ROW, _HEAD = 0.6, 0.135, 0.2  # station width, choice row, station header, in units
_PORT = 0.13  # tracks leave and reach a station this far apart
_MOST_ROWS = 5  # more choices than this in a cell are drawn as one stacked bar an edge
_MOST_LABELS = 12  # more tracks than this in a part carry no weight labels


def is_border_copy(source: Source) -> bool:
    """Whether a source stands in beta for one that the border of the grid lacks."""
    return _SLOTS[source.kind] != source.slot


def operation_label(operation: str) -> str:
    """``sep_conv_3x3`` as a reader says it: ``sep 3x3``."""
    return operation.replace("_conv_", " ").replace("_", " ")


def weight_label(weight: float) -> str:
    """Two decimals without the leading zero: ``.38``, ``1``, ``-.05``."""
    if abs(weight - 1) < 1e-9:
        return "1"
    text = f"{abs(weight):.2f}"
    return ("-" if weight < 0 else "") + text.removeprefix("0")


class Extent(NamedTuple):
    """What every panel shows: layers first - 1 (the backbone) to last, scales 0 to deepest."""

    first: int
    last: int
    deepest: int

    @property
    def width(self) -> float:
        return self.last - self.first + 1 + 2 * _WIDE / 2 + _LEFT + _RIGHT

    @property
    def height(self) -> float:
        return self.deepest + _TOP + _BOTTOM


def panel_extent(architecture: Architecture) -> Extent:
    cells = [cell for part in architecture.parts for cell in part.cells]
    last = max((cell.layer for cell in cells), default=architecture.first_layer)
    scales = [cell.scale for cell in cells] + [len(architecture.backbone.channels) - 1, 1]
    return Extent(architecture.first_layer, last, max(scales))


def draw_part(
    axes: Axes, architecture: Architecture, part: Part, extent: Extent, colours: dict[str, str]
) -> None:
    first, last, deepest = extent
    left, right = first - 1 - _WIDE / 2 - _LEFT, last + _WIDE / 2 + _RIGHT
    axes.set_xlim(left, right)
    axes.set_ylim(deepest + _BOTTOM, -_TOP)
    axes.set_axis_off()
    _box(axes, left + 0.05, 0.06 - _TOP, right - left - 0.1, extent.height - 0.12, LINE, "white")
    _draw_heading(axes, architecture, part, left + 0.2)
    for scale in range(deepest + 1):
        axes.plot([first - 1, last], [scale, scale], color="#edf0f4", lw=1.2, zorder=0)
        _text(axes, left + 0.36, scale, f"1/{4 * 2**scale}", size=7.5, color=PALE)
    for layer in range(first - 1, last + 1):
        before = "backbone" if part.keypoints else "stem"
        label = before if layer < first else f"layer {layer}"
        _text(axes, layer, deepest + 0.47, label, size=7.5, color=PALE)

    cells = {(cell.layer, cell.scale) for cell in part.cells}
    labelled = sum(len(cell.sources) for cell in part.cells) <= _MOST_LABELS
    for cell in part.cells:
        alike: Counter[tuple[str, int]] = Counter()
        for source in cell.sources:
            _draw_track(axes, cell, source, alike[source.kind, source.scale], labelled)
            alike[source.kind, source.scale] += 1
    used = {source.scale for cell in part.cells if cell.layer == first for source in cell.sources}
    for level, channels in enumerate(architecture.backbone.channels):
        _draw_level(axes, first - 1, level, channels, level in used)
    for layer in range(first, last + 1):
        for scale in range(min(layer + 2, _SCALES, last + 1 - layer)):
            if (layer, scale) not in cells:
                axes.plot(layer, scale, "o", ms=4.5, mfc="white", mec=LINE, mew=1.2, zorder=1)
    for cell in part.cells:
        _draw_station(axes, cell, colours)
    if (last, 0) in cells:
        axes.annotate(
            "",
            xy=(last + _WIDE / 2 + 0.3, 0),
            xytext=(last + _WIDE / 2, 0),
            arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.8, "shrinkA": 0, "shrinkB": 0},
        )
        count = len(part.keypoints)
        text = f"{count} keypoint" + ("s" if count > 1 else "") if count else "pyramid"
        _text(axes, last + _WIDE / 2 + 0.38, 0.2, text, size=7, color=INK)


def _draw_heading(axes: Axes, architecture: Architecture, part: Part, left: float) -> None:
    name = part.name.replace("_", " ")
    _text(axes, left, 0.24 - _TOP, name, size=11.5, weight="bold", align="left")
    names = ", ".join(architecture.keypoint_names[k].replace("_", " ") for k in part.keypoints)
    characters = int((axes.get_xlim()[1] - left - 0.15) * UNIT_WH[0] * 17)
    lines = textwrap.wrap(names, characters, max_lines=2, placeholder=" …")
    for number, line in enumerate(lines):
        _text(axes, left, 0.43 - _TOP + 0.14 * number, line, size=7, color="#5b6472", align="left")


def _draw_track(axes: Axes, cell: Cell, source: Source, twin: int, labelled: bool) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    lean = {"same": 0.0, "finer": _PORT, "coarser": -_PORT}[source.kind]
    aside = 0.075 * twin  # a border copy runs beside the track it doubles
    start = (cell.layer - 1 + _WIDE / 2 - 0.02, source.scale + lean + aside)
    end = (cell.layer - _WIDE / 2 + 0.02, cell.scale - lean + aside)
    room = end[0] - start[0]
    bends = [(start[0] + 0.5 * room, start[1]), (end[0] - 0.62 * room, end[1])]
    straight = (end[0] - 0.3 * room, end[1])
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    path = Path([start, *bends, straight, end], codes)
    weight = min(abs(source.weight), 1.0)
    colour = KIND_COLOURS[source.kind]
    style = (0, (2.2, 1.2)) if is_border_copy(source) else "-"
    line = {"fill": False, "capstyle": "butt", "joinstyle": "round"}
    width = 0.8 + 5.5 * weight
    axes.add_patch(PathPatch(path, ec="white", lw=width + 1.6, zorder=2, **line))
    axes.add_patch(PathPatch(path, ec=colour, lw=width, ls=style, zorder=2.1, **line))
    if labelled and abs(source.weight - 1) > 1e-6:
        at = (end[0] - 0.24 * room, end[1])
        pill = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": colour, "lw": 0.6}
        axes.text(
            *at, weight_label(source.weight), size=6.3, color=colour, weight="bold",
            ha="center", va="center_baseline", bbox=pill, zorder=5,
        )  # fmt: skip


def _draw_level(axes: Axes, layer: int, level: int, channels: int, used: bool) -> None:
    low, wide, high = layer - _WIDE / 2 + 0.06, _WIDE - 0.06, 0.34
    edge, face = (INK, INK) if used else (LINE, "white")
    _box(axes, low, level - high / 2, wide, high, edge, face, zorder=3)
    colour = "white" if used else PALE
    _text(axes, low + wide / 2, level, f"{channels} ch", size=7.5, color=colour, weight="bold")


def _draw_station(axes: Axes, cell: Cell, colours: dict[str, str]) -> None:
    choices = [choice for edge in cell.edges for choice in edge.choices]
    stacked = len(choices) > _MOST_ROWS
    rows = len(cell.edges) if stacked else len(choices)
    high = _HEAD + rows * _ROW + (0.05 if rows else 0.02)
    left, top = cell.layer - _WIDE / 2, cell.scale - high / 2
    _box(axes, left, top, _WIDE, high, INK, "white", zorder=3)
    _text(axes, cell.layer, top + _HEAD / 2 + 0.015, f"{cell.width} ch", size=7.5, weight="bold")
    row = top + _HEAD
    inner = (left + 0.035, _WIDE - 0.07)
    for edge in cell.edges:
        if stacked:
            _draw_stack(axes, edge, inner, row, colours)
            row += _ROW
            continue
        for choice in edge.choices:
            share = min(abs(choice.weight), 1.0) * inner[1]
            _bar(axes, inner[0], row, inner[1], "#f2f4f7")
            _bar(axes, inner[0], row, share, colours[choice.operation])
            name = operation_label(choice.operation)
            if len(cell.edges) > 1:
                name = f"{edge.start}-{edge.end} {name}"
            middle = row + _ROW / 2
            _text(axes, inner[0] + 0.02, middle, name, size=6.2, align="left", zorder=4.2)
            number = weight_label(choice.weight)
            edge_x = inner[0] + inner[1] - 0.02
            _text(axes, edge_x, middle, number, size=6.2, align="right", zorder=4.2)
            row += _ROW


def _draw_stack(
    axes: Axes, edge: Edge, inner: tuple[float, float], row: float, colours: dict[str, str]
) -> None:
    """One edge as a bar whose segments are the operations' shares of the weight."""
    label = 0.1
    middle = row + _ROW / 2
    _text(axes, inner[0], middle, f"{edge.start}-{edge.end}", size=5.6, align="left", zorder=4.2)
    at, wide = inner[0] + label, inner[1] - label
    total = sum(abs(choice.weight) for choice in edge.choices) or 1.0
    for choice in edge.choices:
        share = wide * abs(choice.weight) / total
        _bar(axes, at, row, share, colours[choice.operation])
        if share > 0.1:
            number = weight_label(choice.weight)
            _text(axes, at + share / 2, middle, number, size=5.6, zorder=4.2)
        at += share


def _bar(axes: Axes, left: float, top: float, wide: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    spot = (left, top + 0.012)
    axes.add_patch(Rectangle(spot, wide, _ROW - 0.024, fc=colour, ec="none", zorder=4))


def _box(
    axes: Axes,
    left: float,
    top: float,
    wide: float,
    high: float,
    edge: str,
    face: str,
    zorder: float = 0,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    # Rounding is in units of x; the aspect makes corners round on paper.
    style = "round,pad=0,rounding_size=0.05"
    aspect = UNIT_WH[0] / UNIT_WH[1]
    axes.add_patch(
        FancyBboxPatch(
            (left, top),
            wide,
            high,
            boxstyle=style,
            mutation_aspect=aspect,
            fc=face,
            ec=edge,
            lw=1.1,
            zorder=zorder,
        )
    )


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    color: str = INK,
    weight: str = "normal",
    align: Literal["left", "center", "right"] = "center",
    zorder: float = 4,
) -> None:
    axes.text(
        x, y, text, size=size, color=color, weight=weight,
        ha=align, va="center_baseline", zorder=zorder,
    )  # fmt: skip
