"""The arms that train: what of a step counts, and that it is the package's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_parts import TINY, FakeClock, FakeGate

from posefabric.bench import training
from posefabric.bench.training import (
    Enough,
    PacedStrategy,
    compiled_steps,
    on_path,
    own_steps,
    training_batch,
    yardstick_steps,
)
from posefabric.models.build import build_supernet
from posefabric.models.fast_convolutions import Fast
from posefabric.train.phase import choose_path, train_phase
from posefabric.train.strategy import Strategy

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_only_what_lies_between_schedule_and_readings_counts() -> None:
    clock, told, calls = FakeClock(), [], []

    class Inner(Strategy):
        name = "inner"

        def schedule(self, network, progress):
            calls.append(("schedule", progress))
            clock.now += 1.0

        def readings(self, network):
            clock.now += 10.0
            return {"entropy": 0.5}

    def before() -> bool:
        clock.now += 100.0  # waiting for one's turn
        return len(told) < 2

    paced = PacedStrategy(Inner(), before=before, after=told.append, device=CPU, clock=clock)
    for _ in range(2):
        paced.schedule(None, 0.25)
        clock.now += 2.0
        assert paced.readings(None) == {"entropy": 0.5}
        clock.now += 50.0  # reading the next pictures
    with pytest.raises(Enough):
        paced.schedule(None, 0.5)
    assert told == [3.0, 3.0] and calls == [("schedule", 0.25)] * 2
    assert paced.name == "inner" and paced.held_out_share() == 0.0


def test_a_search_step_a_turn_by_the_packages_own_training(monkeypatch) -> None:
    given: list[dict[str, Any]] = []
    networks: list[Any] = []

    def kept(network, **options):
        networks.append(network)
        given.append(options)
        return train_phase(network, **options)

    monkeypatch.setattr(training, "train_phase", kept)
    gate = FakeGate(turns=3)
    own_steps(gate, config=TINY.config(), batch=2, device="cpu")  # type: ignore[arg-type]
    (options,), (network,) = given, networks
    assert len(gate.answers) == 3
    assert all(seconds > 0 and peak >= 0 for seconds, peak in gate.answers)
    assert options["strategy"].name == "synchronous" and not network.graph.faithful
    (moved,) = network.alphas.parameters()
    assert moved.detach().abs().max() > 0
    assert options["optim"].batch_size == 2 and options["run"].config.device == "cpu"
    assert not options["run"].path.exists()


@pytest.mark.slow
def test_a_peer_trains_by_the_same_trainer() -> None:
    gate = FakeGate(turns=2)
    config = TINY.peer("mobilenet_v2_deconv", "model.deconv_width=8")
    own_steps(gate, config=config, batch=2, device="cpu")  # type: ignore[arg-type]
    assert len(gate.answers) == 2


def test_what_is_compiled_is_compiled_anew(monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    seen = []

    def steps(gate, **options) -> None:
        seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert not list(Path(seen[-1]).iterdir())

    monkeypatch.setattr("posefabric.bench.training.own_steps", steps)
    for _ in range(2):
        compiled_steps(FakeGate(turns=1), config=TINY.config(), batch=2, device="cpu")  # type: ignore[arg-type]
    assert len({*seen, "elsewhere"}) == 3


def test_the_yardsticks_step_a_turn() -> None:
    gate = FakeGate(turns=2)
    yardstick_steps(gate, config=TINY.config(), batch=2, device="cpu")  # type: ignore[arg-type]
    assert len(gate.answers) == 2 and all(seconds > 0 for seconds, _ in gate.answers)


def test_the_batch_is_prepared_as_for_training() -> None:
    batch = training_batch(TINY.config(), 3, CPU)
    assert batch.images.shape == (3, 3, 64, 64) and batch.heatmaps.shape == (3, 17, 16, 16)


def test_the_path_is_the_one_that_a_training_takes() -> None:
    config = TINY.config()
    for wanted, device in ((config, CPU), (on_path(config, "plain"), CPU), (config, CUDA)):
        network = build_supernet(wanted)
        choose_path(network, wanted, device)
        fast = any(isinstance(module, Fast) for module in network.modules())
        assert fast == (wanted is config and device is CPU)
