"""Synchronous search: alpha and beta learn with the weights, on the same data (PAPER section 3)."""

from __future__ import annotations

import math

from torch import Tensor

from posefabric.config import SearchConfig
from posefabric.models.supernet import Supernet
from posefabric.train.strategy import Strategy


class Synchronous(Strategy):
    """One Adam step moves weights, alpha and beta.

    Past the paper: alpha and beta rest until ``architecture_start`` of the search, so that
    convolutions have learned something before a skip beats them; and, so that something can be
    pruned at the end, the temperature falls geometrically from 1 to ``temperature_end`` and a
    penalty on the Gini impurity of operations and sources rises to ``sparsity`` and
    ``source_sparsity``, all from ``sparsity_start`` on.
    """

    name = "synchronous"

    def __init__(self, config: SearchConfig) -> None:
        self.config = config

    def parameter_groups(self, network: Supernet) -> list[dict[str, object]]:
        return [
            {
                "params": list(network.arch_parameters().values()),
                "lr": self.config.architecture_learning_rate,
                "weight_decay": 0.0,
            }
        ]

    def schedule(self, network: Supernet, progress: float) -> None:
        for parameter in network.arch_parameters().values():
            parameter.requires_grad_(progress >= self.config.architecture_start)
        temperature = math.exp(math.log(self.config.temperature_end) * self._share(progress))
        network.get_buffer("temperature").fill_(temperature)

    def penalty(self, network: Supernet, progress: float) -> Tensor | None:
        share = self._share(progress)
        if share == 0 or not (self.config.sparsity or self.config.source_sparsity):
            return None
        alpha, beta = network.indecision()
        return share * (self.config.sparsity * alpha + self.config.source_sparsity * beta)

    def readings(self, network: Supernet) -> dict[str, float]:
        return network.entropies()

    def _share(self, progress: float) -> float:
        start = self.config.sparsity_start
        return min(1.0, max(0.0, (progress - start) / (1.0 - start)))
