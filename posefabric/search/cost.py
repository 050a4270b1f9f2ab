"""What a mixture is expected to cost, differentiable by alpha and beta."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posefabric.budget import Budget
from posefabric.derive.fit_budget import number, whole_cost
from posefabric.models.supernet import Supernet
from posefabric.space.architecture import Architecture, Cell, Part
from posefabric.space.cost import (
    fabrics_cost,
    head_cost,
    keep_cost,
    map_size,
    operation_cost,
    reduce_cost,
    source_cost,
)
from posefabric.space.fabric import level_widths
from posefabric.space.latency import Table


@dataclass(frozen=True)
class _PartTable:
    """Costs of a part's pieces in the order of alpha and beta, in the budget's measure.

    Attributes:
        operations (cells, operations) of one edge, sources (cells, 3), keep (cells,),
        reduce (levels,), head: numbers of the budget's measure.
        feeds: cell row to the (reader's row, slot) that read it.
        levels: level to the same.
    """

    operations: Tensor
    sources: Tensor
    keep: Tensor
    reduce: dict[int, float]
    head: float
    feeds: dict[int, list[tuple[int, int]]]
    levels: dict[int, list[tuple[int, int]]]
    outputs: set[int]


class ExpectedCost:
    """Sum over parts, edges and connections of probability times cost.

    A cell costs as much of itself as it is likely to be read: 1 minus the product, over the cells
    that may read it, of 1 minus their own likelihood times the probability of that source. The
    rest (backbone, heads) is a constant.
    """

    def __init__(self, network: Supernet, budget: Budget, table: Table | None = None) -> None:
        self.budget, self.table = budget, table
        graph = network.graph
        self.tables = {part.name: _table(part, graph, budget, table) for part in graph.fabrics}
        rest = whole_cost(graph, table) - fabrics_cost(graph, table)
        self.constant = number(rest, budget)

    def __call__(self, network: Supernet) -> Tensor:
        """A scalar in the budget's measure: multiply-adds or ms of a picture, or parameters."""
        parts = [self.of_part(network, name) for name in self.tables]
        return torch.stack(parts).sum() + self.constant

    def of_part(self, network: Supernet, name: str) -> Tensor:
        """The expected cost of one part with its head."""
        return self.of_weights(name, *network.probabilities(name))

    def of_weights(self, name: str, alpha: Tensor, beta: Tensor) -> Tensor:
        """(...): the cost of a part whose options are taken with these probabilities.

        ``alpha`` (..., cells or 1, edges, operations), ``beta`` (..., cells, 3). Ones for what is
        open and zeros for the rest give what a network that keeps all of it costs.
        """
        table, device = self.tables[name], alpha.device
        alpha, beta = alpha.cpu(), beta.cpu()
        live = _liveness(table, beta)
        cells = table.operations.shape[0]
        alpha = alpha.expand(*alpha.shape[:-3], cells, -1, -1)
        each = (alpha * table.operations[:, None]).sum((-1, -2)) + (beta * table.sources).sum(-1)
        total = (torch.stack(live, -1) * (each + table.keep)).sum(-1)
        for level, cost in table.reduce.items():
            total = total + cost * _read(table.levels[level], live, beta)
        return (total + table.head).to(device)


def _liveness(table: _PartTable, beta: Tensor) -> list[Tensor]:
    count = table.operations.shape[0]
    live: list[Tensor] = [beta.new_ones(beta.shape[:-2])] * count
    for row in reversed(range(count)):
        if row not in table.outputs:
            live[row] = _read(table.feeds[row], live, beta)
    return live


def _read(readers: list[tuple[int, int]], live: list[Tensor], beta: Tensor) -> Tensor:
    """The probability that one of the readers is live and takes this source."""
    none = beta.new_ones(beta.shape[:-2])
    for row, slot in readers:
        none = none * (1 - live[row] * beta[..., row, slot])
    return 1 - none


def _table(part: Part, graph: Architecture, budget: Budget, table: Table | None) -> _PartTable:
    rows = {(cell.layer, cell.scale): row for row, cell in enumerate(part.cells)}
    widths, of_backbone = level_widths(part), part is graph.backbone.fabric
    first, last = min(layer for layer, _ in rows), max(layer for layer, _ in rows)
    sources = torch.zeros(len(rows), 3)
    feeds: dict[int, list[tuple[int, int]]] = {row: [] for row in rows.values()}
    levels: dict[int, list[tuple[int, int]]] = {}
    for row, cell in enumerate(part.cells):
        for source in cell.sources:
            cost = source_cost(
                source.kind,
                widths[source.scale],
                cell.width,
                map_size(graph.input_wh, source.scale),
                table,
            )
            sources[row, source.slot] += number(cost, budget)
            reader = (row, source.slot)
            if cell.layer == first:
                levels.setdefault(source.scale, []).append(reader)
            else:
                feeds[rows[cell.layer - 1, source.scale]].append(reader)
    reduce = {} if of_backbone else {
        level: number(
            reduce_cost(part, graph.backbone.channels[level], level, graph.input_wh, table), budget
        )
        for level in levels
    }  # fmt: skip
    return _PartTable(
        operations=torch.tensor([_operations(cell, graph, budget, table) for cell in part.cells]),
        sources=sources,
        keep=torch.tensor(
            [
                number(keep_cost(c, map_size(graph.input_wh, c.scale), table), budget)
                for c in part.cells
            ]
        ),
        reduce=reduce,
        head=0.0 if of_backbone else number(head_cost(part, graph, table), budget),
        feeds=feeds,
        levels=levels,
        outputs={row for (layer, _), row in rows.items() if layer == last},
    )


def _operations(
    cell: Cell, graph: Architecture, budget: Budget, table: Table | None
) -> list[float]:
    size = map_size(graph.input_wh, cell.scale)
    names = [choice.operation for choice in cell.edges[0].choices]
    return [number(operation_cost(name, cell.width, size, table), budget) for name in names]
