"""Lossless pruning: what weighs exactly nothing, and what nothing reads, goes."""

from __future__ import annotations

from collections.abc import Sequence

from posefabric.space.architecture import Architecture, Backbone, Cell, Edge, Part
from posefabric.space.fabric import pyramid_scales


def prune(graph: Architecture, *, threshold: float = 0.0) -> Architecture:
    """The graph without choices and sources of weight zero, and without unreached cells.

    A border copy is a source like any other and stays as long as it weighs something. With
    ``threshold`` above 0, choices and sources with a smaller share of their edge or cell go
    too, the others keep the sum; that is no longer lossless.
    """
    parts = tuple(prune_part(part, threshold=threshold) for part in graph.parts)
    return cut_backbone(graph.model_copy(update={"parts": parts}), threshold=threshold)


def cut_backbone(graph: Architecture, *, threshold: float = 0.0) -> Architecture:
    """The graph with its backbone cut after the deepest level that a part reads.

    A fabric backbone is pruned as a part is, with the levels that are read as its outputs.
    """
    scales = _levels_read(graph)
    levels = max(scales) + 1
    fabric = graph.backbone.fabric
    if fabric is not None:
        fabric = prune_part(fabric, threshold=threshold, outputs=scales)
    channels = graph.backbone.channels[:levels]
    backbone = Backbone(name=graph.backbone.name, channels=channels, fabric=fabric)
    return graph.model_copy(update={"backbone": backbone})


def output_scales(fabric: Part, graph: Architecture) -> tuple[int, ...]:
    """The scales of a fabric's last layer that are read: the finest, or a backbone's levels."""
    return _levels_read(graph) if fabric is graph.backbone.fabric else (0,)


def _levels_read(graph: Architecture) -> tuple[int, ...]:
    scales = [s for part in graph.parts for s in pyramid_scales(part, graph.first_layer)]
    return tuple(scales) or (0,)


def prune_part(part: Part, *, threshold: float = 0.0, outputs: Sequence[int] = (0,)) -> Part:
    """One fabric pruned as :func:`prune` says; ``outputs``: the last layer's scales to keep."""
    cells = [_prune_cell(cell, threshold) for cell in part.cells]
    last = cells[-1].layer
    needed = {(last, scale) for scale in outputs}
    for cell in reversed(cells):
        if (cell.layer, cell.scale) in needed:
            needed.update((cell.layer - 1, source.scale) for source in cell.sources)
    kept = tuple(cell for cell in cells if (cell.layer, cell.scale) in needed)
    return part.model_copy(update={"cells": kept})


def _prune_cell(cell: Cell, threshold: float) -> Cell:
    edges = []
    for edge in cell.edges:
        kept = [
            choice
            for choice, weight in zip(
                edge.choices, shares([c.weight for c in edge.choices], threshold), strict=True
            )
            for choice in [choice.model_copy(update={"weight": weight})]
            if weight > 0 and choice.operation != "zero"
        ]
        if kept:
            edges.append(Edge(start=edge.start, end=edge.end, choices=tuple(kept)))
    if not edges:
        # What is left of the cell is a constant: its bias, normalised.
        return cell.model_copy(update={"edges": (), "sources": ()})
    weights = shares([source.weight for source in cell.sources], threshold)
    sources = tuple(
        source.model_copy(update={"weight": weight})
        for source, weight in zip(cell.sources, weights, strict=True)
        if weight > 0
    )
    return cell.model_copy(update={"edges": tuple(edges), "sources": sources})


def shares(weights: list[float], threshold: float) -> list[float]:
    """Weights with those below ``threshold`` of their sum set to 0 and the sum restored."""
    total = sum(weights)
    if threshold <= 0 or total <= 0:
        return list(weights)
    limit = min(threshold, max(weights) / total)
    kept = [weight if weight / total >= limit else 0.0 for weight in weights]
    return [weight * total / sum(kept) for weight in kept]
