"""The arms that train: what of a step counts, and that it is the package's own."""

from __future__ import annotations

import pytest
import torch
from bench_parts import TINY, FakeClock, FakeGate

from posefabric.bench import training
from posefabric.bench.training import (
    PacedData,
    own_steps,
    people,
    training_batch,
    yardstick_steps,
)
from posefabric.config import Config
from posefabric.data.batch import Normalisation
from posefabric.train.loop import Trainer

CPU = torch.device("cpu")


def paced(config: Config, clock: FakeClock) -> PacedData:
    data = PacedData.open(
        config,
        optim=config.search.model_copy(update={"batch_size": 2}),
        normalisation=Normalisation(),
        seed=0,
        device=CPU,
        dataset=people(config, 2),
    )
    assert isinstance(data, PacedData)
    data.clock = clock
    return data


def test_only_what_follows_the_prepared_batch_counts() -> None:
    clock, told = FakeClock(), []
    data = paced(TINY.config(), clock)

    def before(seconds: float | None) -> bool:
        told.append(seconds)
        clock.now += 100.0  # waiting for one's turn
        return len(told) < 4

    data.before_step = before
    for number, (step, crops) in enumerate(data.crops(0)):
        clock.now += 50.0  # reading
        data.prepare(crops, step)
        clock.now += 1.0 + number
    assert told == [None, 1.0, 2.0, 3.0]


def test_a_search_step_a_turn_by_the_packages_own_trainer(monkeypatch) -> None:
    trainers: list[Trainer] = []

    class Kept(Trainer):
        def fit(self) -> None:
            trainers.append(self)
            super().fit()

    monkeypatch.setattr(training, "Trainer", Kept)
    gate = FakeGate(turns=3)
    own_steps(gate, config=TINY.config(), batch=2, device="cpu")  # type: ignore[arg-type]
    (trainer,) = trainers
    assert trainer.step == len(gate.answers) == 3 and trainer.skipped_steps == 0
    assert all(seconds > 0 and peak >= 0 for seconds, peak in gate.answers)
    assert trainer.strategy.name == "synchronous" and not trainer.network.graph.faithful
    (moved,) = trainer.network.alphas.parameters()  # type: ignore[union-attr]
    assert moved.abs().max() > 0
    assert not trainer.run.path.exists()


@pytest.mark.slow
def test_a_peer_trains_by_the_same_trainer() -> None:
    gate = FakeGate(turns=2)
    config = TINY.peer("mobilenet_v2_deconv", "model.deconv_width=8")
    own_steps(gate, config=config, batch=2, device="cpu")  # type: ignore[arg-type]
    assert len(gate.answers) == 2


def test_the_yardsticks_step_a_turn() -> None:
    gate = FakeGate(turns=2)
    yardstick_steps(gate, config=TINY.config(), batch=2, device="cpu")  # type: ignore[arg-type]
    assert len(gate.answers) == 2 and all(seconds > 0 for seconds, _ in gate.answers)


def test_the_batch_is_prepared_as_for_training() -> None:
    batch = training_batch(TINY.config(), 3, CPU)
    assert batch.images.shape == (3, 3, 64, 64) and batch.heatmaps.shape == (3, 17, 16, 16)
