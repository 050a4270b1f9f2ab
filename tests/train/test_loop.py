"""The loop: exact resume after any stop, guarded steps, and what it records."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainings import CASES, STEPS, losses, make_config, make_trainer, people

from posefabric.run import RunFolder
from posefabric.search.synchronous import Synchronous
from posefabric.structures import DataError, PersonDataset, PosefabricError
from posefabric.train import loop
from posefabric.train.checkpoint import load_checkpoint
from posefabric.train.loop import Trainer, TrainingStopped
from posefabric.train.strategy import Strategy

SCRIPT = Path(__file__).parents[1] / "trainings.py"


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def mean_score(network: Any) -> dict[str, float]:
    with torch.no_grad():
        training = network.training
        network.eval()
        value = network(torch.ones(1, 3, 64, 64)).mean().item()
        network.train(training)
    return {"score": value}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """Case to an uninterrupted training: its losses, records and final state."""

    @functools.cache
    def train(case: str) -> tuple[list[tuple[int, float]], list[dict], dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp(case) / "run"
        trainer = make_trainer(folder, make_config(**CASES[case]), validate=mean_score)
        trainer.fit()
        return losses(folder), trainer.run.metrics(), state_of(trainer)

    return train


class Stopping:
    """Wraps a strategy: at one step of one hook it stops the training, in some way."""

    def __init__(self, inner: Strategy, hook: str, step: int, stop) -> None:
        self.inner, self.hook, self.at, self.stop = inner, hook, step, stop
        self.step = -1

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def called(*args: Any) -> Any:
            self.step += name == "schedule"
            result = method(*args)
            if name == self.hook and self.step == self.at:
                self.stop()
            return result

        return called


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def comparable(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "images_per_s"} for r in records]


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact(case: str, whole, tmp_path: Path) -> None:
    """Stopped by Ctrl-C, then crashed in one of the step's hooks, then trained to the end."""
    expected_losses, expected_records, expected_state = whole(case)
    assert [step for step, _ in expected_losses] == list(range(1, STEPS + 1))
    draw = random.Random(case)
    first = draw.randrange(1, STEPS - 2)
    folder, config = tmp_path / "run", make_config(**CASES[case])

    trainer = make_trainer(folder, config, validate=mean_score)
    trainer.strategy = Stopping(trainer.strategy, "schedule", first, interrupt)  # type: ignore[assignment]
    with pytest.raises(TrainingStopped, match=rf"stopped at step {first + 1} of {STEPS}.*resume"):
        trainer.fit()
    assert trainer.run.state == "stopped"
    assert load_checkpoint(trainer.run)[1] == first + 1  # type: ignore[index]
    assert losses(folder) == expected_losses[: first + 1]

    trainer = make_trainer(folder, config, validate=mean_score)
    # alpha and beta may have steps of their own
    hook = "architecture_gradients" if trainer.held_out else draw.choice(["schedule", "penalty"])
    second = draw.randrange(0, STEPS - first - 1)
    trainer.strategy = Stopping(trainer.strategy, hook, second, crash)  # type: ignore[assignment]
    with pytest.raises(Crash):
        trainer.fit()

    trainer = make_trainer(folder, config, validate=mean_score)
    trainer.fit()
    assert losses(folder) == expected_losses
    assert comparable(trainer.run.metrics()) == comparable(expected_records)
    assert_equal_states(state_of(trainer), expected_state)
    assert not trainer.network.training


def test_a_crash_after_the_weights_moved_is_exact_too(whole, tmp_path: Path) -> None:
    """``readings`` is asked between the optimiser's step and the record of it."""
    expected_losses, _, expected_state = whole("sparsemax")
    folder, config = tmp_path / "run", make_config(**CASES["sparsemax"])
    trainer = make_trainer(folder, config)
    trainer.strategy = Stopping(trainer.strategy, "readings", 7, crash)  # type: ignore[assignment]
    with pytest.raises(Crash):
        trainer.fit()
    assert [step for step, _ in losses(folder)] == list(range(1, 8))
    trainer = make_trainer(folder, config)
    trainer.fit()
    assert trainer.step == STEPS and losses(folder) == expected_losses
    assert_equal_states(state_of(trainer), expected_state)


def test_a_crash_before_the_first_checkpoint_leaves_no_records(whole, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", make_config()
    trainer = make_trainer(folder, config)
    trainer.strategy = Stopping(trainer.strategy, "schedule", 2, crash)  # type: ignore[assignment]
    with pytest.raises(Crash):
        trainer.fit()
    assert [step for step, _ in losses(folder)] == [1, 2]
    make_trainer(folder, config).fit()
    assert losses(folder) == whole("plain")[0]


def test_the_seed_decides_a_training(whole, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", make_config(seed=1))
    trainer.fit()
    assert {s for _, s in losses(tmp_path / "run")}.isdisjoint(s for _, s in whole("plain")[0])


def test_a_finished_training_is_not_trained_on(tmp_path: Path) -> None:
    config = make_config(search=dict(epochs=0.5, checkpoint_every=2))
    trainer = make_trainer(tmp_path / "run", config)
    trainer.fit()
    again = make_trainer(tmp_path / "run", config)
    again.fit()
    assert again.step == trainer.step == 2
    assert_equal_states(state_of(again), state_of(trainer))
    assert len(losses(tmp_path / "run")) == 2


def test_a_checkpoint_of_another_length_is_refused(tmp_path: Path) -> None:
    config = make_config(search=dict(epochs=0.5, checkpoint_every=1))
    make_trainer(tmp_path / "run", config).fit()
    longer = make_trainer(tmp_path / "run", config)
    longer.optim = config.search.model_copy(update={"epochs": 1.0})
    with pytest.raises(PosefabricError, match="a phase of 2 steps, this command asks for 4"):
        longer.fit()


def test_dropout_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A network that draws from the global generator resumes exactly as well."""

    def make(name: str) -> Trainer:
        trainer = make_trainer(tmp_path / name, make_config(search=dict(epochs=1.5)))
        fabric = trainer.network.get_submodule("parts.all.fabric.cells.3_0")
        fabric.keep = torch.nn.Sequential(fabric.keep, torch.nn.Dropout(0.5))
        return trainer

    torch.manual_seed(5)
    whole = make("whole")
    whole.fit()
    torch.manual_seed(6)
    parted = make("parted")
    parted.strategy = Stopping(parted.strategy, "schedule", 3, interrupt)  # type: ignore[assignment]
    with pytest.raises(TrainingStopped):
        parted.fit()
    torch.manual_seed(7)
    parted = make("parted")
    parted.fit()
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole")
    assert_equal_states(state_of(parted), state_of(whole))


class Spy(Synchronous):
    """Keeps the state before every step, and can spoil one."""

    def __init__(self, trainer: Trainer, spoil: dict[int, str] | None = None) -> None:
        super().__init__(trainer.optim)  # type: ignore[arg-type]
        self.trainer, self.spoil = trainer, spoil or {}
        self.states: list[dict[str, Tensor]] = []

    @property
    def way(self) -> str | None:
        return self.spoil.get(len(self.states) - 1)

    def schedule(self, network: Any, progress: float) -> None:
        super().schedule(network, progress)
        self.states.append(state_of(self.trainer))
        if self.way == "weights":
            with torch.no_grad():
                network.get_submodule("parts.all.fabric.cells.3_1.keep").weight.fill_(torch.nan)

    def penalty(self, network: Any, progress: float) -> Tensor | None:
        alpha = network.alphas["all"]
        if self.way == "loss":
            return alpha.sum() * torch.nan
        if self.way == "gradient":
            return (alpha.sum() * 0).sqrt()  # 0, with an infinite slope
        return super().penalty(network, progress)


def spoiled(folder: Path, spoil: dict[int, str], **search: Any) -> tuple[Trainer, Spy]:
    trainer = make_trainer(folder, make_config(search=dict(epochs=1.5, ema=0.5, **search)))
    spy = Spy(trainer, spoil)
    trainer.strategy = spy
    prepare = trainer.data.prepare

    def spoiling(crops: Any, step: int) -> Any:
        batch = prepare(crops, step)
        if spoil.get(step) == "images":
            batch.images[1, 2, 3, 4] = torch.nan
        return batch

    trainer.data.prepare = spoiling  # type: ignore[method-assign]
    return trainer, spy


@pytest.mark.parametrize("way", ["images", "loss", "gradient"])
def test_a_non_finite_step_is_skipped_and_counted(way: str, tmp_path: Path) -> None:
    trainer, spy = spoiled(tmp_path / "run", {2: way})
    averages: list[dict[str, Tensor]] = []
    schedule = spy.schedule

    def keeping(network: Any, progress: float) -> None:
        schedule(network, progress)
        assert trainer._average is not None
        averages.append({k: v.clone() for k, v in trainer._average.state.items()})

    spy.schedule = keeping  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.skipped_steps == 1 and trainer.step == 6
    records = trainer.run.metrics()
    assert [r["step"] for r in records if r.get("skipped")] == [3]
    # Strict JSON, which knows no NaN: what was not finite is null.
    lines = trainer.run.metrics_path.read_text().splitlines()
    assert all(isinstance(json.loads(line, parse_constant=pytest.fail), dict) for line in lines)
    assert None in (records[2]["loss"], records[2]["gradient_norm"])
    before, after = spy.states[2], spy.states[3]
    for name, value in before.items():
        if "num_batches" not in name:
            assert torch.equal(value, after[name]), name
    assert_equal_states(averages[3], averages[2])
    assert any(not torch.equal(spy.states[4][n], v) for n, v in after.items()), "it learns on"
    assert all(torch.isfinite(v).all() for v in state_of(trainer).values())
    json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[2])


def test_bad_steps_between_good_ones_do_not_add_up(tmp_path: Path) -> None:
    trainer, _ = spoiled(tmp_path / "run", {1: "loss", 3: "loss", 5: "loss"}, max_bad_steps=1)
    trainer.fit()
    assert trainer.skipped_steps == 3


@pytest.mark.parametrize(
    ("way", "culprit"),
    [
        ("images", "first in the input images"),
        ("loss", r"first in the loss or its gradient \(the outputs are finite\)"),
        ("weights", r"first in parts\.all\.fabric\.cells\.3_1\.keep \(Conv2d\)"),
    ],
)
def test_repeated_bad_steps_stop_and_name_the_culprit(
    way: str, culprit: str, tmp_path: Path
) -> None:
    spoil = dict.fromkeys(range(2, 99), way)
    trainer, spy = spoiled(tmp_path / "run", spoil, max_bad_steps=2)
    with pytest.raises(PosefabricError, match=f"3 steps in a row were not finite.*{culprit}"):
        trainer.fit()
    assert trainer.run.state == "failed" and trainer.skipped_steps == 3
    after = state_of(trainer)
    for name, value in spy.states[2].items():
        if "running" in name:
            assert torch.equal(value, after[name]), name


def test_validation_sees_averages_and_leaves_no_trace(whole, tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def validate(network: Any) -> dict[str, float]:
        seen.append({k: v.clone() for k, v in network.state_dict().items()})
        assert trainer._average is not None
        for name, value in trainer._average.state.items():
            assert torch.equal(value, seen[-1][name])
        return {"PCK": len(seen)}

    trainer = make_trainer(tmp_path / "run", make_config(**CASES["averaged"]), validate=validate)
    trainer.fit()
    # Every 0.75 epochs of 4 steps, but not at the very end, where the phase evaluates.
    records = trainer.run.metrics()
    assert [(r["step"], r["val_PCK"]) for r in records if "val_PCK" in r] == [
        (3, 1),
        (6, 2),
        (9, 3),
    ]
    plain = make_trainer(tmp_path / "plain", make_config(search=dict(ema=0.9)))
    plain.fit()
    assert losses(tmp_path / "plain") == losses(tmp_path / "run") == whole("averaged")[0]
    assert_equal_states(state_of(trainer), state_of(plain))
    assert trainer._average is not None
    assert torch.equal(state_of(trainer)["alphas.all"], trainer._average.state["alphas.all"])


def test_validation_without_averages_sees_the_network(tmp_path: Path) -> None:
    config = make_config(search=dict(epochs=0.75, evaluate_every=0.5))
    trainer = make_trainer(tmp_path / "run", config, validate=mean_score)
    trainer.fit()
    assert [r["step"] for r in trainer.run.metrics() if "val_score" in r] == [2]


def test_records(whole) -> None:
    _, records, _ = whole("sparsemax")
    first = records[0]
    assert first["phase"] == "search" and first["learning_rate"] == pytest.approx(0.04e-3)
    assert all(r["gradient_norm"] > 0 for r in records)
    assert [r["step"] for r in records if "alpha_entropy" in r] == [4, 8, 10]
    assert [r["step"] for r in records if "images_per_s" in r] == [4, 8, 10]
    # The penalty rises from a fifth of the search on.
    assert [r["step"] for r in records if "penalty" in r] == list(range(4, 11))


def test_training_learns(whole) -> None:
    series = [loss for _, loss in whole("plain")[0]]
    assert sum(series[-3:]) < sum(series[:3])


def test_an_unreadable_picture_ends_the_training_but_keeps_what_was_learned(
    tmp_path: Path, whole
) -> None:
    good = people()
    broken = {"at": -1}

    def read(person: Any) -> Any:
        if person.image_id == broken["at"]:
            raise DataError(f"{person.file}: cut short")
        return good.read_image(person)

    dataset = PersonDataset(
        name="one bad", skeleton=good.skeleton, persons=good.persons, read_image=read
    )
    folder, config = tmp_path / "run", make_config()
    trainer = make_trainer(folder, config, dataset=dataset)
    broken["at"] = good.persons[trainer.data.loader.order(0)[5]].image_id
    with pytest.raises(DataError, match="cut short"):
        trainer.fit()
    assert trainer.step == 1 and load_checkpoint(trainer.run)[1] == 1  # type: ignore[index]
    broken["at"] = -1
    make_trainer(folder, config, dataset=dataset).fit()
    assert losses(folder) == whole("plain")[0]


def start(folder: Path, *options: str, case: str = "sparsemax") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), case, *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def wait_for_step(
    folder: Path, step: int, process: subprocess.Popen[bytes], changed_after: int = 0
) -> None:
    for _ in range(4000):
        path = folder / "metrics.jsonl"
        written = path.exists() and path.stat().st_mtime_ns > changed_after
        if written and path.read_bytes().count(b"\n") >= step:
            return
        assert process.poll() is None, "the training ended early"
        time.sleep(0.005)
    raise AssertionError("the training did not get that far")


def finish(folder: Path, case: str = "sparsemax") -> dict[str, Tensor]:
    assert start(folder, case=case).wait(120) == 0
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sparsemax", "first_order", "second_order"])
def test_killed_at_random_moments(case: str, tmp_path: Path, whole) -> None:
    draw, folder = random.Random(0), tmp_path / "run"
    for steps in (2, 5, 2):
        before = (folder / "metrics.jsonl").stat().st_mtime_ns if folder.exists() else 0
        process = start(folder, case=case)
        wait_for_step(folder, steps, process, changed_after=before)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.wait(60)
    state = finish(folder, case=case)
    assert losses(folder) == whole(case)[0]
    assert_equal_states(state, whole(case)[2])


@pytest.mark.slow
@pytest.mark.parametrize("write", [3, 4])
def test_killed_while_a_checkpoint_is_written(write: int, tmp_path: Path, whole) -> None:
    """The second checkpoint is the third write (its file) and the fourth (the index)."""
    folder = tmp_path / "run"
    process = start(folder, "--die-at-write", str(write))
    assert process.wait(120) == -signal.SIGKILL
    assert load_checkpoint(RunFolder.open(folder))[1] == 3  # type: ignore[index]
    state = finish(folder)
    assert losses(folder) == whole("sparsemax")[0]
    assert_equal_states(state, whole("sparsemax")[2])
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_checkpoint(number: int, tmp_path: Path, whole) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_step(folder, 2, process)
    process.send_signal(number)
    assert process.wait(60) == 130
    run = RunFolder.open(folder)
    assert run.state == "stopped"
    assert load_checkpoint(run)[1] == len(losses(folder))  # type: ignore[index]
    state = finish(folder)
    assert losses(folder) == whole("sparsemax")[0]
    assert_equal_states(state, whole("sparsemax")[2])


def test_a_scaled_loss_gives_the_same_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = spoiled(tmp_path / "plain", {2: "gradient"})
    plain.fit()
    monkeypatch.setattr(
        loop, "make_scaler", lambda device, precision: torch.amp.GradScaler("cpu", init_scale=1024)
    )
    trainer, _ = spoiled(tmp_path / "scaled", {2: "gradient"})
    trainer.fit()
    assert trainer.skipped_steps == plain.skipped_steps == 1
    assert trainer._scaler.get_scale() == 512, "an overflow halves it, a good step leaves it"
    # A power of two scales exactly.
    assert_equal_states(state_of(trainer), state_of(plain))
    trainer._save()
    restored = load_checkpoint(trainer.run)
    assert restored is not None and restored[0]["scaler"]["scale"] == 512
