"""Losses on heatmaps; keypoints without annotation weigh nothing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


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


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mean_squared_error,
}
