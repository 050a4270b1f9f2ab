"""What each strategy does to alpha and beta."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from networks import make_supernet
from trainings import make_config, make_trainer

from posefabric.config import SearchConfig
from posefabric.models.supernet import Supernet
from posefabric.search.random import Random
from posefabric.search.run_search import STRATEGIES
from posefabric.search.synchronous import Synchronous
from posefabric.search.uniform import Uniform
from posefabric.train.optim import make_optimiser, weight_groups
from posefabric.train.strategy import Strategy


def blank() -> Supernet:
    network = make_supernet()
    with torch.no_grad():
        for parameter in network.arch_parameters().values():
            parameter.zero_()
    return network


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_option_has_its_strategy() -> None:
    for name in get_args(SearchConfig.model_fields["strategy"].annotation):
        made = STRATEGIES[name](SearchConfig(strategy=name))
        assert made.name == name and isinstance(made, Strategy)
    assert set(STRATEGIES) == {
        "uniform",
        "random",
        "synchronous",
        "first_order",
        "second_order",
    }


def test_the_plain_contract_does_nothing() -> None:
    network, strategy = blank(), Strategy()
    before = copy.deepcopy(network.state_dict())
    strategy.prepare(network, generator(0))
    strategy.schedule(network, 0.5)
    assert strategy.parameter_groups(network) == [] and strategy.penalty(network, 1.0) is None
    assert strategy.readings(network) == {}
    assert strategy.held_out_share() == 0 and strategy.architecture_optimiser(network) is None
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_uniform_rests_at_zero() -> None:
    network, strategy = blank(), Uniform()
    strategy.prepare(network, generator(0))
    assert all(not p.requires_grad for p in network.arch_parameters().values())
    assert strategy.parameter_groups(network) == []
    assert strategy.readings(network) == pytest.approx({"alpha_entropy": 1, "beta_entropy": 1})
    network(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in network.arch_parameters().values())


def test_random_draws_from_the_seed_and_rests() -> None:
    network = blank()

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(99)  # the global generator has no say
        Random().prepare(network, generator(seed))
        assert all(not p.requires_grad for p in network.arch_parameters().values())
        return torch.cat([p.flatten() for _, p in sorted(network.arch_parameters().items())])

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    many = torch.cat([drawn(seed) for seed in range(40)])
    assert abs(many.mean()) < 0.1 and abs(many.std() - 1) < 0.1, "from N(0, 1)"


def test_the_runs_seed_draws_the_random_architecture(tmp_path: Path) -> None:
    """Two trainings of a seed agree in all of alpha and beta, another seed in none of it."""

    def trained(name: str, seed: int) -> torch.Tensor:
        options = dict(strategy="random", epochs=0.25)
        trainer = make_trainer(tmp_path / name, make_config(seed=seed, search=options))
        trainer.fit()
        parameters = trainer.network.arch_parameters()  # type: ignore[attr-defined]
        return torch.cat([p.detach().flatten() for p in parameters.values()])

    first, again, other = trained("a", 3), trained("b", 3), trained("c", 4)
    assert torch.equal(first, again) and not (first == other).any()
    assert first.abs().min() > 0, "drawn, not left at zero"


def config(**changes) -> SearchConfig:
    options = dict(
        temperature_end=0.1,
        sparsity=0.2,
        source_sparsity=0.3,
        sparsity_start=0.4,
        architecture_start=0.25,
        architecture_learning_rate=0.03,
    )
    return SearchConfig(**{**options, **changes})


def test_synchronous_has_a_rate_of_its_own_and_no_decay() -> None:
    network = blank()
    (group,) = Synchronous(config()).parameter_groups(network)
    assert group["lr"] == 0.03 and group["weight_decay"] == 0.0
    expected = {id(p) for p in network.arch_parameters().values()}
    assert {id(p) for p in group["params"]} == expected  # type: ignore[attr-defined]
    weights = weight_groups(network, SearchConfig())
    make_optimiser([*weights, group])  # refuses a parameter that is in two groups


def test_the_temperature_falls_geometrically() -> None:
    network, strategy = blank(), Synchronous(config())
    seen = {}
    for progress in (0.0, 0.4, 0.55, 0.7, 0.85, 1.0):
        strategy.schedule(network, progress)
        seen[progress] = network.get_buffer("temperature").item()
    assert seen[0.0] == seen[0.4] == 1.0 and seen[1.0] == pytest.approx(0.1)
    assert seen[0.7] == pytest.approx(math.sqrt(0.1))
    assert seen[0.55] / seen[0.7] == pytest.approx(seen[0.85] / seen[1.0])


def test_alpha_and_beta_move_from_their_start_on() -> None:
    network, strategy = blank(), Synchronous(config())
    strategy.schedule(network, 0.24)
    assert all(not p.requires_grad for p in network.arch_parameters().values())
    strategy.schedule(network, 0.25)
    assert all(p.requires_grad for p in network.arch_parameters().values())


def test_the_penalty_rises_and_drives_to_decisions() -> None:
    network, strategy = blank(), Synchronous(config())
    assert strategy.penalty(network, 0.4) is None
    alpha, beta = (value.detach() for value in network.indecision())
    for progress, share in ((0.7, 0.5), (1.0, 1.0)):
        penalty = strategy.penalty(network, progress)
        assert penalty is not None
        expected = share * (0.2 * alpha + 0.3 * beta)
        assert penalty.item() == pytest.approx(expected.item())
    assert Synchronous(config(sparsity=0, source_sparsity=0)).penalty(network, 1.0) is None
    only = Synchronous(config(sparsity=0)).penalty(network, 1.0)
    assert only is not None and only.item() == pytest.approx(0.3 * beta.item())

    with torch.no_grad():
        for i, parameter in enumerate(network.arch_parameters().values()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(i)))
    before = network.entropies()
    optimiser = torch.optim.SGD(network.arch_parameters().values(), lr=10.0)
    for _ in range(60):
        optimiser.zero_grad()
        penalty = strategy.penalty(network, 1.0)
        assert penalty is not None
        penalty.backward()
        optimiser.step()
    after = network.entropies()
    assert after["alpha_entropy"] < 0.7 * before["alpha_entropy"]
    assert after["beta_entropy"] < 0.7 * before["beta_entropy"]
    assert strategy.readings(network) == after
