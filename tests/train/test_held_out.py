"""Steps of alpha and beta on held-out persons: what they see, what stops them, what goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import assert_equal_states, state_of
from torch import Tensor
from trainings import losses, make_config, make_trainer, people

from posefabric.search.bilevel import FirstOrder
from posefabric.search.uniform import Uniform
from posefabric.structures import DataError, PersonDataset, PosefabricError
from posefabric.train.checkpoint import load_checkpoint
from posefabric.train.loop import Trainer
from posefabric.train.loss import cross_entropy
from posefabric.train.strategy import Evidence


def short(**search: Any):
    """One cell, six steps of first-order search: three epochs of the weights' half."""
    options = {"strategy": "first_order", "epochs": 3.0, **search}
    return make_config(search=options, model=dict(depth=4))


class Watching(FirstOrder):
    """Keeps what each step saw, and how the network stood before and after it."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.optim)  # type: ignore[arg-type]
        self.trainer = trainer
        self.evidence: list[Evidence] = []
        self.states: list[dict[str, Tensor]] = []
        self.moments: list[Any] = []
        self.gradients: list[list[Tensor]] = []

    def architecture_gradients(
        self, network: Any, evidence: Evidence, progress: float
    ) -> tuple[Tensor, list[Tensor]] | None:
        assert self.trainer._architecture is not None
        self.evidence.append(evidence)
        self.states.append(state_of(self.trainer))
        optimiser = self.trainer._architecture.optimiser
        self.moments.append(copy.deepcopy(optimiser.state_dict()["state"]))
        found = super().architecture_gradients(network, evidence, progress)
        self.gradients.append([] if found is None else found[1])
        return found


def watched(folder: Path, spoil: tuple[int, ...] = (), **search: Any) -> tuple[Trainer, Watching]:
    """``spoil``: the steps whose held-out pictures are not finite."""
    trainer = make_trainer(folder, short(**search))
    trainer.strategy = watching = Watching(trainer)
    assert trainer.held_out is not None
    prepare = trainer.held_out.prepare

    def spoiling(crops: Any, step: int) -> Any:
        batch = prepare(crops, step)
        if step in spoil:
            batch.images[1, 2, 3, 4] = torch.nan
        return batch

    trainer.held_out.prepare = spoiling  # type: ignore[method-assign]
    return trainer, watching


def architecture(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v for n, v in state.items() if n.startswith(("alphas.", "betas."))}


def test_what_a_step_sees(tmp_path: Path) -> None:
    """Batch s of each side, each person once an epoch, at the rates of the step that follows."""
    trainer, watching = watched(tmp_path / "run", schedule="steps", milestones=[0.5], decay=0.1)
    trainer.fit()
    assert len(watching.evidence) == trainer.step == 6
    sides = {
        name: [getattr(e, name).index.tolist() for e in watching.evidence]
        for name in ("train", "held_out")
    }
    seen = {name: {row for rows in side for row in rows} for name, side in sides.items()}
    assert not seen["train"] & seen["held_out"]
    assert seen["train"] | seen["held_out"] == set(range(16))
    for side in sides.values():
        assert all(len({*side[i], *side[i + 1]}) == 8 for i in (0, 2, 4)), "an epoch is 2 steps"
    rates = [{round(rate, 9) for rate in e.rates.values()} for e in watching.evidence]
    assert rates == [{1e-3, 1e-2}] * 3 + [{1e-4, 1e-3}] * 3, "the heads' are ten times the others'"
    named = dict(trainer.network.named_parameters())
    assert set(watching.evidence[0].rates) == set(named) - set(architecture(named))  # type: ignore[arg-type]
    assert all(not p.requires_grad for p in architecture(named).values())  # type: ignore[arg-type]


def test_alpha_and_beta_move_by_adam_before_the_weights(tmp_path: Path) -> None:
    """The first step, by hand: Adam's first step is the rate times the gradient's sign."""
    trainer, watching = watched(tmp_path / "run", architecture_learning_rate=0.03, epochs=1.0)
    trainer.fit()
    first, second = watching.states
    for (name, value), gradient in zip(
        architecture(first).items(), watching.gradients[0], strict=True
    ):
        assert not value.any() and gradient.any()
        torch.testing.assert_close(second[name], -0.03 * gradient / (gradient.abs() + 1e-8))
    records = trainer.run.metrics()
    reference = make_trainer(tmp_path / "other", trainer.run.config)
    reference.network.load_state_dict(first)
    with torch.no_grad():
        for name, value in architecture(second).items():
            reference.network.get_parameter(name).copy_(value)
        batch = watching.evidence[0].train
        outputs = reference.network.train()(batch.images)
    loss = cross_entropy(outputs, batch.heatmaps, batch.weights)
    assert records[0]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_penalty_moves_the_architecture_and_not_the_weights(tmp_path: Path) -> None:
    """The same search with and without: the first weights' loss agrees, alpha does not."""
    found = {}
    for name, sparsity in (("with", 50.0), ("without", 0.0)):
        options: dict[str, Any] = dict(sparsity=sparsity, sparsity_start=0.0, epochs=2.0)
        trainer, watching = watched(tmp_path / name, **options)
        with torch.no_grad():
            trainer.network.get_parameter("alphas.all")[0, 0, 1] = 0.5
        trainer.fit()
        found[name] = (trainer.run.metrics(), watching.states)
    records, states = found["with"]
    assert "penalty" not in records[0] and all(r["penalty"] > 0 for r in records[1:])
    assert all("penalty" not in r for r in found["without"][0])
    assert records[0]["loss"] == found["without"][0][0]["loss"]
    decided, free = (
        side[-1]["alphas.all"].softmax(-1).square().sum() for side in (states, found["without"][1])
    )
    assert decided > free, "towards a decision"


def test_before_the_start_they_rest(tmp_path: Path) -> None:
    trainer, watching = watched(tmp_path / "run", architecture_start=0.5)
    trainer.fit()
    moving = [any(v.any() for v in architecture(s).values()) for s in watching.states]
    assert moving == [False] * 4 + [True] * 2
    assert [r["step"] for r in trainer.run.metrics() if "held_out_loss" in r] == [4, 5, 6]


def test_a_non_finite_step_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer, watching = watched(tmp_path / "run", spoil=(2,))
    trainer.fit()
    assert trainer.skipped_architecture_steps == 1 and trainer.skipped_steps == 0
    records = trainer.run.metrics()
    assert [r["step"] for r in records if r.get("architecture_skipped")] == [3]
    before, after, later = watching.states[2:5]
    for name, value in architecture(before).items():
        assert torch.equal(value, after[name]) and not torch.equal(value, later[name])
    assert any(not torch.equal(v, after[n]) for n, v in before.items()), "the weights learn on"
    assert all(torch.isfinite(v).all() for v in state_of(trainer).values())
    step, exp = watching.moments[2][0]["step"], watching.moments[2][0]["exp_avg"]
    assert step == watching.moments[3][0]["step"] and torch.equal(
        exp, watching.moments[3][0]["exp_avg"]
    )
    saved, _ = load_checkpoint(trainer.run)  # type: ignore[misc]
    assert saved["architecture"]["skipped_steps"] == 1


def test_repeated_bad_steps_stop_and_name_the_culprit(tmp_path: Path) -> None:
    trainer, watching = watched(tmp_path / "run", spoil=(0, 1, 3, 4, 5), max_bad_steps=2)
    with pytest.raises(
        PosefabricError,
        match=r"run: 3 architecture steps in a row were not finite at step 6; first in the input",
    ):
        trainer.fit()
    assert trainer.run.state == "failed" and trainer.skipped_architecture_steps == 5
    assert_equal_states(state_of(trainer), watching.states[5])


def test_non_finite_weights_are_found_behind_finite_pictures(tmp_path: Path) -> None:
    trainer, watching = watched(tmp_path / "run", max_bad_steps=0)
    with torch.no_grad():
        keep = trainer.network.get_submodule("parts.all.fabric.cells.3_0.keep")
        keep.get_parameter("weight").fill_(torch.nan)
    with pytest.raises(PosefabricError, match=r"first in parts\.all\.fabric\.cells\.3_0\.keep"):
        trainer.fit()
    for name, value in watching.states[0].items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(value, state_of(trainer)[name]), name


def test_an_unreadable_held_out_picture_keeps_what_was_learned(tmp_path: Path) -> None:
    good = people()
    broken = {"at": -1}

    def read(person: Any) -> Any:
        if person.image_id == broken["at"]:
            raise DataError(f"{person.file}: cut short")
        return good.read_image(person)

    dataset = PersonDataset(
        name="one bad", skeleton=good.skeleton, persons=good.persons, read_image=read
    )
    config = short(epochs=1.0)
    whole = make_trainer(tmp_path / "whole", config, dataset=dataset)
    whole.fit()
    folder = tmp_path / "run"
    trainer = make_trainer(folder, config, dataset=dataset)
    assert trainer.held_out is not None
    broken["at"] = good.persons[trainer.held_out.loader.order(0)[5]].image_id
    with pytest.raises(DataError, match="cut short"):
        trainer.fit()
    assert load_checkpoint(trainer.run)[1] == trainer.step == 1  # type: ignore[index]
    broken["at"] = -1
    trainer = make_trainer(folder, config, dataset=dataset)
    trainer.fit()
    assert losses(folder) == losses(tmp_path / "whole")
    assert_equal_states(state_of(trainer), state_of(whole))


def test_held_out_persons_and_an_optimiser_come_together(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a", short())
    trainer.held_out = None
    with pytest.raises(PosefabricError, match="first_order: held-out persons and an optimiser"):
        trainer.fit()
    trainer = make_trainer(tmp_path / "b", short())
    trainer.strategy = Uniform()
    with pytest.raises(PosefabricError, match="uniform: held-out persons and an optimiser"):
        trainer.fit()
