"""What drives a mixture to decisions: a late start, a falling temperature, a penalty on doubt."""

from __future__ import annotations

import math

from torch import Tensor

from posefabric.config import SearchConfig
from posefabric.models.supernet import Supernet
from posefabric.train.strategy import Strategy


class Deciding(Strategy):
    """What strategies share that move alpha and beta; all of it is off by default.

    Past the paper: alpha and beta rest until ``architecture_start`` of the search, so that
    convolutions have learned something before a skip beats them; and, so that something can be
    pruned at the end, the temperature falls geometrically from 1 to ``temperature_end`` and a
    penalty on the Gini impurity of operations and sources rises to ``sparsity`` and
    ``source_sparsity``, all from ``sparsity_start`` on.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.config = config

    def has_started(self, progress: float) -> bool:
        return progress >= self.config.architecture_start

    def schedule(self, network: Supernet, progress: float) -> None:
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
