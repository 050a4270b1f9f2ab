"""The contract between the training loop and what searches an architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Strategy:
    """How alpha and beta move while a network trains; this one lets them rest.

    Plain training uses it as it is, searches override what they need.
    """

    name = "none"

    def prepare(self, network: Any, generator: torch.Generator) -> None:
        """Once before the first step: set, draw or freeze alpha and beta."""

    def parameter_groups(self, network: Any) -> list[dict[str, object]]:
        """Groups of architecture parameters for the weights' optimiser; none if they rest."""
        return []

    def schedule(self, network: Any, progress: float) -> None:
        """Before each step: set temperatures and the like from ``progress`` in 0..1."""

    def penalty(self, network: Any, progress: float) -> Tensor | None:
        """A scalar added to the loss, or nothing."""
        return None

    def readings(self, network: Any) -> dict[str, float]:
        """What to show and log of the architecture: its entropies."""
        return {}
