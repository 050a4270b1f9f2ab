"""Shrinking by what the loss rises without an option: in rounds, and set against costs."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import make_supernet
from torch import Tensor
from trainings import make_config, make_trainer

from posefabric.config import SearchConfig
from posefabric.derive.fit_budget import whole_cost
from posefabric.derive.prune import prune
from posefabric.evaluate.profile import count_macs
from posefabric.models.supernet import Supernet
from posefabric.search.closing import Choice, all_choices
from posefabric.search.shrinking import Shrinking
from posefabric.structures import PoseBatch
from posefabric.train.loss import cross_entropy
from posefabric.train.probe import PartProbe

Options = dict[tuple[Choice, int], float]


def strategy(**changes: Any) -> Shrinking:
    options = {"architecture_start": 0.2, "decided_by": 0.8, "operations_left": 3, "rounds": 3}
    return Shrinking(SearchConfig(**{**options, "sources_left": 3, **changes}))


def batches(network: Supernet) -> list[PoseBatch]:
    generator = torch.Generator().manual_seed(3)
    joints = len(network.graph.keypoint_names)
    return [
        PoseBatch(
            images=torch.randn(2, 3, 64, 64, generator=generator),
            heatmaps=torch.rand(2, joints, 16, 16, generator=generator),
            weights=torch.ones(2, joints),
            input_to_image=torch.eye(2, 3).expand(2, 2, 3),
            index=torch.arange(2),
        )
        for _ in range(2)
    ]


def decide(own: Shrinking, network: Supernet, progress: float) -> dict[str, Any]:
    seen = batches(network)
    probe = PartProbe(network, seen, loss=cross_entropy, autocast=contextlib.nullcontext)
    return own.decide(network, seen, probe, progress)


def macs(network: Supernet) -> int:
    return whole_cost(prune(network.architecture())).macs


def closed(network: Supernet) -> int:
    return sum(c.existing(network) - len(c.open_options(network)) for c in all_choices(network))


def rises(network: Supernet) -> Options:
    """By whole networks, each with an option less."""

    def loss(other: Any) -> float:
        with torch.no_grad():
            found = [cross_entropy(other(b.images), b.heatmaps, b.weights) for b in batches(other)]
        return float(torch.stack(found).mean())

    first, found = loss(copy.deepcopy(network).train()), {}
    for choice in all_choices(network):
        for option in choice.open_options(network):
            other = copy.deepcopy(network).train()
            choice.close(other, option)
            found[choice, option] = loss(other) - first
    return found


def test_rounds_lie_between_the_start_and_the_last_decision() -> None:
    shares = [strategy()._share_of_round(p) for p in (0, 0.19, 0.2, 0.49, 0.51, 0.79, 0.8, 1)]
    assert shares == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert strategy(rounds=1)._share_of_round(0.2) == 1
    assert strategy(worth="probability")._share_of_round(0.5) == 0


def test_what_the_loss_misses_least_goes_from_each_edge() -> None:
    network = make_supernet(shared_alpha=False, seed=2).train()
    expected = rises(network)
    own = strategy(rounds=1, operations_left=1)
    record = decide(own, network, 0.5)
    for choice in all_choices(network):
        if choice.edge is None:
            continue
        real = [o for o in range(choice.existing(network)) if not choice.is_zero(network, o)]
        best = max(real, key=lambda option: expected[choice, option])
        assert choice.open_options(network) == [best]
    assert record["closed"] == closed(network) > 0
    assert own.batches_wanted(network, 0.9) == 0, "all is decided"


def test_the_least_loss_for_its_cost_goes_first_under_a_budget() -> None:
    network = make_supernet(shared_alpha=False, seed=2).train()
    whole, expected = macs(network), rises(network)
    ratios = {}
    for (choice, option), rise in expected.items():
        if choice.is_zero(network, option) or len(choice.open_options(network)) < 2:
            continue
        with choice.without(network, option):
            graph = prune(network.architecture())
            rest = graph.model_copy(update={"backbone": network.graph.backbone})
            saved = whole - whole_cost(rest).macs
        if saved > 0:
            ratios[choice, option] = max(0.0, rise) / saved
    own = strategy(budget=f"macs={0.999 * whole:.0f}", rounds=1, operations_left=4)
    assert own.batches_wanted(network, 0.5) == 2, "64 persons of batches of 32"
    decide(own, network, 0.5)
    (gone,) = [k for k in ratios if k[1] not in k[0].open_options(network)]
    assert ratios[gone] == min(ratios.values())


def test_the_cost_falls_round_by_round_into_the_budget() -> None:
    network = make_supernet(shared_alpha=False, seed=3).train()
    whole = macs(network)
    own = strategy(budget=f"macs={0.85 * whole:.0f}")
    costs = []
    for progress in (0.1, 0.2, 0.3, 0.5, 0.8, 1.0):
        wanted = own.batches_wanted(network, progress)
        assert bool(wanted) == (progress in (0.2, 0.5, 0.8)), "a round each"
        own.schedule(network, progress)
        if wanted:
            decide(own, network, progress)
        costs.append(macs(network))
    assert costs[0] == whole and costs[1] == costs[2]
    for step, share in ((1, 1 / 3), (3, 2 / 3), (4, 1)):
        assert 0.95 * 0.85**share * whole < costs[step] <= 0.85**share * whole * 1.001
    for choice in all_choices(network):
        options = choice.open_options(network)
        assert options and not any(choice.is_zero(network, option) for option in options)


def test_of_options_worth_nothing_the_most_expensive_goes() -> None:
    """Wherever it is: the order of the parts decides nothing."""
    network = make_supernet(shared_alpha=False, seed=2).train()
    whole, saved = macs(network), {}
    for choice in all_choices(network):
        options = [o for o in choice.open_options(network) if not choice.is_zero(network, o)]
        for option in options if len(options) > 1 else []:
            with choice.without(network, option):
                graph = prune(network.architecture())
                rest = graph.model_copy(update={"backbone": network.graph.backbone})
                saved[choice, option] = whole - whole_cost(rest).macs
    own = strategy(budget=f"macs={0.999 * whole:.0f}", rounds=1, operations_left=4)
    own.decide(network, batches(network), lambda part=None: torch.tensor(1.0), 0.5)
    gone = [k for k in saved if k[1] not in k[0].open_options(network)]
    assert [saved[k] for k in gone] == [max(saved.values())]


def test_a_round_costs_what_torch_counts() -> None:
    """Two persons a batch, two batches."""
    network = make_supernet(shared_alpha=False, seed=4).train()
    record: dict[str, Any] = {}
    counted = count_macs(lambda: record.update(decide(strategy(), network, 0.8)))
    assert record["worth_macs"] == pytest.approx(counted, rel=0.02)


def test_a_loss_that_is_not_finite_closes_nothing() -> None:
    network, own = make_supernet(seed=1), strategy()

    def broken(part: str | None = None) -> Tensor:
        return torch.tensor(float("nan") if part else 1.0)

    record = own.decide(network, batches(network), broken, 0.8)
    assert record["closed"] == 0 == closed(network)
    assert own.batches_wanted(network, 0.81) > 0, "the next step tries again"


def test_a_budget_nothing_can_meet_ends_the_rounds() -> None:
    network, own = make_supernet(seed=1).train(), strategy(budget="macs=1")
    decide(own, network, 0.8)
    assert own.batches_wanted(network, 0.9) == 0


def test_a_search_logs_its_rounds(tmp_path: Path) -> None:
    search = dict(strategy="shrinking", architecture_start=0.2, rounds=2, worth_persons=20)
    trainer = make_trainer(tmp_path / "run", make_config(search=search))
    trainer.fit()
    rounds = [r for r in trainer.run.metrics() if "worth_macs" in r]
    assert len(rounds) == 2 and all(r["worth_macs"] > 0 for r in rounds)
    assert sum(r["closed"] for r in rounds) == closed(trainer.network)  # type: ignore[arg-type]
    steps = [r["step"] for r in trainer.run.metrics() if "loss" in r]
    assert steps == list(range(1, trainer.total_steps + 1))
