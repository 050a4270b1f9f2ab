"""Straight-through Gumbel sampling: one operation an edge and one source a cell a step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posefabric.models.supernet import Supernet
from posefabric.search.synchronous import Synchronous


class Gumbel(Synchronous):
    """A single path is drawn anew before each step; evaluation takes the likeliest.

    A step costs what one path costs, and what evaluates is what derivation leaves. The
    temperature of the samples' gradient falls as :class:`Deciding` says. Samples depend on the
    run's seed and the progress alone, so that a resumed run draws the same.
    """

    name = "gumbel"
    _seed = 0

    def prepare(self, network: Supernet, generator: torch.Generator) -> None:
        self._seed = generator.initial_seed()

    def schedule(self, network: Supernet, progress: float) -> None:
        super().schedule(network, progress)
        mixed = np.random.SeedSequence([self._seed, round(progress * 2**40)]).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        for part in network.shapes:
            network.noise[part] = (
                _noise(network.alphas[part], generator),
                _noise(network.betas[part], generator),
            )


def _noise(logits: Tensor, generator: torch.Generator) -> Tensor:
    """-log(-log u), u uniform: adding it to logits and taking the largest draws from softmax."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-7, 1 - 1e-7)
    return -torch.log(-torch.log(uniform)).to(logits)
