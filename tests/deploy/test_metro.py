"""The architecture figure and its text say what the graph says."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest

from posefabric.deploy import metro
from posefabric.deploy.metro_panel import KIND_COLOURS, is_border_copy, weight_label
from posefabric.space.architecture import (
    Architecture,
    Backbone,
    Cell,
    Choice,
    Edge,
    Head,
    Part,
    Source,
)
from posefabric.structures import PosefabricError

OPERATIONS = ("zero", "skip", "sep_conv_3x3", "dil_conv_3x3")
KEYPOINTS = tuple(f"joint_{k}" for k in range(8))


def source(kind: str, scale: int, weight: float, slot: int | None = None) -> Source:
    slots = {"same": 0, "finer": 1, "coarser": 2}
    return Source.model_validate(
        {
            "kind": kind,
            "scale": scale,
            "weight": weight,
            "slot": slots[kind] if slot is None else slot,
        }
    )


def choices(weights: dict[str, float]) -> tuple[Choice, ...]:
    return tuple(Choice(operation=name, weight=weight) for name, weight in weights.items())


def mixture(parts: int, *, hidden: int = 1, faithful: bool = False, seed: int = 0) -> Architecture:
    """Depth 6 without its first 3 layers: 3, 2, 1 cells over a pyramid of 4 levels."""
    rng = np.random.default_rng(seed)
    drawn = []
    for number in range(parts):
        cells = []
        for layer, count in ((3, 3), (4, 2), (5, 1)):
            below = {3: 4, 4: 3, 5: 2}[layer]
            for scale in range(count):
                kinds = (("same", scale), ("finer", scale - 1), ("coarser", scale + 1))
                sources = [
                    source(kind, at, float(rng.random()))
                    if 0 <= at < below
                    else source("same", scale, float(rng.random()), slot)
                    for slot, (kind, at) in enumerate(kinds)
                    if faithful or 0 <= at < below
                ]
                edges = tuple(
                    Edge(
                        start=start,
                        end=end,
                        choices=choices({name: float(rng.random()) for name in OPERATIONS}),
                    )
                    for end in range(1, hidden + 1)
                    for start in range(end)
                )
                width = 32 * 2**scale
                cells.append(
                    Cell(layer=layer, scale=scale, width=width, sources=tuple(sources), edges=edges)
                )
        keypoints = (number % 8, (number + 1) % 8)
        drawn.append(Part(name=f"part_{number}", keypoints=keypoints, cells=tuple(cells)))
    return build(tuple(drawn))


def build(parts: tuple[Part, ...]) -> Architecture:
    return Architecture(
        skeleton="made8",
        keypoint_names=KEYPOINTS,
        input_wh=(128, 96),
        backbone=Backbone(name="some_backbone", channels=(24, 40, 112, 320)),
        first_layer=3,
        parts=parts,
    )


def compact() -> Architecture:
    """One path: 1/8 of the backbone, layer 3 at 1/8, layer 4 at 1/8, up to 1/4 in layer 5."""
    only = (Edge(start=0, end=1, choices=choices({"sep_conv_3x3": 0.62})),)
    cells = (
        Cell(layer=3, scale=1, width=64, sources=(source("same", 1, 1.0),), edges=only),
        Cell(layer=4, scale=1, width=48, sources=(source("same", 1, 0.41),), edges=only),
        Cell(layer=5, scale=0, width=32, sources=(source("coarser", 1, 0.73),), edges=only),
    )
    return build((Part(name="left_arm", keypoints=(2, 5), cells=cells),))


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def tracks(axes) -> list:
    return [
        patch
        for patch in axes.patches
        if type(patch).__name__ == "PathPatch" and patch.get_zorder() > 2.05
    ]


@pytest.mark.parametrize("parts", [1, 3, 5, 8])
def test_a_panel_a_part_with_all_tracks_and_no_overlap(parts: int):
    figure = metro.draw_architecture(mixture(parts))
    panels = figure.axes[:parts]
    assert len(figure.axes) == parts + 1
    for number, axes in enumerate(panels):
        assert len(tracks(axes)) == 2 + 3 + 3 + 2 + 3 + 2
        assert f"part {number}" in [text.get_text() for text in axes.texts]
    boxes = [axes.get_position() for axes in figure.axes]
    for number, one in enumerate(boxes):
        assert one.x0 >= -1e-9 and one.x1 <= 1 + 1e-9 and one.y0 >= -1e-9 and one.y1 <= 1 + 1e-9
        for other in boxes[number + 1 :]:
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            high = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide < 1e-6 or high < 1e-6


def test_a_compact_graph_shows_its_weights_and_what_was_dropped():
    figure = metro.draw_architecture(compact())
    axes = figure.axes[0]
    shown = [text.get_text() for text in axes.texts]
    assert {"left arm", "joint 2, joint 5", "2 keypoints", "48 ch", "sep 3x3"} <= set(shown)
    assert shown.count(".62") == 3 and shown.count(".41") == 1 and shown.count(".73") == 1
    dropped = {
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_marker() == "o"
    }
    assert dropped == {(3, 0), (3, 2), (4, 0)}


def test_tracks_have_the_kinds_colour_the_weights_width_and_the_right_ends():
    from matplotlib.colors import to_hex

    axes = metro.draw_architecture(compact()).axes[0]
    drawn = tracks(axes)
    colours = [to_hex(track.get_edgecolor()) for track in drawn]
    assert colours == [KIND_COLOURS[kind] for kind in ("same", "same", "coarser")]
    widths = [track.get_linewidth() for track in drawn]
    assert widths[0] > widths[2] > widths[1]
    assert widths[0] - widths[1] == pytest.approx((1 - 0.41) * 5.5)
    start, end = drawn[2].get_path().vertices[[0, -1]]
    assert 4 < start[0] < 4.5 < end[0] < 5
    assert round(start[1]) == 1 and round(end[1]) == 0


def test_many_tracks_carry_no_weight_labels():
    figure = metro.draw_architecture(mixture(1))
    labels = [text for text in figure.axes[0].texts if text.get_bbox_patch() is not None]
    assert labels == []
    figure = metro.draw_architecture(compact())
    labels = [text for text in figure.axes[0].texts if text.get_bbox_patch() is not None]
    assert len(labels) == 2  # the only source of weight 1 needs no label


def test_border_copies_are_dashed_beside_their_track_and_explained():
    figure = metro.draw_architecture(mixture(1, faithful=True))
    drawn = tracks(figure.axes[0])
    # Depth 6 behind layer 3: only the finest cell of each layer lacks a neighbour.
    dashed = [track for track in drawn if track.get_linestyle() not in ("-", "solid")]
    assert len(drawn) == 18 and len(dashed) == 3
    legends = [
        child for child in figure.axes[-1].get_children() if hasattr(child, "legend_handles")
    ]
    said = {text.get_text() for legend in legends for text in legend.get_texts()}
    assert {"border copy", "sep 3x3", "same scale"} <= said
    assert is_border_copy(source("same", 0, 1.0, 1)) and not is_border_copy(source("same", 0, 1.0))


def test_two_hidden_nodes_become_one_bar_an_edge():
    figure = metro.draw_architecture(mixture(1, hidden=2))
    shown = texts(figure)
    assert [shown.count(edge) for edge in ("0-1", "0-2", "1-2")] == [6, 6, 6]


def test_images_are_of_their_format_and_repeatable():
    graph = compact()
    svg = metro.architecture_image(graph, format="svg")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == metro.architecture_image(graph, format="svg")
    png = metro.architecture_image(graph, format="png", dpi=60)
    image = cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_COLOR)
    assert image.shape[1] > 400 and image.std() > 10


def test_no_parts_is_an_error():
    with pytest.raises(PosefabricError, match="no parts"):
        metro.draw_architecture(build(()))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PosefabricError, match=r"pip install posefabric\[viz\]"):
        metro.draw_architecture(compact())
    assert "left_arm" in metro.describe_architecture(compact())


def test_importing_costs_neither_matplotlib_nor_torch():
    modules = "draw, metro, report, report_sections"
    code = f"import sys; from posefabric.deploy import {modules}; "
    code += "print([name for name in ('matplotlib', 'torch') if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_the_text_has_every_cell_and_weight_in_aligned_columns():
    text = metro.describe_architecture(compact())
    assert compact().digest() in text and "24 at 1/4, 40 at 1/8" in text
    assert "left_arm (3 cells): joint_2, joint_5" in text
    table = text.splitlines()[-4:]
    assert " ".join(table[0].split()) == "layer scale width | same coarser | sep 3x3"
    assert table[1].split() == ["3", "1/8", "64", "|", "1", "-", "|", ".62"]
    assert table[2].split() == ["4", "1/8", "48", "|", ".41", "-", "|", ".62"]
    assert table[3].split() == ["5", "1/4", "32", "|", "-", ".73", "|", ".62"]
    assert len({len(line) for line in table}) == 1


def test_the_text_names_vectors_border_copies_and_edges():
    graph = mixture(1, hidden=2, faithful=True)
    graph = graph.model_copy(update={"head": Head(kind="vector", dim=4)})
    text = metro.describe_architecture(graph)
    assert "head vector of 4" in text
    header = next(line for line in text.splitlines() if "layer" in line)
    assert "same copy" in header and "1-2 dil 3x3" in header


@pytest.mark.parametrize(
    ("weight", "text"),
    [(0.384, ".38"), (1.0, "1"), (1.5, "1.50"), (-0.05, "-.05"), (10.0, "10.00")],
)
def test_weight_labels(weight: float, text: str):
    assert weight_label(weight) == text
