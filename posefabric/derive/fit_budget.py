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
from posefabric.run import RunFolder
from posefabric.space.architecture import Architecture, Cell, Edge, Part
from posefabric.space.cost import Cost, fabrics_cost, part_cost
from posefabric.space.latency import TABLE_NAME, LatencyTable, Piece, Table
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


def latency_table(run: RunFolder, budget: str | None) -> LatencyTable | None:
    """The search run's own table, where a budget is on latency; PosefabricError where it has none.

    ``posefabric search`` and ``posefabric derive`` have it measured; see deploy/latency.py.
    """
    if budget is None or Budget.parse(budget).measure != "latency":
        return None
    return LatencyTable.load(run.path / TABLE_NAME)


def backbone_piece(graph: Architecture) -> Piece:
    """The graph's backbone, cut as it says; of a fabric backbone what is before its cells."""
    width, height = graph.input_wh
    own = graph.backbone
    return Piece("backbone", own.name, 3, len(own.channels), (height, width))


def whole_cost(graph: Architecture, table: Table | None = None) -> Cost:
    """Backbone, fabrics and heads of a graph: what one picture takes, and parameters."""
    own, fabrics = graph.backbone, fabrics_cost(graph, table)
    if own.fabric is None:
        cost = backbone_cost(own.name, len(own.channels), graph.input_wh)
        return fabrics + cost.timed(backbone_piece(graph), table)
    backbone = build_compact(graph).backbone.eval()
    images = torch.zeros(1, 3, graph.input_wh[1], graph.input_wh[0])
    with torch.no_grad():
        macs = count_macs(lambda: backbone.stem(images))  # type: ignore[operator]
    stem = sum(p.numel() for p in backbone.stem.parameters() if p.ndim > 1)  # type: ignore[union-attr]
    return fabrics + Cost(macs, stem).timed(backbone_piece(graph), table)


def fit_budget(graph: Architecture, budget: Budget, table: Table | None = None) -> Architecture:
    """Drop choices and sources, the smallest share for its cost first, until the graph fits.

    Each edge keeps one operation and each cell one source; the sums of weights stay. The result
    is pruned. ``table`` has the milliseconds that a latency budget is on.

    Raises PosefabricError when the least that can be left still exceeds the budget.
    """
    graph = prune(graph)
    fabrics = {part.name: part for part in graph.fabrics}
    steps = {name: _best_step(part, graph, budget, table) for name, part in fabrics.items()}
    while number(whole_cost(graph, table), budget) > budget.limit:
        best = min((step for step in steps.values() if step), key=lambda s: s[0], default=None)
        if best is None:
            cost = whole_cost(graph, table)
            timed = f", and takes {cost.ms:.2f} ms by the table" if table is not None else ""
            raise PosefabricError(
                f"budget={budget}: the smallest network of this search has "
                f"{cost.macs / 1e6:.1f} M multiply-adds and {cost.params / 1e6:.2f} M parameters"
                f"{timed}; raise the budget, or search with a smaller model.channel_factor, "
                f"data.input_wh or backbone"
            )
        name = best[1].name
        fabrics[name] = best[1]
        steps[name] = _best_step(best[1], graph, budget, table)
        graph = cut_backbone(graph.with_fabrics(fabrics))
    return graph


def number(cost: Cost, budget: Budget) -> float:
    """The number of a cost that a budget is on."""
    return float(budget.of(cost.macs, cost.params, cost.ms))


def _best_step(
    part: Part, graph: Architecture, budget: Budget, table: Table | None
) -> tuple[float, Part] | None:
    """The part without what weighs least for its cost, and that share for its cost."""
    now, best = number(part_cost(part, graph, table), budget), None
    for share, smaller in _without_one(part, graph):
        saved = now - number(part_cost(smaller, graph, table), budget)
        if saved > 0 and (best is None or share / saved < best[0]):
            best = share / saved, smaller
    return best


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
