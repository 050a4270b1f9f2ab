"""Random architectures: alpha and beta drawn from N(0, 1) and frozen (PAPER section 3)."""

from __future__ import annotations

import torch

from posefabric.derive.draw import draw
from posefabric.models.supernet import Supernet
from posefabric.search.uniform import Uniform


class Random(Uniform):
    """The baseline that every search has to beat; the run's seed decides the draw."""

    name = "random"

    def prepare(self, network: Supernet, generator: torch.Generator) -> None:
        super().prepare(network, generator)
        draw(network, generator)
