"""From soft weights to few choices: the strongest operations and sources are kept."""

from __future__ import annotations

from collections.abc import Sequence

from posefabric.space.architecture import Architecture, Cell, Edge


def discretize(
    graph: Architecture, *, operations_kept: int | None, sources_kept: int | None
) -> Architecture:
    """Keep at most so many operations an edge and sources a cell, the sums unchanged.

    The operation ``zero`` never wins (as in DARTS); its weight goes to those that stay. Not
    lossless unless the rest weighed nothing: fine-tune after it.
    """
    fabrics = {}
    for part in graph.fabrics:
        cells = tuple(_discretize_cell(cell, operations_kept, sources_kept) for cell in part.cells)
        fabrics[part.name] = part.model_copy(update={"cells": cells})
    return graph.with_fabrics(fabrics)


def _discretize_cell(cell: Cell, operations_kept: int | None, sources_kept: int | None) -> Cell:
    edges = cell.edges
    if operations_kept is not None:
        edges = tuple(_strongest_operations(edge, operations_kept) for edge in edges)
    sources = cell.sources
    if sources_kept is not None and sources:
        rows = _strongest([source.weight for source in sources], sources_kept)
        factor = sum(s.weight for s in sources) / sum(sources[i].weight for i in rows)
        sources = tuple(
            sources[i].model_copy(update={"weight": sources[i].weight * factor}) for i in rows
        )
    return cell.model_copy(update={"edges": edges, "sources": sources})


def _strongest_operations(edge: Edge, kept: int) -> Edge:
    real = [choice for choice in edge.choices if choice.operation != "zero" and choice.weight > 0]
    if not real:
        return edge
    rows = _strongest([choice.weight for choice in real], kept)
    factor = sum(c.weight for c in edge.choices) / sum(real[i].weight for i in rows)
    choices = tuple(real[i].model_copy(update={"weight": real[i].weight * factor}) for i in rows)
    return edge.model_copy(update={"choices": choices})


def _strongest(weights: Sequence[float], kept: int) -> list[int]:
    """Rows of the largest weights, in their own order; of equal ones the first."""
    ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    return sorted(i for i in ranked[:kept] if weights[i] > 0)
