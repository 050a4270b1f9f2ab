"""Peaks, counted operations, and the stages of a step against them."""

from __future__ import annotations

import pytest
import torch
from bench_parts import ONE, FakeClock, FakeGate, make_bench
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from posefabric.bench.group_loader import reading
from posefabric.bench.roofline import (
    ConvolutionCounter,
    best_convolution,
    copy_speed,
    fastest,
    roofline,
)
from posefabric.bench.stages import StagedStep, stage_rounds, stage_table, time_stages
from posefabric.bench.timing import Rounds
from posefabric.train.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layer", "depthwise"),
    [
        (nn.Conv2d(6, 4, 3, padding=1), False),
        (nn.Conv2d(6, 4, 3, stride=2, groups=2), False),
        (nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6), True),
        (nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), False),
    ],
    ids=["dense", "grouped", "depthwise", "transposed"],
)
def test_convolutions_are_counted_forward_and_backward(layer, depthwise) -> None:
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    # torch's own counter is right forward; backward it forgets the groups of a weight's gradient.
    with FlopCounterMode(display=False) as reference:
        layer(x)
    with ConvolutionCounter() as counter:
        layer(x).sum().backward()
    kind, other = ("depthwise", "dense") if depthwise else ("dense", "depthwise")
    assert getattr(counter, kind) == 3 * reference.get_total_flops() > 0
    assert getattr(counter, other) == 0


def test_a_gradient_that_nobody_wants_is_not_counted() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with ConvolutionCounter() as once:
        layer(x)
    with ConvolutionCounter() as both:
        layer(x).sum().backward()
    assert both.dense == 2 * once.dense  # forward and the weight's


def test_the_fastest_of_the_tries_counts() -> None:
    clock, durations = FakeClock(), iter([9.0, 3.0, 2.0, 4.0, 1.0])

    def work() -> None:
        clock.now += next(durations)

    # The first is to warm up; after three tries the time is up.
    assert fastest(work, device=CPU, seconds=0.0, clock=clock) == 2.0


class Ticking(FakeClock):
    """Half a second from one look to the next."""

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def test_peaks_follow_from_operations_bytes_and_seconds() -> None:
    shapes = ((1, 8, 4, 4), (1, 4, 4, 4))
    found = best_convolution(
        depthwise=False, device=CPU, seconds=0.0, shapes=shapes, clock=Ticking()
    )
    assert found["gflops"] == pytest.approx(2 * 16 * 8 * 8 * 9 / 0.5 / 1e9)
    assert found["shape"] == [1, 8, 4, 4] and found["layout"] == "channels_last"
    found = best_convolution(
        depthwise=True, device=CPU, seconds=0.0, shapes=shapes, clock=Ticking()
    )
    assert found["gflops"] == pytest.approx(2 * 16 * 8 * 9 / 0.5 / 1e9)
    speed = copy_speed(CPU, seconds=0.0, size=4000, clock=Ticking())
    assert speed == pytest.approx(2 * 4000 / 0.5 / 1e9)


def test_the_roofline_answers_all_three() -> None:
    gate = FakeGate()
    roofline(gate, device="cpu", seconds=0.0)  # type: ignore[arg-type]
    (peaks,) = gate.answers
    assert peaks["conv_3x3"]["gflops"] > 0 and peaks["depthwise_3x3"]["gflops"] > 0
    assert peaks["copy"]["gbytes"] > 0


def test_the_stages_are_a_whole_step(tmp_path) -> None:
    gate = FakeGate()
    config = reading(make_bench(tmp_path), 64)
    stage_rounds(gate, config=config, batch=2, device="cpu", plan=ONE)  # type: ignore[arg-type]
    (found,) = gate.answers
    stages = ["read", "prepare", "backbone", "fabrics", "loss", "backward", "optimiser"]
    assert list(found["seconds"]) == list(found["flops"]) == stages
    flops = {stage: sum(kinds.values()) for stage, kinds in found["flops"].items()}
    assert not any(flops[stage] for stage in ("read", "prepare", "loss", "optimiser"))
    forward = flops["backbone"] + flops["fabrics"]
    # Twice the forward pass, but that no gradient goes into the pictures.
    assert 1.8 * forward < flops["backward"] <= 2 * forward
    assert found["flops"]["fabrics"]["depthwise"] > 0
    assert found["precision"] == resolve_precision("auto", CPU)
    assert found["bytes"] > 28 * 1000


def test_a_staged_step_moves_the_network(tmp_path) -> None:
    step = StagedStep(reading(make_bench(tmp_path), 64), batch=2, device=CPU)
    before = {name: value.clone() for name, value in step.network.named_parameters()}
    took = time_stages(step, Rounds(warmup=1, rounds=2, least=1, seconds=0.0))
    assert {len(values) for values in took.values()} == {1}
    still = [n for n, value in step.network.named_parameters() if torch.equal(value, before[n])]
    assert not [name for name in still if name.startswith(("alphas", "betas", "backbone"))]


def test_shares_of_step_and_peaks() -> None:
    nothing = {"dense": 0, "depthwise": 0}
    found = {
        "seconds": {"read": [9.0], "backward": [2.0, 4.0, 3.0], "optimiser": [1.0]},
        "flops": {
            "read": nothing,
            "backward": {"dense": 60 * 10**9, "depthwise": 3 * 10**9},
            "optimiser": nothing,
        },
        "bytes": 5 * 10**9,
        "precision": "fp32",
    }
    peaks = {
        "conv_3x3": {"gflops": 60.0},
        "depthwise_3x3": {"gflops": 6.0},
        "copy": {"gbytes": 10.0},
    }
    table = stage_table(found, peaks, batch=2)
    backward, optimiser = table["stages"]["backward"], table["stages"]["optimiser"]
    assert backward["ms"] == 1500.0 and backward["share"] == 0.75
    assert backward["gflops"] == 21.0 and backward["of_conv_3x3"] == 0.35
    assert backward["of_attainable"] == 0.5 and optimiser["of_attainable"] == 0.5
    assert optimiser["gflops"] is None
    assert table["stages"]["read"]["share"] is None and table["batch"] == 2
