"""Which cells exist, what feeds them, and the modules built from a part's graph."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posefabric.derive.prune import prune
from posefabric.space.architecture import Architecture, Backbone
from posefabric.space.fabric import (
    CellWeights,
    Fabric,
    FabricShape,
    cell_name,
    level_widths,
    pyramid_scales,
)
from posefabric.structures import PosefabricError

OPERATIONS = ("zero", "skip", "sep_conv_3x3", "dil_conv_3x3")


def shape(**changes) -> FabricShape:
    options = dict(depth=6, first_layer=3, channel_factor=10, hidden_nodes=1, operations=OPERATIONS)
    return FabricShape(**{**options, **changes})


@given(depth=st.integers(2, 12), data=st.data())
@settings(max_examples=40, deadline=None)
def test_cells_a_layer(depth: int, data: st.DataObject) -> None:
    """min(j + 2, 4, L - j), finest first (PAPER section 1)."""
    first = data.draw(st.integers(1, depth - 1))
    made = shape(depth=depth, first_layer=first)
    counts = [sum(layer == j for layer, _ in made.places) for j in range(depth)]
    wanted = [min(j + 2, 4, depth - j) for j in range(depth)]
    assert counts == [0] * first + wanted[first:]
    assert made.pyramid_levels == wanted[first - 1]
    assert made.places == sorted(made.places) and made.places[-1] == (depth - 1, 0)


def test_the_papers_sub_fabric() -> None:
    made = shape()
    assert made.places == [(3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (5, 0)]
    assert made.widths == (40, 80, 160, 320) and made.pyramid_levels == 4
    assert shape(channel_factor=16).widths == (64, 128, 256, 512)
    assert made.edges == [(0, 1)]
    assert shape(hidden_nodes=3).edges == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("first", [0, 6, 7])
def test_a_first_layer_without_a_pyramid_is_refused(first: int) -> None:
    with pytest.raises(PosefabricError, match=rf"first_layer={first}.*1 \.\. depth - 1 = 5"):
        shape(first_layer=first)


def test_sources_where_the_fabric_shrinks() -> None:
    made = shape()
    assert made.sources(3, 0) == [(0, "same", 0), (2, "coarser", 1)]
    assert made.sources(3, 1) == [(0, "same", 1), (1, "finer", 0), (2, "coarser", 2)]
    assert made.sources(5, 0) == [(0, "same", 0), (2, "coarser", 1)]


def test_sources_where_the_fabric_grows() -> None:
    made = shape(depth=8, first_layer=1)
    assert made.cells_in(0) == 2 and made.cells_in(1) == 3
    assert made.sources(1, 2) == [(1, "finer", 1)]
    assert made.sources(1, 1) == [(0, "same", 1), (1, "finer", 0)]
    # Once all four scales exist, the coarsest has no coarser source.
    assert made.sources(3, 3) == [(0, "same", 3), (1, "finer", 2)]


def test_faithful_borders_copy_the_next_source() -> None:
    made = shape(depth=8, first_layer=1, faithful=True)
    assert made.sources(3, 0) == [(0, "same", 0), (1, "same", 0), (2, "coarser", 1)]
    assert made.sources(3, 3) == [(0, "same", 3), (1, "finer", 2), (2, "same", 3)]
    # The same scale is missing: the next finer one, which then stands for the coarser too.
    assert made.sources(1, 2) == [(0, "finer", 1), (1, "finer", 1), (2, "finer", 1)]


def test_faithful_sources_are_those_of_the_released_code(shared: Path) -> None:
    """By the modules that the released state dicts hold for each cell and source."""
    files = sorted((shared / "reference/posenfs").glob("*.json"))
    assert files
    checked = 0
    for file in files:
        reference = json.loads(file.read_text())
        cells = reference["cell_config"]
        made = shape(
            depth=cells["depth"],
            first_layer=cells["cut_layers_num"],
            channel_factor=cells["factor"],
            faithful=True,
        )
        names = dict(reference["state"])
        for part, (layer, scale) in itertools.product(reference["parts"], made.places):
            place = f"{part}.cell_{layer}_{scale}"
            assert names[f"{place}.channel_keep.weight"][0] == made.width(scale)
            for slot, kind, _ in made.sources(layer, scale):
                source = f"{place}.propress_list.{slot}"
                found = (
                    "finer"
                    if f"{source}.operation.0.weight" in names
                    else "coarser"
                    if f"{source}.conv_1x1.weight" in names
                    else "same"
                )
                assert (place, slot, found) == (place, slot, kind)
                checked += 1
        assert f"{part}.cell_{cells['depth']}_0.channel_keep.weight" not in names
    assert checked == 6 * 3 * (5 + 3 + 1 + 3)


def test_a_graph_keeps_everything_at_equal_weights() -> None:
    part = shape(hidden_nodes=2).graph("head", (4, 0))
    assert part.name == "head" and part.keypoints == (4, 0)
    assert [(c.layer, c.scale, c.width) for c in part.cells] == [
        (3, 0, 40),
        (3, 1, 80),
        (3, 2, 160),
        (4, 0, 40),
        (4, 1, 80),
        (5, 0, 40),
    ]
    for cell in part.cells:
        assert sum(s.weight for s in cell.sources) == pytest.approx(1)
        for edge in cell.edges:
            assert [c.operation for c in edge.choices] == list(OPERATIONS)
            assert sum(c.weight for c in edge.choices) == pytest.approx(1)
    faithful = shape(faithful=True).graph("head", (0,))
    for cell in faithful.cells:
        assert [s.weight for s in cell.sources] == [1.0, 1.0, 1.0]
        assert [c.weight for c in cell.edges[0].choices] == [1.0] * 4
    assert level_widths(part) == (40, 80, 160, 320)
    assert pyramid_scales(part, 3) == (0, 1, 2, 3)


def as_architecture(part) -> Architecture:
    return Architecture(
        skeleton="one",
        keypoint_names=("a",),
        input_wh=(64, 64),
        backbone=Backbone(name="b", channels=(1, 2, 3, 4)),
        first_layer=3,
        parts=(part,),
    )


def test_one_hot_beta_leaves_thirteen_single_paths() -> None:
    """PAPER section 1: one-hot beta gives 13 paths, and with 4 operations 52 functions."""
    part = shape().graph("all", (0,))
    found: set[tuple] = set()
    functions: set[str] = set()
    for rows in itertools.product(*(range(len(c.sources)) for c in part.cells)):
        cells = tuple(
            cell.model_copy(update={"sources": (cell.sources[row],)})
            for cell, row in zip(part.cells, rows, strict=True)
        )
        pruned = prune(as_architecture(part.model_copy(update={"cells": cells}))).parts[0]
        assert [cell.layer for cell in pruned.cells] == [3, 4, 5], "a single path"
        path = tuple((c.scale, c.sources[0].kind) for c in pruned.cells)
        found.add(path)
        functions.update(f"{path} {operation}" for operation in OPERATIONS)
    assert len(found) == 13 and len(functions) == 52


def test_a_fabric_computes_its_cells_in_order() -> None:
    """Only skips and same-scale sources: the fabric is keep o keep o keep of level 0."""
    torch.manual_seed(0)
    part = shape(channel_factor=1, operations=("skip",)).graph("all", (0,))
    fabric = Fabric(part, first_layer=3, faithful=True).double()
    levels = {s: torch.randn(2, 4 * 2**s, 16 // 2**s, 16 // 2**s).double() for s in range(4)}
    weights = [
        CellWeights(sources=[float(s.slot == 0) for s in cell.sources], choices=[[1.0]])
        for cell in part.cells
    ]
    out = fabric(levels, weights, finest=levels[0])
    expected = levels[0]
    for layer in (3, 4, 5):
        expected = fabric.get_submodule(f"cells.{layer}_0.keep")(expected.clamp(min=0))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert out.shape == (2, 4, 16, 16)
    # And through other scales: from the coarser at every cell that has one.
    weights = [
        CellWeights(sources=[float(s is cell.sources[-1]) for s in cell.sources], choices=[[1.0]])
        for cell in part.cells
    ]
    out = fabric(levels, weights, finest=levels[0])
    x = levels[3]
    for layer, scale in ((3, 2), (4, 1), (5, 0)):
        cell = fabric.get_submodule(f"cells.{layer}_{scale}")
        x = cell.get_submodule("keep")(cell.get_submodule("sources.2")(x).clamp(min=0))
    torch.testing.assert_close(out, x, rtol=0, atol=1e-12)


def test_names_and_weights_of_a_graph() -> None:
    cell = shape().graph("all", (0,)).cells[1]
    assert cell_name(cell) == "3_1"
    weights = CellWeights.of_graph(cell)
    assert weights.sources == pytest.approx([1 / 3] * 3) and weights.choices == [[0.25] * 4]
