"""Parameter groups, learning-rate schedules and averaged weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from networks import make_supernet
from torch import nn

from posefabric.config import OptimConfig
from posefabric.train.optim import (
    AveragedWeights,
    clip,
    head_factor,
    make_optimiser,
    rate_factor,
    set_rate,
    weight_groups,
)


def test_groups_part_the_weights() -> None:
    network = make_supernet()
    for parameter in network.backbone.body.conv_stem.parameters():
        parameter.requires_grad_(False)
    config = OptimConfig(learning_rate=0.1, backbone_factor=0.5, weight_decay=0.01)
    groups = weight_groups(network, config)
    found: dict[int, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:  # type: ignore[attr-defined]
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr"], group["weight_decay"])  # type: ignore[assignment]
    for name, parameter in network.named_parameters():
        resting = "conv_stem" in name or name.startswith(("alphas", "betas"))
        if resting:
            assert id(parameter) not in found, name
            continue
        rate, decay = found[id(parameter)]
        of_head = ".final_layer." in name
        expected = 0.05 if name.startswith("backbone.") else 1.0 if of_head else 0.1
        assert rate == pytest.approx(expected), name
        share = rate * decay  # of a weight that a step takes away
        own = 0.01 * min(rate, 0.1)
        assert share == pytest.approx(own if parameter.ndim > 1 else 0.0), name


def test_heads_learn_faster_where_they_give_logits() -> None:
    heatmap, vector = make_supernet(), make_supernet(head="vector")
    assert head_factor(OptimConfig(), heatmap) == 10
    assert head_factor(OptimConfig(loss="mse"), heatmap) == 1
    assert head_factor(OptimConfig(), vector) == 1
    for network, loss in ((heatmap, "mse"), (heatmap, "cross_entropy"), (vector, "cross_entropy")):
        assert head_factor(OptimConfig(head_factor=3, loss=loss), network) == 3  # type: ignore[arg-type]


def test_one_cycle() -> None:
    config = OptimConfig(schedule="one_cycle", warmup=0.2)
    rates = [rate_factor(config, i / 1000) for i in range(1001)]
    assert rates[0] == pytest.approx(0.04) and rates[200] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[:201] == sorted(rates[:201]) and rates[200:] == sorted(rates[200:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.01
    assert rates[600] == pytest.approx(0.5005), "a half cosine from 1 to 0.001"
    assert rate_factor(OptimConfig(warmup=0.0), 0.0) == 1.0


def test_steps_and_constant() -> None:
    config = OptimConfig(schedule="steps", milestones=(0.6, 0.45, 0.75), decay=0.25)
    values = {0.0: 1, 0.449: 1, 0.45: 0.25, 0.6: 0.0625, 0.74: 0.0625, 0.75: 0.015625, 1: 0.015625}
    for progress, factor in values.items():
        assert rate_factor(config, progress) == factor
    constant = OptimConfig(schedule="constant", warmup=0.2)
    assert rate_factor(constant, 0.0) == pytest.approx(0.04)
    assert rate_factor(constant, 0.1) == pytest.approx(0.52)
    assert rate_factor(constant, 0.2) == rate_factor(constant, 0.9) == 1.0


def test_the_optimiser_is_adamw_by_the_formula() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    optimiser = make_optimiser([{"params": [weight], "lr": 0.1, "weight_decay": 0.01}])
    value, first, second = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, factor in ((1, 0.5), (2, 1.0), (3, 0.25)):
        set_rate(optimiser, factor)
        assert optimiser.param_groups[0]["lr"] == 0.1 * factor
        optimiser.zero_grad()
        (weight * torch.tensor([3.0, step])).sum().backward()
        optimiser.step()
        for i, gradient in enumerate((3.0, float(step))):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            ahead = (first[i] / (1 - 0.9**step)) / (math.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            rate = 0.1 * factor
            value[i] = value[i] * (1 - rate * 0.01) - rate * ahead
    assert weight.detach()[0].tolist() == pytest.approx(value, rel=1e-10)


def test_averaged_weights() -> None:
    network = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    average = AveragedWeights(network, decay=0.5)
    weight = network[0].weight
    value, expected = [weight.detach().clone()], weight.detach().clone()
    for step in range(15):
        with torch.no_grad():
            weight += 1
            network[1].running_mean += 2
        value.append(weight.detach().clone())
        average.update(step)
        # Early on a decay of (1 + step) / (10 + step), as long as that is less.
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value[-1]
        torch.testing.assert_close(average.state["0.weight"], expected)
    assert 0 < average.state["1.running_mean"].item() < 30
    assert "1.num_batches_tracked" not in average.state
    average.copy_to_network()
    torch.testing.assert_close(network[0].weight.detach(), expected)
    assert not torch.equal(network[0].weight.detach(), value[-1])


def test_a_kept_average_is_taken_up_without_sharing_memory() -> None:
    network = nn.Linear(2, 1)
    average, other = AveragedWeights(network, 0.5), AveragedWeights(nn.Linear(2, 1), 0.5)
    average.load(other.state)
    assert torch.equal(average.state["weight"], other.state["weight"])
    average.state["weight"] += 1
    assert not torch.equal(average.state["weight"], other.state["weight"])


def test_the_temperature_is_not_averaged() -> None:
    """It is set by a schedule; averaged alpha and beta are for its last value."""
    network = make_supernet()
    average = AveragedWeights(network, 0.9)
    network.get_buffer("temperature").fill_(0.1)
    average.update(100)
    average.copy_to_network()
    assert network.get_buffer("temperature").item() == pytest.approx(0.1)
    assert "alphas.upper" in average.state and "betas.upper" in average.state


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0, math.inf, math.nan])
def test_clipping_is_torchs(size: float) -> None:
    """Far below, near and far above the limit, and where there is no norm."""
    ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 5, 2)] for _ in range(2))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        a.grad = torch.randn(a.shape) * size
        b.grad = a.grad.clone()
    norm, expected = clip(ours, 2.0), nn.utils.clip_grad_norm_(theirs, 2.0)
    torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)
