"""No search: alpha and beta stay at zero, every choice weighs the same (PAPER: none)."""

from __future__ import annotations

from typing import Any

import torch

from posefabric.models.supernet import Supernet
from posefabric.train.strategy import Strategy


class Uniform(Strategy):
    """Alpha and beta rest where they are."""

    name = "uniform"

    def prepare(self, network: Any, generator: torch.Generator) -> None:
        for parameter in network.arch_parameters().values():
            parameter.requires_grad_(False)

    def readings(self, network: Supernet) -> dict[str, float]:
        return network.entropies()
