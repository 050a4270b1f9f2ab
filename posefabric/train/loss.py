"""Losses on heatmaps; keypoints without annotation weigh nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posefabric.distributed import summed


def cross_entropy(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy over a keypoint's pixels against the normalised Gaussian.

    Args: outputs, targets (B, K, h, w), weights (B, K). Mean over the weighted keypoints.
    """
    targets = targets.flatten(2)
    targets = targets / targets.sum(-1, keepdim=True).clamp(min=1e-6)
    losses = -(targets * outputs.flatten(2).log_softmax(-1)).sum(-1)
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def mean_squared_error(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """0.5 x weight x mean over pixels, then mean over keypoints and batch (PAPER section 2)."""
    losses = 0.5 * weights * (outputs - targets).square().flatten(2).mean(-1)
    return losses.mean()


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "mse": mean_squared_error,
}

# What each of them divides its sum by, of weights (B, K).
COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda weights: weights.sum(),
    "mse": lambda weights: torch.full_like(weights[0, 0], weights.numel()),
}


def make_loss(name: str) -> Loss:
    """The loss ``name`` of the batch of all ranks: this rank's share of it.

    Shares add up to the loss of the whole batch, and their gradients to its gradient, however
    unevenly annotated keypoints are spread. In one process it is the loss itself.
    """
    return lambda outputs, targets, weights: loss_share(name, weights)(outputs, targets, weights)


def loss_share(name: str, weights: Tensor) -> Loss:
    """The loss ``name`` of some of a batch's keypoints, as their share of the whole batch's.

    Args: weights (B, K) of all keypoints of this rank's persons; with several ranks a collective.
    """
    loss, count = LOSSES[name], COUNTS[name]
    whole = summed([count(weights)])[0]

    def share(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        own = count(weights)
        return loss(outputs, targets, weights) * (own.clamp(min=1) / whole.clamp(min=1))

    return share
