"""Random architectures: alpha and beta drawn from N(0, 1), derived, and drawn again if need be."""

from __future__ import annotations

import torch

from posefabric.budget import Budget
from posefabric.config import DeriveConfig
from posefabric.derive.discretize import discretize
from posefabric.derive.fit_budget import number, whole_cost
from posefabric.derive.prune import prune
from posefabric.models.supernet import Supernet
from posefabric.space.architecture import Architecture
from posefabric.space.latency import Table
from posefabric.structures import PosefabricError

BELOW = 0.05  # of a budget: how far under it a draw may lie
DRAWS = 500


def draw(mixture: Supernet, generator: torch.Generator) -> None:
    """Set alpha and beta of a mixture at random (PAPER section 3)."""
    with torch.no_grad():
        for _, parameter in sorted(mixture.arch_parameters().items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def kept(graph: Architecture, settings: DeriveConfig) -> Architecture:
    """What the options of ``derive`` keep of a mixture's graph, pruned; the budget left aside."""
    graph = prune(prune(graph), threshold=settings.threshold)
    if settings.operations_kept is None and settings.sources_kept is None:
        return graph
    return prune(
        discretize(
            graph,
            operations_kept=settings.operations_kept,
            sources_kept=settings.sources_kept,
        )
    )


def draw_within(
    mixture: Supernet,
    generator: torch.Generator,
    settings: DeriveConfig,
    budget: Budget,
    table: Table | None = None,
) -> None:
    """Draw until the derived network costs at most the budget and at least 95 % of it.

    That is every architecture of the space that costs so much, each as likely as its weights are:
    the fair opponent of a search with this budget. Raises PosefabricError, with the costs that
    were seen, after 500 draws.
    """
    costs = []
    for _ in range(DRAWS):
        draw(mixture, generator)
        costs.append(number(whole_cost(kept(mixture.architecture(), settings), table), budget))
        if (1 - BELOW) * budget.limit <= costs[-1] <= budget.limit:
            return
    costs.sort()
    seen = [str(Budget(budget.measure, cost)) for cost in (costs[0], costs[DRAWS // 2], costs[-1])]
    raise PosefabricError(
        f"budget {budget}: of {DRAWS} random architectures none came within {BELOW:.0%} below it; "
        f"they have {seen[0]} to {seen[2]}, half of them at most {seen[1]}; change the budget, or "
        f"derive.operations_kept, derive.sources_kept and derive.threshold"
    )
