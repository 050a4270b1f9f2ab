"""Keeping the strongest choices, with their sums unchanged."""

from __future__ import annotations

import pytest
from networks import EVERY, make_supernet

from posefabric.derive.discretize import discretize
from posefabric.space.architecture import Architecture, Cell, Choice, Edge, Source


def cell(*, choices: dict[str, float], sources: dict[int, float]) -> Cell:
    kinds = ("same", "finer", "coarser")
    return Cell(
        layer=5,
        scale=0,
        width=8,
        sources=tuple(
            Source(kind=kinds[slot], scale=0, weight=weight, slot=slot)  # type: ignore[arg-type]
            for slot, weight in sources.items()
        ),
        edges=(
            Edge(
                start=0,
                end=1,
                choices=tuple(Choice(operation=o, weight=w) for o, w in choices.items()),
            ),
        ),
    )


def graph_of(one: Cell) -> Architecture:
    graph = make_supernet().architecture()
    part = graph.parts[0].model_copy(update={"cells": (one,)})
    return graph.model_copy(update={"parts": (part,)})


def kept(
    one: Cell, *, operations: int | None = None, sources: int | None = None
) -> tuple[dict[str, float], dict[int, float]]:
    found = discretize(graph_of(one), operations_kept=operations, sources_kept=sources)
    (cell,) = found.parts[0].cells
    return (
        {c.operation: c.weight for c in cell.edges[0].choices},
        {s.slot: s.weight for s in cell.sources},
    )


CHOICES = {"zero": 0.5, "skip": 0.1, "sep_conv_3x3": 0.25, "dil_conv_3x3": 0.15}
SOURCES = {0: 0.2, 1: 0.5, 2: 0.3}


def test_the_strongest_operation_stays_and_zero_never_wins() -> None:
    found, sources = kept(cell(choices=CHOICES, sources=SOURCES), operations=1)
    assert found == pytest.approx({"sep_conv_3x3": 1.0}) and sources == SOURCES
    found, _ = kept(cell(choices=CHOICES, sources=SOURCES), operations=2)
    assert found == pytest.approx({"sep_conv_3x3": 0.625, "dil_conv_3x3": 0.375})
    found, _ = kept(cell(choices=CHOICES, sources=SOURCES), operations=9)
    assert found == pytest.approx({"skip": 0.2, "sep_conv_3x3": 0.5, "dil_conv_3x3": 0.3})


def test_the_strongest_sources_stay() -> None:
    choices, found = kept(cell(choices=CHOICES, sources=SOURCES), sources=1)
    assert found == pytest.approx({1: 1.0}) and choices == CHOICES
    _, found = kept(cell(choices=CHOICES, sources=SOURCES), sources=2)
    assert found == pytest.approx({1: 0.625, 2: 0.375})


def test_faithful_sums_are_kept() -> None:
    """There operations sum to |O| and sources to 3."""
    many = cell(
        choices={k: 4 * v for k, v in CHOICES.items()},
        sources={k: 3 * v for k, v in SOURCES.items()},
    )
    choices, sources = kept(many, operations=1, sources=1)
    assert choices == pytest.approx({"sep_conv_3x3": 4.0}) and sources == pytest.approx({1: 3.0})


def test_of_equal_ones_the_first_stays_and_dead_ones_go() -> None:
    choices = {"skip": 0.5, "sep_conv_3x3": 0.5, "dil_conv_3x3": 0.0}
    one = cell(choices=choices, sources={0: 0.5, 2: 0.5})
    assert kept(one, operations=1, sources=1) == ({"skip": 1.0}, {0: 1.0})
    assert kept(one, operations=3)[0] == {"skip": 0.5, "sep_conv_3x3": 0.5}


def test_an_edge_of_nothing_but_zero_stays_for_pruning() -> None:
    choices = {"zero": 1.0, "skip": 0.0}
    assert kept(cell(choices=choices, sources=SOURCES), operations=1)[0] == choices


def test_without_limits_nothing_changes() -> None:
    graph = make_supernet(hidden_nodes=2, operations=EVERY).architecture()
    assert discretize(graph, operations_kept=None, sources_kept=None) == graph


def test_cells_without_sources_stay_as_they_are() -> None:
    constant = Cell(layer=5, scale=0, width=8, sources=(), edges=())
    found = discretize(graph_of(constant), operations_kept=1, sources_kept=1)
    assert found.parts[0].cells == (constant,)


def test_a_whole_graph() -> None:
    graph = make_supernet(seed=3, hidden_nodes=2, operations=EVERY).architecture()
    found = discretize(graph, operations_kept=1, sources_kept=2)
    for old, new in zip(graph.parts[0].cells, found.parts[0].cells, strict=True):
        assert len(new.sources) == 2
        assert sum(s.weight for s in new.sources) == pytest.approx(1)
        for before, after in zip(old.edges, new.edges, strict=True):
            real = [c for c in before.choices if c.operation != "zero"]
            strongest = max(real, key=lambda c: c.weight)
            assert [c.operation for c in after.choices] == [strongest.operation]
            assert after.choices[0].weight == pytest.approx(1)
