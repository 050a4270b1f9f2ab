"""Partial channels: at first a step computes the candidates on a share of the channels only."""

from __future__ import annotations

import numpy as np
import torch

from posefabric.models.partial import PartialCell, partial_path
from posefabric.models.supernet import Supernet
from posefabric.search.synchronous import Synchronous


class PartialChannels(Synchronous):
    """PC-DARTS (Xu et al., 2020), without its edge weights, and with weights that are kept.

    Until ``partial_until`` of the search, each step draws ``partial_share`` of every cell's
    channels; its candidates see these, the others pass by the edge unchanged. A step then costs
    and remembers less, and no candidate without weights gains from seeing all. From then on the
    search is synchronous, so that what derivation keeps has been trained as it is used. Draws
    depend on the run's seed and the progress alone, so that a resumed run draws the same.
    """

    name = "partial_channels"
    _seed = 0
    _cells: list[PartialCell]

    def prepare(self, network: Supernet, generator: torch.Generator) -> None:
        super().prepare(network, generator)
        self._seed = generator.initial_seed()
        self._cells = partial_path(network)

    def schedule(self, network: Supernet, progress: float) -> None:
        super().schedule(network, progress)
        if progress >= self.config.partial_until:
            for cell in self._cells:
                cell.channels = None
            return
        mixed = np.random.SeedSequence([self._seed, round(progress * 2**40)]).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        for cell in self._cells:
            width = cell.graph.width  # type: ignore[attr-defined]
            count = max(1, round(width * self.config.partial_share))
            drawn = torch.randperm(width, generator=generator)[:count].sort().values
            cell.channels = drawn.to(network.get_buffer("temperature").device)

    def readings(self, network: Supernet) -> dict[str, float]:
        found = super().readings(network)
        if any(cell.channels is not None for cell in self._cells):
            # It is of whole candidates, which these steps do not compute.
            found.pop("mixture_macs")
        return found
