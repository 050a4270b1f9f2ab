"""What drives a mixture to decisions: a late start, a falling temperature, penalties."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posefabric.budget import Budget
from posefabric.config import SearchConfig
from posefabric.derive.fit_budget import whole_cost
from posefabric.derive.prune import prune
from posefabric.models.supernet import Supernet
from posefabric.search.cost import ExpectedCost
from posefabric.space.latency import LatencyTable
from posefabric.train.strategy import Strategy


class Deciding(Strategy):
    """What strategies share that move alpha and beta; all of it is off by default.

    Past the paper: alpha and beta rest until ``architecture_start`` of the search, so that
    convolutions have learned something before a skip beats them; and, so that something can be
    pruned at the end, the temperature falls geometrically from 1 to ``temperature_end`` and a
    penalty on the Gini impurity of operations and sources rises to ``sparsity`` and
    ``source_sparsity``, all from ``sparsity_start`` on.
    With ``budget`` the expected cost's share above it is punished too, rising likewise; ``table``
    has the milliseconds of a latency budget.
    """

    def __init__(self, config: SearchConfig, table: LatencyTable | None = None) -> None:
        self.config = config
        self.table = table
        self._expected: ExpectedCost | None = None

    def has_started(self, progress: float) -> bool:
        return progress >= self.config.architecture_start

    def schedule(self, network: Supernet, progress: float) -> None:
        temperature = math.exp(math.log(self.config.temperature_end) * self._share(progress))
        network.get_buffer("temperature").fill_(temperature)

    def penalty(self, network: Supernet, progress: float) -> Tensor | None:
        share, config = self._share(progress), self.config
        terms = []
        if config.sparsity or config.source_sparsity:
            alpha, beta = network.indecision()
            terms.append(config.sparsity * alpha + config.source_sparsity * beta)
        expected = self._expected_cost(network)
        if expected is not None and config.budget_weight:
            over = (expected(network) / expected.budget.limit - 1).clamp(min=0)
            terms.append(config.budget_weight * over)
        return share * torch.stack(terms).sum() if share and terms else None

    def readings(self, network: Supernet) -> dict[str, float]:
        found = network.entropies()
        # What a step computes forward: everything that weighs something.
        found["mixture_macs"] = whole_cost(prune(network.architecture())).macs
        expected = self._expected_cost(network)
        if expected is not None:
            with torch.no_grad():
                found[f"expected_{expected.budget.measure}"] = float(expected(network))
        return found

    def _expected_cost(self, network: Supernet) -> ExpectedCost | None:
        if self.config.budget is None:
            return None
        if self._expected is None:
            budget = Budget.parse(self.config.budget)
            self._expected = ExpectedCost(network, budget, self.table)
        return self._expected

    def _share(self, progress: float) -> float:
        start = self.config.sparsity_start
        return min(1.0, max(0.0, (progress - start) / (1.0 - start)))
