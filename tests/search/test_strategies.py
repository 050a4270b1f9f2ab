"""What each strategy does to alpha and beta."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from networks import make_supernet
from trainings import make_config, make_trainer

from posefabric.config import SearchConfig
from posefabric.derive.fit_budget import whole_cost
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.build import build_supernet
from posefabric.models.compact import build_compact
from posefabric.models.supernet import Supernet
from posefabric.search.random import Random
from posefabric.search.run_search import STRATEGIES
from posefabric.search.synchronous import Synchronous
from posefabric.search.uniform import Uniform
from posefabric.space.cell import is_zero
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
        "gumbel",
        "gates",
        "beta_decay",
        "partial_channels",
        "perturbation",
        "shrinking",
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
    whole = {"mixture_macs": whole_cost(prune(network.architecture())).macs}
    assert strategy.readings(network) == after | whole


def searched(strategy: str, **options: Any) -> tuple[Supernet, Strategy]:
    config = make_config(search=dict(strategy=strategy, **options))
    network = build_supernet(config, pretrained=False).train()
    made = STRATEGIES[strategy](config.search)
    made.prepare(network, generator(3))
    made.schedule(network, 0.5)
    return network, made


def test_gumbel_draws_one_path_and_moves_only_it() -> None:
    network, strategy = searched("gumbel")
    drawn = []
    for part in network.graph.parts:
        for cell, own in zip(part.cells, network.cell_weights(part), strict=True):
            drawn.append([w for w in own.sources if not is_zero(w)])
            drawn += [[w for w in row if not is_zero(w)] for row in own.choices]
            assert len(own.sources) == len(cell.sources)
    assert all(len(row) == 1 and float(row[0]) == 1.0 for row in drawn)
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    # The softmax ties the options of a row: those not drawn move against the one drawn.
    for parameter in network.betas.values():
        assert parameter.grad is not None
        assert float(parameter.grad.sum(-1).abs().max()) < 1e-6
    again, _ = searched("gumbel")
    for part, (alpha, beta) in network.noise.items():
        assert torch.equal(alpha, again.noise[part][0]) and torch.equal(beta, again.noise[part][1])
    before = {part: pair[0].clone() for part, pair in network.noise.items()}
    strategy.schedule(network, 0.6)
    assert all(not torch.equal(before[part], pair[0]) for part, pair in network.noise.items())


def test_gumbel_draws_by_probability_and_evaluates_the_likeliest() -> None:
    network, strategy = searched("gumbel")
    part = next(iter(network.alphas))
    with torch.no_grad():
        network.alphas[part].copy_(torch.tensor([0.0, 1.0, 2.0, 0.5]))
    expected, _ = network.probabilities(part)
    counts = torch.zeros(4)
    for step in range(1500):
        strategy.schedule(network, step / 1500)
        counts += network.mixing(part)[0].detach()[0, 0]
    assert torch.allclose(counts / 1500, expected.detach()[0, 0], atol=0.05)
    weights = network.eval().mixing(part)[0].detach()[0, 0]
    assert weights.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_what_gumbel_evaluates_is_what_is_derived() -> None:
    """No gap: pruning a mixture of likeliest options is lossless and leaves one path."""
    network, _ = searched("gumbel")
    with torch.no_grad():
        for number, parameter in enumerate(network.arch_parameters().values()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(number)))
            if parameter.ndim == 3:
                parameter[..., 0] = -5
    network.eval()
    graph = prune(network.architecture())
    cells = [cell for part in graph.parts for cell in part.cells]
    assert all(len(c.sources) == 1 and len(c.edges[0].choices) == 1 for c in cells)
    compact = build_compact(graph)
    transfer_weights(network, compact)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compact.eval()(images), network(images), rtol=1e-5, atol=1e-5)


def test_gates_do_not_compete() -> None:
    network, strategy = searched("gates", sparsity=1.0, source_sparsity=1.0, sparsity_start=0.0)
    part = next(iter(network.alphas))
    alpha, beta = network.probabilities(part)
    assert float(alpha.detach().max()) == float(alpha.detach().min()) == 0.5
    assert float(beta.detach().sum(-1).max()) > 1, "several sources may be summed"
    macs = whole_cost(prune(network.architecture())).macs
    expected = {"alpha_entropy": 1, "beta_entropy": 1, "mixture_macs": macs}
    assert strategy.readings(network) == pytest.approx(expected)
    with torch.no_grad():
        network.alphas[part][..., :2] += 0.5
        network.alphas[part][..., 2:] -= 0.5
    optimiser = torch.optim.Adam(network.arch_parameters().values(), lr=0.1)
    for _ in range(80):
        optimiser.zero_grad()
        penalty = strategy.penalty(network, 1.0)
        assert penalty is not None
        penalty.backward()
        optimiser.step()
    decided = network.probabilities(part)[0].detach()
    assert float(decided[..., :2].min()) > 0.95 and float(decided[..., 2:].max()) < 0.05


def test_beta_decay_follows_its_formula_and_flattens() -> None:
    network, strategy = searched("beta_decay", beta_decay_weight=3.0)
    with torch.no_grad():
        for number, parameter in enumerate(network.arch_parameters().values()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(number)))
    rows = []
    for part in network.shapes:
        rows += [math.log(sum(math.exp(v) for v in r)) for r in network.alphas[part][0].tolist()]
        absent = network.absent_of(part)
        for row, gone in zip(network.betas[part].tolist(), absent.tolist(), strict=True):
            there = [v for v, g in zip(row, gone, strict=True) if not g]
            rows.append(math.log(sum(map(math.exp, there))))
    penalty = strategy.penalty(network, 0.4)
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.4 * 3.0 * sum(rows) / len(rows), rel=1e-5)
    assert float(strategy.penalty(network, 0.0)) == 0  # type: ignore[arg-type]
    penalty.backward()
    part = next(iter(network.alphas))
    gradient, logits = network.alphas[part].grad, network.alphas[part].detach()
    assert gradient is not None
    assert torch.equal(gradient.flatten().argsort(), logits.flatten().argsort()), (
        "the larger a logit, the harder it is pulled down"
    )
