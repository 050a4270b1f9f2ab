"""From soft weights to a network inside a budget: what weighs least for its cost goes first."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from posefabric.budget import Budget
from posefabric.derive.prune import cut_backbone, output_scales, prune, prune_part
from posefabric.evaluate.profile import count_macs
from posefabric.models.backbones import make_backbone
from posefabric.models.compact import build_compact
from posefabric.space.architecture import Architecture, Cell, Edge, Part
from posefabric.space.cost import Cost, fabrics_cost, part_cost
from posefabric.structures import PosefabricError


@functools.lru_cache(maxsize=64)
def backbone_cost(name: str, levels: int, input_wh: tuple[int, int]) -> Cost:
    """A backbone cut to its ``levels`` first strides, its batch norms folded."""
    backbone = make_backbone(name, levels=levels).eval()
    images = torch.zeros(1, 3, input_wh[1], input_wh[0])
    with torch.no_grad():
        macs = count_macs(lambda: backbone(images))
    # Of a batch norm's two vectors one is left: the convolution's bias.
    folded = sum(p.numel() / (2 if p.ndim == 1 else 1) for p in backbone.parameters())
    return Cost(macs, round(folded))


def whole_cost(graph: Architecture) -> Cost:
    """Backbone, fabrics and heads of a graph: one picture's multiply-adds, and parameters."""
    own = graph.backbone
    if own.fabric is None:
        return fabrics_cost(graph) + backbone_cost(own.name, len(own.channels), graph.input_wh)
    backbone = build_compact(graph).backbone.eval()
    images = torch.zeros(1, 3, graph.input_wh[1], graph.input_wh[0])
    with torch.no_grad():
        macs = count_macs(lambda: backbone.stem(images))  # type: ignore[operator]
    stem = sum(p.numel() for p in backbone.stem.parameters() if p.ndim > 1)  # type: ignore[union-attr]
    return fabrics_cost(graph) + Cost(macs, stem)


def fit_budget(graph: Architecture, budget: Budget) -> Architecture:
    """Drop choices and sources, the smallest share for its cost first, until the graph fits.

    Each edge keeps one operation and each cell one source; the sums of weights stay. The result
    is pruned.

    Raises PosefabricError when the least that can be left still exceeds the budget.
    """
    graph = prune(graph)
    fabrics = {part.name: part for part in graph.fabrics}
    steps = {name: _best_step(part, graph, budget) for name, part in fabrics.items()}
    while budget.of(*_pair(whole_cost(graph))) > budget.limit:
        best = min((step for step in steps.values() if step), key=lambda s: s[0], default=None)
        if best is None:
            cost = whole_cost(graph)
            raise PosefabricError(
                f"budget={budget}: the smallest network of this search has "
                f"{cost.macs / 1e6:.1f} M multiply-adds and {cost.params / 1e6:.2f} M parameters; "
                f"raise the budget, or search with a smaller model.channel_factor, "
                f"data.input_wh or backbone"
            )
        name = best[1].name
        fabrics[name] = best[1]
        steps[name] = _best_step(best[1], graph, budget)
        graph = cut_backbone(graph.with_fabrics(fabrics))
    return graph


def _best_step(part: Part, graph: Architecture, budget: Budget) -> tuple[float, Part] | None:
    """The part without what weighs least for its cost, and that share for its cost."""
    now, best = _part_number(part, graph, budget), None
    for share, smaller in _without_one(part, graph):
        saved = now - _part_number(smaller, graph, budget)
        if saved > 0 and (best is None or share / saved < best[0]):
            best = share / saved, smaller
    return best


def _pair(cost: Cost) -> tuple[int, int]:
    return cost.macs, cost.params


def _part_number(part: Part, graph: Architecture, budget: Budget) -> float:
    return budget.of(*_pair(part_cost(part, graph)))


def _without_one(part: Part, graph: Architecture) -> Iterator[tuple[float, Part]]:
    """The part with one choice or source less, and the share of its edge or cell that went."""
    outputs = output_scales(part, graph)
    for row, cell in enumerate(part.cells):
        for share, smaller in (*_fewer_sources(cell), *_fewer_choices(cell)):
            cells = (*part.cells[:row], smaller, *part.cells[row + 1 :])
            yield share, prune_part(part.model_copy(update={"cells": cells}), outputs=outputs)


def _fewer_sources(cell: Cell) -> Iterator[tuple[float, Cell]]:
    total = sum(source.weight for source in cell.sources)
    for row, source in enumerate(cell.sources):
        if len(cell.sources) > 1 and source.weight < total:
            factor = total / (total - source.weight)
            kept = [s for i, s in enumerate(cell.sources) if i != row]
            sources = tuple(s.model_copy(update={"weight": s.weight * factor}) for s in kept)
            yield source.weight / total, cell.model_copy(update={"sources": sources})


def _fewer_choices(cell: Cell) -> Iterator[tuple[float, Cell]]:
    for place, edge in enumerate(cell.edges):
        total = sum(choice.weight for choice in edge.choices)
        for row, choice in enumerate(edge.choices):
            if len(edge.choices) > 1 and choice.weight < total:
                factor = total / (total - choice.weight)
                kept = [c for i, c in enumerate(edge.choices) if i != row]
                choices = tuple(c.model_copy(update={"weight": c.weight * factor}) for c in kept)
                smaller = Edge(start=edge.start, end=edge.end, choices=choices)
                edges = (*cell.edges[:place], smaller, *cell.edges[place + 1 :])
                yield choice.weight / total, cell.model_copy(update={"edges": edges})
