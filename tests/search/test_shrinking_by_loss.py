"""Shrinking by what the loss rises without an option: in rounds, and set against costs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import make_supernet, pose_batches
from ranks import in_ranks
from torch import Tensor
from trainings import make_config, make_trainer

from posefabric.config import SearchConfig
from posefabric.derive.fit_budget import whole_cost
from posefabric.derive.prune import prune
from posefabric.distributed import place, share
from posefabric.evaluate.profile import count_macs
from posefabric.models.supernet import Supernet
from posefabric.search.closing import Choice, all_choices
from posefabric.search.shrinking import Shrinking
from posefabric.train.loss import cross_entropy, make_loss
from posefabric.train.parallel import Parallel
from posefabric.train.probe import PartProbe

Options = dict[tuple[Choice, int], float]


def strategy(**changes: Any) -> Shrinking:
    options = {"architecture_start": 0.2, "decided_by": 0.8, "operations_left": 3, "rounds": 3}
    return Shrinking(SearchConfig(**{**options, "sources_left": 3, **changes}))


def decide(own: Shrinking, network: Supernet, progress: float) -> dict[str, Any]:
    seen = pose_batches(network, 2)
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
            found = [
                cross_entropy(other(b.images), b.heatmaps, b.weights)
                for b in pose_batches(other, 2)
            ]
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
    network = make_supernet(shared_alpha=False, seed=2, first_layer=4).train()
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
    network = make_supernet(shared_alpha=False, seed=2, first_layer=4).train()
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
    for step, due in ((1, 1 / 3), (3, 2 / 3), (4, 1)):
        assert 0.95 * 0.85**due * whole < costs[step] <= 0.85**due * whole * 1.001
    for choice in all_choices(network):
        options = choice.open_options(network)
        assert options and not any(choice.is_zero(network, option) for option in options)


def test_zero_goes_from_an_edge_that_has_lost_another_option_too() -> None:
    network = make_supernet(shared_alpha=False, seed=2).train()
    edge = Choice("upper", 0, 0)
    (zero,) = [o for o in edge.open_options(network) if edge.is_zero(network, o)]
    gone = edge.open_options(network)[-1]
    edge.close(network, gone)
    decide(strategy(operations_left=3), network, 0.8)
    assert edge.open_options(network) == [
        o for o in range(edge.existing(network)) if o not in (zero, gone)
    ]


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
    own.decide(network, pose_batches(network, 2), lambda part=None: torch.tensor(1.0), 0.5)
    gone = [k for k in saved if k[1] not in k[0].open_options(network)]
    assert [saved[k] for k in gone] == [max(saved.values())]


def test_a_round_costs_what_torch_counts() -> None:
    """Two persons a batch, two batches."""
    network = make_supernet(shared_alpha=False, seed=4).train()
    # The costs of pieces are measured once, which would be counted too.
    whole_cost(network.architecture())
    record: dict[str, Any] = {}
    counted = count_macs(lambda: record.update(decide(strategy(), network, 0.8)))
    # A network without one of its options is counted as a whole one.
    assert counted <= record["worth_macs"] <= 1.025 * counted


def test_ranks_close_as_one_process_and_count_every_person(tmp_path: Path) -> None:
    """In float64, from shares of one and two persons."""
    network = make_supernet(shared_alpha=False, seed=5).double().train()
    seen = pose_batches(network, 2, persons=3, dtype=torch.float64)

    def close(rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rows = share(3, place())
        own = [
            dataclasses.replace(
                batch,
                images=batch.images[rows],
                heatmaps=batch.heatmaps[rows],
                weights=batch.weights[rows],
                index=batch.index[rows],
            )
            for batch in seen
        ]
        other = copy.deepcopy(network)
        with Parallel(other, sync_norms=True, seed=0).step(0):
            loss = make_loss("cross_entropy")
            probe = PartProbe(other, own, loss=loss, autocast=contextlib.nullcontext)
            record = strategy(budget="macs=8M").decide(other, own, probe, 0.2)
        return record, {n: p.detach() for n, p in other.arch_parameters().items()}

    ranks = in_ranks(close, tmp_path)
    record, expected = close(0)
    assert record["closed"] > 0
    for found, logits in ranks:
        assert found == record
        assert all(torch.equal(logits[name], value) for name, value in expected.items())


def test_a_loss_that_is_not_finite_closes_nothing() -> None:
    network, own = make_supernet(seed=1), strategy()

    def broken(part: str | None = None) -> Tensor:
        return torch.tensor(float("nan") if part else 1.0)

    record = own.decide(network, pose_batches(network, 2), broken, 0.8)
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
