"""The architecture figure: every part's fabric as a metro map (matplotlib, extra ``viz``)."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any, Literal

from posefabric.deploy.metro_panel import (
    INK,
    KIND_COLOURS,
    LINE,
    PALE,
    UNIT_WH,
    draw_part,
    is_border_copy,
    operation_label,
    panel_extent,
    weight_label,
)
from posefabric.space.architecture import STEM_WIDTH, Architecture, Backbone, Choice, Edge, Part
from posefabric.space.baseline import Baseline
from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KIND_TEXT = {
    "same": "same scale",
    "finer": "from the finer scale (stride 2)",
    "coarser": "from the coarser scale (upsampled x2)",
}
_OPERATION_COLOURS = {
    "zero": "#d3d7dd",
    "skip": "#f4c430",
    "sep_conv_3x3": "#a78bda",
    "sep_conv_5x5": "#7c5cc4",
    "dil_conv_3x3": "#f2789f",
    "dil_conv_5x5": "#cf4a78",
    "avg_pool_3x3": "#6cc5cf",
    "max_pool_3x3": "#c49a6c",
}
_LEGEND = 3.9  # inches
_OTHER_COLOURS = ("#9bc53d", "#5fa8d3", "#e59866", "#85929e", "#bb8fce")


def draw_architecture(
    architecture: Architecture, *, title: str | None = None, columns: int | None = None
) -> Figure:
    """One figure of all parts: a panel a part, layers across, scales 1/4 to 1/32 down.

    A fabric backbone has a panel of its own, above them.

    Stations are cells (width and candidate operations with their weights), tracks are the kept
    sources, wide where their weight is large; dots are places of the grid nothing reaches.

    Args:
        title: above the panels; None: skeleton, backbone, parts and input size.
        columns: panels side by side; None: 2 up to four parts, else 3.

    Raises PosefabricError where matplotlib is missing or there are no parts.
    """
    figure_class = matplotlib_figure()
    parts = architecture.parts
    if not parts:
        raise PosefabricError("the architecture has no parts: there is nothing to draw")
    if columns is None:
        columns = 2 if len(parts) <= 4 else 3
    legend_inside = len(parts) % columns != 0  # the last panel's place is free
    rows = -(-len(parts) // columns)
    extent = panel_extent(architecture)
    panel = (extent.width * UNIT_WH[0], extent.height * UNIT_WH[1])
    head, foot = 0.62, 0.1 if legend_inside else panel[1] if columns == 1 else 1.0
    width, height = columns * panel[0], rows * panel[1] + head + foot
    if len(parts) == 1 and columns > 1:
        width = panel[0] + _LEGEND  # beside one panel the legend needs less than a panel
    below = height
    own = _backbone_alone(architecture)
    if own is not None:
        own_extent = panel_extent(own)
        own_wh = (own_extent.width * UNIT_WH[0], own_extent.height * UNIT_WH[1])
        width, height = max(width, own_wh[0]), height + own_wh[1]
    figure = figure_class(figsize=(width, height), facecolor="white")
    colours = _operation_colours(architecture)

    def place(position: int) -> tuple[float, float, float, float]:
        left = position % columns * panel[0]
        bottom = below - head - (position // columns + 1) * panel[1]
        return left / width, bottom / height, panel[0] / width, panel[1] / height

    if own is not None:
        corner = (0.0, (below - head) / height, own_wh[0] / width, own_wh[1] / height)
        draw_part(figure.add_axes(corner), own, own.parts[0], own_extent, colours)
    for position, part in enumerate(parts):
        draw_part(figure.add_axes(place(position)), architecture, part, extent, colours)
    corner = place(len(parts)) if legend_inside else (0.0, 0.0, 1.0, foot / height)
    if len(parts) == 1 and columns > 1:
        corner = (corner[0], corner[1], _LEGEND / width, corner[3])
    _draw_legend(
        figure.add_axes(corner), architecture, colours, wide=not legend_inside and columns > 1
    )
    if title is None:
        size = "x".join(str(side) for side in architecture.input_wh)
        noun = "part" if len(parts) == 1 else "parts"
        title = f"{architecture.skeleton} on {architecture.backbone.name}, "
        title += f"{len(parts)} {noun}, input {size}"
    figure.text(
        0.5, 1 - 0.3 / height, title, ha="center", va="center", size=14, weight="bold", color=INK
    )
    return figure


def _backbone_alone(architecture: Architecture) -> Architecture | None:
    """A fabric backbone as if it were the one part of a network on its stem."""
    fabric = architecture.backbone.fabric
    if fabric is None:
        return None
    stem = Backbone(name="stem", channels=(STEM_WIDTH,))
    return architecture.model_copy(update={"backbone": stem, "first_layer": 0, "parts": (fabric,)})


def architecture_image(
    architecture: Architecture,
    *,
    format: Literal["svg", "png", "pdf"] = "svg",
    title: str | None = None,
    columns: int | None = None,
    dpi: int = 140,
) -> bytes:
    """:func:`draw_architecture` as a file's bytes, the same for the same architecture."""
    figure = draw_architecture(architecture, title=title, columns=columns)
    from matplotlib import rc_context

    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "posefabric"}):
        figure.savefig(buffer, format=format, dpi=dpi, metadata=undated.get(format))
    return buffer.getvalue()


def describe_architecture(architecture: Architecture | Baseline) -> str:
    """The same as text, without matplotlib: a table a part, a row a cell, weights in columns.

    ``copy`` columns are border copies: sources that stand in for one the grid lacks. A baseline
    has no cells, only what each of its outputs predicts.
    """
    backbone = architecture.backbone
    channels = ", ".join(f"{c} at 1/{4 * 2**s}" for s, c in enumerate(backbone.channels))
    width, height = architecture.input_wh
    head = architecture.head
    lines = [
        f"architecture {architecture.digest()}",
        f"skeleton {architecture.skeleton}, {len(architecture.keypoint_names)} keypoints, "
        f"input {width}x{height}",
        f"backbone {backbone.name}: channels {channels}",
        f"head {head.kind}" + ("" if head.kind == "heatmap" else f" of {head.dim}"),
    ]
    if isinstance(architecture, Baseline):
        blocks = f", {architecture.blocks} residual blocks" if architecture.blocks else ""
        lines.append(f"network {architecture.network}: {architecture.width} channels{blocks}")
        for branch in architecture.parts:
            names = ", ".join(architecture.keypoint_names[k] for k in branch.keypoints)
            lines += textwrap.wrap(f"{branch.name}: {names}", 98, subsequent_indent="    ")
        return "\n".join(lines) + "\n"
    for part in architecture.fabrics:
        names = ", ".join(architecture.keypoint_names[k] for k in part.keypoints)
        noun = "cell" if len(part.cells) == 1 else "cells"
        heading = f"{part.name} ({len(part.cells)} {noun}): {names or 'the pyramid'}"
        lines += ["", *textwrap.wrap(heading, 98, subsequent_indent="    ")]
        lines += ["  " + line for line in _part_table(part)]
    return "\n".join(lines) + "\n"


def _part_table(part: Part) -> list[str]:
    rows: list[tuple[list[str], dict[str, str], dict[str, str]]] = []
    for cell in part.cells:
        sources: dict[str, str] = {}
        for source in cell.sources:
            key = f"{source.kind} copy" if is_border_copy(source) else source.kind
            both = [sources[key]] if key in sources else []
            sources[key] = "+".join([*both, weight_label(source.weight)])
        operations = {
            _operation_key(edge, choice, len(cell.edges)): weight_label(choice.weight)
            for edge in cell.edges
            for choice in edge.choices
        }
        place = [str(cell.layer), f"1/{4 * 2**cell.scale}", str(cell.width)]
        rows.append((place, sources, operations))
    order = ["same", "same copy", "finer", "finer copy", "coarser", "coarser copy"]
    kinds = [kind for kind in order if any(kind in sources for _, sources, _ in rows)]
    names = list(dict.fromkeys(name for _, _, operations in rows for name in operations))
    table = [["layer", "scale", "width", "|", *kinds, "|", *names]]
    for place, sources, operations in rows:
        cells = [*place, "|", *(sources.get(kind, "-") for kind in kinds)]
        table.append([*cells, "|", *(operations.get(name, "-") for name in names)])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(text.rjust(wide) for text, wide in zip(row, widths, strict=True)) for row in table
    ]


def _operation_key(edge: Edge, choice: Choice, edges: int) -> str:
    label = operation_label(choice.operation)
    return label if edges == 1 else f"{edge.start}-{edge.end} {label}"


def matplotlib_figure() -> Any:
    """matplotlib's Figure; raises PosefabricError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PosefabricError(
            "this drawing needs matplotlib, which is not installed: "
            "pip install posefabric[viz] (posefabric show draws an architecture as text without)"
        ) from error
    return Figure


def _operation_colours(architecture: Architecture) -> dict[str, str]:
    """Operation to colour, in the order in which they first appear."""
    names = [
        choice.operation
        for part in architecture.fabrics
        for cell in part.cells
        for edge in cell.edges
        for choice in edge.choices
    ]
    colours: dict[str, str] = {}
    others = 0
    for name in dict.fromkeys(names):
        if name in _OPERATION_COLOURS:
            colours[name] = _OPERATION_COLOURS[name]
        else:
            colours[name] = _OTHER_COLOURS[others % len(_OTHER_COLOURS)]
            others += 1
    return colours


def _draw_legend(
    axes: Axes, architecture: Architecture, colours: dict[str, str], *, wide: bool
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    axes.set_axis_off()
    sources = [s for part in architecture.fabrics for cell in part.cells for s in cell.sources]
    tracks = [
        Line2D([], [], color=colour, lw=4, label=_KIND_TEXT[kind])
        for kind, colour in KIND_COLOURS.items()
    ]
    if any(is_border_copy(source) for source in sources):
        tracks.append(Line2D([], [], color=PALE, lw=3, ls=(0, (2.2, 1.2)), label="border copy"))
    marks = (
        ("s", 9, INK, INK, "backbone level, channels"),
        ("s", 9, "white", INK, "cell, channels of a node"),
        ("o", 5, "white", LINE, "dropped: nothing uses it"),
    )
    places = [
        Line2D([], [], ls="", marker=shape, ms=size, mfc=face, mec=edge, label=label)
        for shape, size, face, edge, label in marks
    ]
    operations = [
        Patch(fc=colour, ec="none", label=operation_label(name)) for name, colour in colours.items()
    ]
    blocks = {"Sources (width: weight)": tracks, "Stations": places, "Operations": operations}
    for number, (title, handles) in enumerate(blocks.items()):
        anchor = ((number + 0.5) / 3, 0.98) if wide else (0.08, 0.93 - 0.29 * number)
        legend = axes.legend(
            handles=handles, title=title, loc="upper center" if wide else "upper left",
            bbox_to_anchor=anchor, frameon=False, fontsize=8, alignment="left", borderpad=0,
            ncols=2 if handles is operations and len(handles) > 3 else 1, labelcolor=INK,
            title_fontproperties={"weight": "bold", "size": 8.5},
        )  # fmt: skip
        if handles is not operations:  # a new legend replaces one that was not added by hand
            axes.add_artist(legend)
