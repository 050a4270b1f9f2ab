"""The yardstick computes what the faithful mixture computes, plainly."""

from __future__ import annotations

import pytest
import torch
from bench_parts import TINY, FakeClock
from torch import nn

from posefabric.bench.released import ReleasedForEvaluation, released_network, released_steps
from posefabric.bench.training import training_batch
from posefabric.models.build import build_supernet
from posefabric.space.operations import DepthwiseConv2d

CPU = torch.device("cpu")


def faithful(*more: str):
    config = TINY.config("model.parts=3", *more)
    config.model.faithful = True
    return config


def released_name(name: str, parts: list[str]) -> str:
    """The yardstick's name of one of the mixture's tensors."""
    for index, part in enumerate(parts):
        name = name.replace(f"parts.{part}.", f"parts.{index}.")
        for kind in ("alphas", "betas"):
            if name == f"{kind}.{part}":
                return f"parts.{index}.{kind}"
    pieces = name.split(".")
    if "reduce" in pieces:
        del pieces[pieces.index("reduce") + 2]  # the place of a norm that faithful lacks
    return ".".join(pieces)


@pytest.mark.parametrize("head", ["heatmap", "vector"])
def test_it_equals_the_faithful_mixture_in_float64(head: str) -> None:
    config = faithful(f"model.head={head}")
    mixture = build_supernet(config).double()
    yardstick = released_network(config).double()
    parts = [part.name for part in mixture.graph.parts]
    generator = torch.Generator().manual_seed(1)
    theirs = dict(yardstick.named_parameters())
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            value = parameter[0] if name.startswith("alphas") else parameter
            theirs.pop(released_name(name, parts)).copy_(value)
    assert not theirs
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    expected = mixture.train()(images)
    found = yardstick.train()(images)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


def test_nothing_in_it_is_made_faster() -> None:
    network = released_network(TINY.config())
    depthwise = [m for m in network.parts.modules() if getattr(m, "groups", 1) > 1]
    assert depthwise and all(type(module) is nn.Conv2d for module in depthwise)
    assert any(isinstance(m, DepthwiseConv2d) for m in build_supernet(TINY.config()).modules())
    weights = [p for p in network.parameters() if p.ndim == 4]
    assert all(weight.is_contiguous() for weight in weights)


def test_the_runner_hands_it_nchw() -> None:
    network = released_network(TINY.config()).eval()
    seen: list[bool] = []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[0].is_contiguous()))
    images = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    maps = ReleasedForEvaluation(network)(images)
    assert seen == [True] and maps.shape == (1, 17, 16, 16)


def test_a_step_moves_weights_alpha_and_beta_and_tells_its_time(monkeypatch) -> None:
    config, clock = TINY.config(), FakeClock()
    made: list[nn.Module] = []

    def kept(given):
        made.append(released_network(given))
        return made[0]

    monkeypatch.setattr("posefabric.bench.released.released_network", kept)
    step = released_steps(config, training_batch(config, 2, CPU), CPU, clock=clock)
    (network,) = made
    before = {name: value.clone() for name, value in network.named_parameters()}
    network.register_forward_hook(lambda *call: setattr(clock, "now", clock.now + 4.0))
    assert step() == 4.0
    moved = {n for n, value in network.named_parameters() if not torch.equal(value, before[n])}
    assert {"parts.0.alphas", "parts.0.betas"} <= moved and len(moved) > len(before) / 2
