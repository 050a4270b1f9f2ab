"""Perturbation-based selection: an option is worth what the loss loses without it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from posefabric.distributed import summed
from posefabric.models.supernet import Supernet
from posefabric.search.bilevel import FirstOrder
from posefabric.search.closing import Choice, all_choices, decided_share, left_open
from posefabric.train.strategy import Evidence


class Perturbation(FirstOrder):
    """DARTS-PT (Wang et al., 2021): alpha and beta rest, and say nothing of an option's worth.

    From ``architecture_start`` to ``decided_by`` of the search, in an order drawn from the run's
    seed, one choice after another is decided on held-out persons: each open option is taken out in
    turn, the ``operations_left`` or ``sources_left`` without which the loss is highest stay (never
    ``zero``), the others are closed, and the weights train on until the next decision. The losses
    of a decision are of the same batch.
    """

    name = "perturbation"
    _seed = 0

    def prepare(self, network: Supernet, generator: torch.Generator) -> None:
        super().prepare(network, generator)
        self._seed = generator.initial_seed()

    def architecture_gradients(
        self, network: Supernet, evidence: Evidence, progress: float
    ) -> tuple[Tensor, list[Tensor]] | None:
        choices = self._in_order(network)
        undecided = [
            c for c in choices if self._has_too_many(network, c, len(c.open_options(network)))
        ]
        decided = len(choices) - len(undecided)
        due = math.ceil(decided_share(self.config, progress) * len(choices)) - decided
        for choice in undecided[: max(0, due)]:
            self._decide(network, choice, evidence)
        return None

    def _in_order(self, network: Supernet) -> list[Choice]:
        """Every choice that has something to decide, in the run's order."""
        choices = all_choices(network)
        order = np.random.default_rng([self._seed % 2**63, 0]).permutation(len(choices))
        drawn = [choices[place] for place in order]
        return [c for c in drawn if self._has_too_many(network, c, c.existing(network))]

    def _has_too_many(self, network: Supernet, choice: Choice, options: int) -> bool:
        return options > left_open(network, choice, self.config)

    def _decide(self, network: Supernet, choice: Choice, evidence: Evidence) -> None:
        options, losses = choice.open_options(network), []
        for option in options:
            with choice.without(network, option), torch.no_grad():
                losses.append(evidence.loss_of(evidence.held_out))
        # Every rank decides by the loss of the whole batch.
        whole = torch.stack(summed(losses))
        if not bool(torch.isfinite(whole).all()):
            return  # the next step tries again
        worth = [
            -math.inf if choice.is_zero(network, option) else float(loss)
            for option, loss in zip(options, whole, strict=True)
        ]
        ranked = sorted(range(len(options)), key=lambda i: worth[i], reverse=True)
        for place in ranked[left_open(network, choice, self.config) :]:
            choice.close(network, options[place])
