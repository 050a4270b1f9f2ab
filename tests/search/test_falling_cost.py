"""Shrinking under a budget: the cost of what is open falls, and ends inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import make_supernet

from posefabric.budget import Budget
from posefabric.config import SearchConfig
from posefabric.derive.fit_budget import number, whole_cost
from posefabric.derive.prune import prune
from posefabric.models.supernet import Supernet
from posefabric.search.closing import all_choices
from posefabric.search.cost import ExpectedCost
from posefabric.search.falling_cost import FallingCost
from posefabric.search.shrinking import Shrinking


def macs(network: Supernet) -> int:
    return whole_cost(prune(network.architecture())).macs


def shrinking(budget: str, **changes: Any) -> Shrinking:
    return Shrinking(
        SearchConfig(
            architecture_start=0.2,
            decided_by=0.8,
            sources_left=3,
            budget=budget,
            worth="probability",
            **changes,
        )
    )


@pytest.mark.parametrize("shared", [True, False])
def test_the_cost_falls_to_the_budget_while_each_choice_keeps_one(shared: bool) -> None:
    network = make_supernet(shared_alpha=shared, seed=3)
    whole = macs(network)
    limit = 0.85 * whole
    strategy = shrinking(f"macs={limit:.0f}", operations_left=4)
    costs = {}
    for step in range(11):
        strategy.schedule(network, step / 10)
        costs[step] = macs(network)
    assert costs[0] == costs[2] == whole, "nothing goes before architecture_start"
    assert 0.85 * whole < costs[5] <= (0.85**0.5) * whole * 1.001
    assert 0.75 * whole < costs[8] <= limit
    assert costs[8] == costs[10]
    assert all(choice.open_options(network) for choice in all_choices(network))


@pytest.mark.parametrize("measure", ["macs", "params"])
def test_what_is_open_costs_what_its_graph_costs(measure: str) -> None:
    network = make_supernet(shared_alpha=False, seed=1)
    budget = Budget(measure, 1.0)  # type: ignore[arg-type]
    expected = ExpectedCost(network, budget)
    falling = FallingCost(network, expected)
    graph = prune(network.architecture())
    assert falling.whole == pytest.approx(number(whole_cost(graph), budget), rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    for choice in all_choices(network):
        options = choice.open_options(network)
        if len(options) > 1 and torch.rand((), generator=generator) < 0.5:
            choice.close(network, options[-1])
    alpha_beta = {
        part: tuple((p > 0).float() for p in network.probabilities(part)) for part in network.shapes
    }
    total = expected.constant + sum(
        float(expected.of_weights(part, *masks)) for part, masks in alpha_beta.items()
    )
    graph = prune(network.architecture())
    # Of a backbone that is not read to its end, of_weights counts all levels.
    rest = graph.model_copy(update={"backbone": network.graph.backbone})
    assert total == pytest.approx(number(whole_cost(rest), budget), rel=1e-5)


def test_what_weighs_least_for_its_cost_goes_first() -> None:
    """By brute force: each closable option closed alone, in a copy."""
    network = make_supernet(shared_alpha=False, seed=5)
    expected = ExpectedCost(network, Budget("macs", 1.0))
    now = macs(network)
    worths = {}
    for choice in all_choices(network):
        options = [i for i in choice.open_options(network) if not choice.is_zero(network, i)]
        for option in options if len(options) > 1 else []:
            alpha, beta = (p.detach() for p in network.probabilities(choice.part))
            share = (
                beta[choice.row, option]
                if choice.edge is None
                else alpha[choice.row, choice.edge, option]
            )
            with choice.without(network, option):
                graph = prune(network.architecture())
                rest = graph.model_copy(update={"backbone": network.graph.backbone})
                saved = now - whole_cost(rest).macs
            if saved > 0:
                worths[choice, option] = float(share) / saved
    best = min(worths, key=lambda key: worths[key])
    FallingCost(network, expected).close_down_to(network, now - 1)
    assert best[1] not in best[0].open_options(network)
    gone = sum(c.existing(network) - len(c.open_options(network)) for c in all_choices(network))
    assert gone == 1


def test_a_budget_below_the_least_leaves_one_of_each_and_no_more() -> None:
    network = make_supernet(seed=2)
    strategy = shrinking("macs=1")
    for step in range(11):
        strategy.schedule(network, step / 10)
    for choice in all_choices(network):
        assert len(choice.open_options(network)) >= 1
    before = macs(network)
    strategy.schedule(network, 1.0)
    assert macs(network) == before


def test_shrinking_under_a_budget_that_starts_anew_closes_nothing_twice() -> None:
    network = make_supernet(seed=4)
    budget = f"macs={0.85 * macs(network):.0f}"
    shrinking(budget).schedule(network, 0.6)
    before = macs(network)
    shrinking(budget).schedule(network, 0.6)
    assert macs(network) == before


def test_an_option_that_goes_for_another_changes_the_cost() -> None:
    """As sparsemax can make it: as many options weigh something, but not the same ones."""
    network = make_supernet(shared_alpha=False, seed=1)
    budget = Budget.parse(f"macs={macs(network)}")
    falling = FallingCost(network, ExpectedCost(network, budget))
    (choice, *_) = [c for c in all_choices(network) if c.edge is not None]
    real = [o for o in choice.open_options(network) if not choice.is_zero(network, o)]
    above = []
    for option in real:
        with choice.without(network, option):
            above.append(falling.is_above(network, macs(network) - 1))
            above.append(not falling.is_above(network, macs(network)))
    assert all(above)
