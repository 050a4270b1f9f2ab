"""Synchronous search: alpha and beta learn with the weights, on the same data (PAPER section 3)."""

from __future__ import annotations

from posefabric.models.supernet import Supernet
from posefabric.search.deciding import Deciding


class Synchronous(Deciding):
    """One Adam step moves weights, alpha and beta."""

    name = "synchronous"

    def parameter_groups(self, network: Supernet) -> list[dict[str, object]]:
        return [
            {
                "params": list(network.arch_parameters().values()),
                "lr": self.config.architecture_learning_rate,
                "weight_decay": 0.0,
            }
        ]

    def schedule(self, network: Supernet, progress: float) -> None:
        super().schedule(network, progress)
        for parameter in network.arch_parameters().values():
            parameter.requires_grad_(self.has_started(progress))
