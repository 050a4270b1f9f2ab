"""Beta-decay: a penalty on the logits' log-sum-exp keeps an early lead from running away."""

from __future__ import annotations

import torch
from torch import Tensor

from posefabric.models.supernet import Supernet
from posefabric.search.synchronous import Synchronous


class BetaDecay(Synchronous):
    """beta-DARTS (Ye et al., 2022): mean log-sum-exp of alpha and beta, weight rising from 0."""

    name = "beta_decay"

    def penalty(self, network: Supernet, progress: float) -> Tensor | None:
        below = super().penalty(network, progress)
        parts = list(network.shapes)
        rows = [network.alphas[part].logsumexp(-1).flatten() for part in parts]
        rows += [network.source_logits(part).logsumexp(-1) for part in parts]
        decay = progress * self.config.beta_decay_weight * torch.cat(rows).mean()
        return decay if below is None else below + decay
