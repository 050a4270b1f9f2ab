"""The expected cost: exact for decided mixtures, differentiable, and felt by a search."""

from __future__ import annotations

import pytest
import torch
from networks import PLAIN, make_supernet
from trainings import make_config

from posefabric.budget import Budget
from posefabric.config import SearchConfig
from posefabric.derive.fit_budget import number, whole_cost
from posefabric.derive.prune import prune
from posefabric.models.build import build_supernet
from posefabric.models.supernet import Supernet
from posefabric.search.cost import ExpectedCost
from posefabric.search.synchronous import Synchronous
from posefabric.space.latency import Piece


def decide(network: Supernet, seed: int) -> None:
    """One operation an edge, one source a cell, never the operation zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.arch_parameters().items():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("alphas"):
                noise[..., 0] = -10
            else:
                part = name.removesuffix(".betas")
                noise = noise.masked_fill(network.absent_of(part), -10)
            best = noise.argmax(-1, keepdim=True)
            parameter.copy_(torch.zeros_like(parameter).scatter(-1, best, 60.0))


class Invented:
    """Milliseconds by a piece's widths and size."""

    def of(self, piece: Piece) -> float:
        return piece.width_in * piece.width_out * piece.size[0] * 1e-4 + len(piece.name)


@pytest.mark.parametrize("measure", ["macs", "params", "latency"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [dict(), dict(hidden_nodes=2, shared_alpha=False)])
def test_a_decided_mixture_costs_what_is_left_of_it(measure: str, seed: int, shape: dict) -> None:
    network = make_supernet(**shape)
    decide(network, seed)
    table = Invented() if measure == "latency" else None
    budget = Budget(measure, 1e6)  # type: ignore[arg-type]
    expected = ExpectedCost(network, budget, table)
    graph = prune(network.architecture(), threshold=1e-6)
    # The expectation leaves the backbone whole, pruning cuts levels that nobody reads.
    rest = whole_cost(graph.model_copy(update={"backbone": network.graph.backbone}), table)
    exact = number(rest, budget)
    assert float(expected(network).detach()) == pytest.approx(exact, rel=1e-5)


def test_gradients_are_those_of_differences() -> None:
    network = make_supernet(operations=PLAIN, seed=2).double()
    expected = ExpectedCost(network, Budget("macs", 1e6))
    parameters = network.arch_parameters()
    gradients = torch.autograd.grad(expected(network), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        flat = parameter.data.view(-1)
        for i in range(0, len(flat), 3):
            values = []
            for step in (1e-5, -2e-5):
                flat[i] += step
                values.append(float(expected(network).detach()))
            flat[i] += 1e-5
            found = (values[0] - values[1]) / 2e-5
            assert found == pytest.approx(float(gradient.view(-1)[i]), rel=1e-3, abs=1.0), name


def test_a_search_is_pressed_only_above_its_budget() -> None:
    network = build_supernet(make_config(), pretrained=False)
    expected = ExpectedCost(network, Budget("macs", 1.0))
    cost = float(expected(network).detach())
    settings = dict(sparsity_start=0.0, budget_weight=2.0)
    tight = Synchronous(SearchConfig(budget=f"macs={cost / 2e6:.3f}M", **settings))  # type: ignore[arg-type]
    loose = Synchronous(SearchConfig(budget=f"macs={cost * 2 / 1e6:.3f}M", **settings))  # type: ignore[arg-type]
    assert float(tight.penalty(network, 0.5).detach()) == pytest.approx(0.5 * 2.0 * 1.0, rel=1e-3)  # type: ignore[arg-type]
    assert float(loose.penalty(network, 0.5).detach()) == 0  # type: ignore[arg-type]
    assert tight.penalty(network, 0.0) is None
    assert tight.readings(network)["expected_macs"] == pytest.approx(cost)
    limit = expected.constant + 0.5 * (cost - expected.constant)
    reachable = Synchronous(SearchConfig(budget=f"macs={limit / 1e6:.4f}M", **settings))  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(network.arch_parameters().values(), lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        penalty = reachable.penalty(network, 1.0)
        assert penalty is not None
        penalty.backward()
        optimiser.step()
    assert reachable.readings(network)["expected_macs"] == pytest.approx(limit, rel=0.02)
