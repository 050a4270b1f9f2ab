"""Losses against the same sums by hand, their masks, and where their minimum lies."""

from __future__ import annotations

import math

import pytest
import torch

from posefabric.train.loss import LOSSES, cross_entropy, mean_squared_error


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    return outputs, targets, weights


def test_cross_entropy_by_hand() -> None:
    outputs, targets, weights = draw()
    total = 0.0
    for b in range(2):
        for k in range(3):
            if weights[b, k] == 0:
                continue
            logits, target = outputs[b, k].flatten().tolist(), targets[b, k].flatten().tolist()
            normaliser = math.log(sum(math.exp(v) for v in logits))
            mass = sum(target)
            total -= sum(t / mass * (v - normaliser) for v, t in zip(logits, target, strict=True))
    assert cross_entropy(outputs, targets, weights).item() == pytest.approx(total / 4, rel=1e-12)


def test_mean_squared_error_by_hand() -> None:
    """0.5 x weight x mean over pixels, then mean over keypoints and batch, masked ones too."""
    outputs, targets, weights = draw()
    total = 0.0
    for b in range(2):
        for k in range(3):
            squares = [float(v) ** 2 for v in (outputs - targets)[b, k].flatten()]
            total += 0.5 * float(weights[b, k]) * sum(squares) / 20
    found = mean_squared_error(outputs, targets, weights).item()
    assert found == pytest.approx(total / 6, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_keypoints_without_weight_have_no_say(name: str) -> None:
    outputs, targets, weights = draw()
    outputs.requires_grad_()
    loss = LOSSES[name](outputs, targets, weights)
    loss.backward()
    assert outputs.grad is not None
    silent = weights == 0
    assert (outputs.grad[silent] == 0).all() and (outputs.grad[~silent] != 0).any()
    changed = torch.where(silent[..., None, None], 9.0, outputs.detach())
    assert LOSSES[name](changed, targets, weights).item() == loss.item()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_any_keypoint_costs_nothing(name: str) -> None:
    outputs, _, weights = draw()
    outputs.requires_grad_()
    loss = LOSSES[name](outputs, torch.zeros_like(outputs), torch.zeros_like(weights))
    loss.backward()
    assert loss.item() == 0.0 and outputs.grad is not None and not outputs.grad.any()


def test_the_minimum_of_cross_entropy_is_the_log_target() -> None:
    """There the loss is the target's entropy, its gradient zero, and any step away costs."""
    _, targets, weights = draw()
    outputs = targets.log().requires_grad_()
    loss = cross_entropy(outputs, targets, weights)
    loss.backward()
    assert outputs.grad is not None and outputs.grad.abs().max() < 1e-15
    p = targets / targets.sum((2, 3), keepdim=True)
    entropy = (-(p * p.log()).sum((2, 3)) * weights).sum() / weights.sum()
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-12)
    for seed in range(5):
        noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
        assert cross_entropy(outputs.detach() + 0.1 * noise, targets, weights) > loss
    # A constant added to all logits of a keypoint changes nothing.
    moved = cross_entropy(outputs.detach() + 3, targets, weights)
    assert moved.item() == pytest.approx(loss.item(), rel=1e-12)
