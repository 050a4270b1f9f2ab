"""What trainings cost, and epochs for an equal cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainings import make_config, make_trainer

from posefabric.derive.prune import prune
from posefabric.evaluate.profile import count_macs
from posefabric.models.build import build_baseline
from posefabric.models.compact import build_compact
from posefabric.run import RunFolder
from posefabric.study.compute import (
    epochs_for,
    network_macs,
    passes_of,
    total_cost,
    training_macs,
)


def test_a_cost_is_passes_by_persons_by_macs() -> None:
    phases = [
        {"passes": 5, "persons": 100, "macs": 7, "seconds": 1},
        {"passes": 1, "persons": 30, "macs": 2, "seconds": 1},
    ]
    assert total_cost(phases) == 5 * 100 * 7 + 30 * 2
    # docs/method.md: one more forward and backward pass, and four more.
    assert [passes_of(s) for s in ("synchronous", "first_order", "second_order")] == [1, 2, 5]


def test_epochs_for_a_cost() -> None:
    # 18 persons in batches of 4: 4 steps an epoch, the rest is dropped.
    config = make_config(data=dict(synthetic_train=18))
    assert epochs_for(4 * 10 * 6, macs=10, config=config) == pytest.approx(6 / 4)
    assert epochs_for(4 * 10 * 6 + 19, macs=10, config=config) == pytest.approx(6 / 4)
    assert epochs_for(4 * 10 * 6 + 21, macs=10, config=config) == pytest.approx(7 / 4)
    assert epochs_for(0, macs=10, config=config) == pytest.approx(1 / 4)


def test_macs_grow_with_the_pixels() -> None:
    model = dict(network="simple_baseline", deconv_width=4)
    small = make_config(model=model)
    large = make_config(model=model, data=dict(input_wh=[128, 64]))
    network = build_baseline(small).train()
    # Squeeze-and-excitation costs the same at any size.
    twice = 2 * network_macs(network, small)
    assert network_macs(network, large) == pytest.approx(twice, rel=0.01)


def test_a_search_that_shrinks_costs_the_mean_of_its_steps(tmp_path: Path) -> None:
    config = make_config(search=dict(log_every=1))
    run = RunFolder.create(tmp_path / "run", config=config, kind="search")
    for step, macs in enumerate((300, 200, 100)):
        run.log({"phase": "search", "step": step, "mixture_macs": macs})
    run.log({"phase": "search", "step": 3, "val_PCK": 0.5})
    assert training_macs(run) == 200


def test_macs_are_logged_and_fall_while_a_search_shrinks(tmp_path: Path) -> None:
    search = dict(strategy="shrinking", log_every=1, sources_left=1)
    trainer = make_trainer(tmp_path / "run", make_config(search=search))
    trainer.fit()
    logged = [r["mixture_macs"] for r in trainer.run.metrics() if "mixture_macs" in r]
    assert len(logged) == trainer.total_steps
    assert logged == sorted(logged, reverse=True) and logged[-1] < logged[0]
    network = trainer.network.train()
    assert logged[-1] == count_macs(
        lambda: build_compact(prune(network.architecture())).eval()(torch.zeros(1, 3, 64, 64))
    )
