"""The architecture's JSON: round trip, digest, differences, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posefabric.space.architecture import (
    FORMAT_VERSION,
    Architecture,
    Backbone,
    Cell,
    Choice,
    Edge,
    Head,
    Part,
    Source,
)
from posefabric.space.fabric import FabricShape
from posefabric.structures import PosefabricError

weights = st.floats(0, 10, allow_nan=False)
names = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)
counts = st.integers(0, 300)
choices = st.builds(Choice, operation=names, weight=weights)
edges = st.builds(Edge, start=counts, end=counts, choices=st.lists(choices, max_size=4).map(tuple))
sources = st.builds(
    Source,
    kind=st.sampled_from(["same", "finer", "coarser"]),
    scale=counts,
    weight=weights,
    slot=st.integers(0, 2),
)
cells = st.builds(
    Cell,
    layer=counts,
    scale=counts,
    width=counts,
    sources=st.lists(sources, max_size=3).map(tuple),
    edges=st.lists(edges, max_size=3).map(tuple),
)
parts = st.builds(
    Part,
    name=names,
    keypoints=st.lists(counts, max_size=3).map(tuple),
    cells=st.lists(cells, max_size=3).map(tuple),
)
graphs = st.builds(
    Architecture,
    format_version=st.just(FORMAT_VERSION),
    skeleton=names,
    keypoint_names=st.lists(names, max_size=4).map(tuple),
    input_wh=st.tuples(counts, counts),
    backbone=st.builds(Backbone, name=names, channels=st.lists(counts, max_size=4).map(tuple)),
    first_layer=counts,
    faithful=st.booleans(),
    head=st.builds(
        Head,
        kind=st.sampled_from(["heatmap", "vector"]),
        dim=counts,
        scores=st.sampled_from(["softmax", "identity"]),
        peak=weights,
    ),
    parts=st.lists(parts, max_size=3).map(tuple),
)


@given(graph=graphs)
@settings(max_examples=60, deadline=None)
def test_any_graph_survives_json(graph: Architecture) -> None:
    back = Architecture.from_json(graph.to_json())
    assert back == graph
    assert back.digest() == graph.digest() and back.diff(graph) == []
    assert back.to_json() == graph.to_json()


def make(**changes) -> Architecture:
    shape = FabricShape(
        depth=4, first_layer=2, channel_factor=2, hidden_nodes=1, operations=("zero", "skip")
    )
    options = dict(
        skeleton="two",
        keypoint_names=("a", "b"),
        input_wh=(64, 32),
        backbone=Backbone(name="net", channels=(4, 8, 16)),
        first_layer=2,
        parts=(shape.graph("one", (0,)), shape.graph("two", (1,))),
    )
    return Architecture(**{**options, **changes})


def with_cells(graph: Architecture, change) -> Architecture:
    part = graph.parts[0]
    cells = tuple(change(list(part.cells)))
    return graph.model_copy(
        update={"parts": (part.model_copy(update={"cells": cells}), *graph.parts[1:])}
    )


def test_a_digest_names_the_graph_and_its_weights() -> None:
    graph = make()
    assert len(graph.digest()) == 16 and int(graph.digest(), 16) >= 0
    assert make().digest() == graph.digest()
    heavier = with_cells(graph, reweighted)
    assert heavier.digest() != graph.digest()


def reweighted(cells: list[Cell]) -> list[Cell]:
    first = cells[0]
    source = first.sources[0].model_copy(update={"weight": 0.75})
    return [first.model_copy(update={"sources": (source, *first.sources[1:])}), *cells[1:]]


def test_a_diff_says_what_was_lost_won_and_changed() -> None:
    graph = make()
    assert graph.diff(with_cells(graph, reweighted)) == [
        "~ one layer 2 scale 0 from same (slot 0): 0.5000 -> 0.7500"
    ]
    smaller = with_cells(graph, lambda cells: cells[:-1])
    lost = [
        "one layer 3 scale 0",
        "one layer 3 scale 0 from same (slot 0)",
        "one layer 3 scale 0 from coarser (slot 2)",
        "one layer 3 scale 0 edge 0-1 zero",
        "one layer 3 scale 0 edge 0-1 skip",
    ]
    assert graph.diff(smaller) == [f"- {key}" for key in lost]
    assert smaller.diff(graph) == [f"+ {key}" for key in lost]


@pytest.mark.parametrize(
    "changes",
    [
        dict(skeleton="other"),
        dict(keypoint_names=("a", "c")),
        dict(input_wh=(32, 64)),
        dict(backbone=Backbone(name="other", channels=(4, 8, 16))),
        dict(backbone=Backbone(name="net", channels=(4, 8))),
        dict(faithful=True),
        dict(head=Head(kind="vector")),
        dict(channel_order="bgr"),
        dict(head=Head(scores="identity")),
        dict(head=Head(peak=0.5)),
        dict(head=Head(dim=3)),
    ],
)
def test_a_diff_sees_every_field(changes: dict) -> None:
    (line,) = make().diff(make(**changes))
    assert line.startswith("~ ")


def test_a_diff_sees_widths_and_keypoints() -> None:
    graph = make()
    wider = with_cells(graph, lambda c: [*c[:-1], c[-1].model_copy(update={"width": 99})])
    assert graph.diff(wider) == ["~ one layer 3 scale 0: 8 channels -> 99 channels"]
    part = graph.parts[0].model_copy(update={"keypoints": (1,)})
    moved = graph.model_copy(update={"parts": (part, graph.parts[1])})
    assert graph.diff(moved) == ["~ one: keypoints: (0,) -> (1,)"]


def test_graphs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make().skeleton = "other"


def edited(**changes) -> str:
    return json.dumps({**json.loads(make().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an architecture: no JSON"),
        ("[]", "not an architecture"),
        (edited(parts="none"), "not an architecture: parts: Input should be"),
        (edited(colour=1), "not an architecture: colour: Extra inputs"),
        (edited(backbone={"name": "x"}), r"backbone\.channels: Field required"),
        (edited(format_version=7, colour=1), "format version 7, this posefabric reads 1"),
        (edited(format_version="new"), "format_version"),
    ],
)
def test_what_is_no_architecture_is_told_apart(text: str, message: str) -> None:
    with pytest.raises(PosefabricError, match=message) as caught:
        Architecture.from_json(text, origin="some/file.json")
    assert str(caught.value).startswith("some/file.json: ")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    with pytest.raises(PosefabricError, match=r"architecture\.json: cannot be read \(No such"):
        Architecture.load(path)
    path.write_text(make().to_json())
    assert Architecture.load(str(path)) == make()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PosefabricError, match=r"architecture\.json: .*UTF-8"):
        Architecture.load(path)
