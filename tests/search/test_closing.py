"""Strategies that close options one by one: shrinking, and selection by perturbation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import make_supernet, pose_batches

from posefabric.config import SearchConfig
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.compact import build_compact
from posefabric.models.supernet import Supernet
from posefabric.search.closing import Choice, all_choices, decided_share, left_open, probabilities
from posefabric.search.perturbation import Perturbation
from posefabric.search.shrinking import Shrinking
from posefabric.structures import PoseBatch
from posefabric.train.loss import make_loss
from posefabric.train.probe import Probe
from posefabric.train.strategy import Evidence


def blank(**changes: Any) -> Supernet:
    network = make_supernet(**changes)
    with torch.no_grad():
        for parameter in network.arch_parameters().values():
            parameter.zero_()
    return network


def options(**changes: Any) -> SearchConfig:
    return SearchConfig(
        **{
            "architecture_start": 0.2,
            "decided_by": 0.8,
            "sources_left": 1,
            "worth": "probability",
            **changes,
        }
    )


def undecided(network: Supernet, config: SearchConfig) -> list[Choice]:
    found = all_choices(network)
    return [c for c in found if len(c.open_options(network)) > left_open(network, c, config)]


def evidence(network: Supernet, loss_of: Any = None) -> Evidence:
    batch = pose_batches(network, 1)[0]
    probe = Probe(network, loss=make_loss("cross_entropy"))
    return Evidence(train=batch, held_out=batch, rates={}, loss_of=loss_of or probe)


@pytest.mark.parametrize("relaxation", ["softmax", "sparsemax"])
def test_a_closed_option_weighs_nothing_and_stays_closed(relaxation: str) -> None:
    network = blank(relaxation=relaxation)
    choices = all_choices(network)
    operation = next(c for c in choices if c.edge is not None)
    sources = next(c for c in choices if c.edge is None and c.existing(network) == 3)
    for choice in (operation, sources):
        choice.close(network, 1)
        assert 1 not in choice.open_options(network)
        assert probabilities(network, choice)[1] == 0
        assert probabilities(network, choice).sum() == pytest.approx(1)
    network.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    for choice in (operation, sources):
        own = network.alphas if choice.edge is not None else network.betas
        gradient = own[choice.part].grad
        assert gradient is not None
        rows = gradient[choice.row] if choice.edge is None else gradient[choice.row, choice.edge]
        assert rows[1] == 0 and rows.abs().sum() > 0, "what is open still learns"
    assert all(0 <= value < 1 for value in network.entropies().values())


def test_a_choice_is_put_back_as_it_was_even_after_an_error() -> None:
    network = make_supernet()
    before = copy.deepcopy(network.state_dict())
    choice = all_choices(network)[0]
    with pytest.raises(RuntimeError), choice.without(network, 0):
        assert probabilities(network, choice)[0] == 0
        raise RuntimeError
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_border_cells_count_the_sources_they_have() -> None:
    network = blank()
    counts = {c.existing(network) for c in all_choices(network) if c.edge is None}
    assert counts == {2, 3}
    for choice in all_choices(network):
        assert len(choice.open_options(network)) == choice.existing(network)


def test_decisions_are_spread_over_their_share_of_the_search() -> None:
    config = options()
    shares = [decided_share(config, p) for p in (0, 0.2, 0.5, 0.8, 1)]
    assert shares == pytest.approx([0, 0, 0.5, 1, 1])
    assert decided_share(options(architecture_start=0.8, decided_by=0.8), 0.9) == 1


def test_shrinking_closes_the_least_likely_in_equal_intervals() -> None:
    network, config = blank(), options()
    with torch.no_grad():
        for alpha in network.alphas.values():
            alpha.copy_(torch.tensor([0.3, 0.1, 0.4, 0.2]).expand_as(alpha))
        for beta in network.betas.values():
            beta.copy_(torch.tensor([0.1, 0.3, 0.2]).expand_as(beta))
    strategy = Shrinking(config)
    operation = all_choices(network)[0]
    seen = {}
    for progress in (0.0, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0):
        strategy.schedule(network, progress)
        seen[progress] = operation.open_options(network)
    assert seen == {
        0.0: [0, 1, 2, 3],
        0.25: [0, 1, 2, 3],
        0.35: [0, 2, 3],
        0.5: [0, 2],
        0.65: [0, 2],
        0.8: [2],
        1.0: [2],
    }
    for choice in all_choices(network):
        if choice.edge is None and choice.existing(network) == 3:
            assert choice.open_options(network) == [1]
    assert not undecided(network, config)


def test_zero_never_wins_an_edge() -> None:
    network, config = blank(), options()
    zero = network.shape.operations.index("zero")
    with torch.no_grad():
        for alpha in network.alphas.values():
            alpha[..., zero] = 5.0
    Shrinking(config).schedule(network, 0.5)
    operations = [c for c in all_choices(network) if c.edge is not None]
    assert operations and all(zero in c.open_options(network) for c in operations)
    Shrinking(config).schedule(network, 1.0)
    assert all(zero not in c.open_options(network) for c in operations)
    other = blank()
    strategy = Perturbation(config)
    strategy.prepare(other, torch.Generator().manual_seed(0))
    strategy.architecture_gradients(other, evidence(other), 1.0)
    assert all(zero not in c.open_options(other) for c in operations)


def test_shrinking_that_starts_anew_closes_nothing_twice() -> None:
    network = blank()
    Shrinking(options()).schedule(network, 0.5)
    before = copy.deepcopy(network.state_dict())
    Shrinking(options()).schedule(network, 0.5)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_what_is_shrunk_is_pruned_without_loss() -> None:
    network, config = blank(), options(operations_left=2, sources_left=2)
    Shrinking(config).schedule(network, 1.0)
    counts = {len(c.open_options(network)) for c in all_choices(network)}
    assert counts == {2}
    network.eval()
    graph = prune(network.architecture())
    compact = build_compact(graph)
    transfer_weights(network, compact)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(compact.eval()(images), network(images), atol=1e-5)
    edges = [e for part in graph.parts for cell in part.cells for e in cell.edges]
    assert edges and max(len(edge.choices) for edge in edges) <= 2


def test_without_numbers_a_budget_decides_how_many_stay() -> None:
    network, free = blank(), {"operations_left": None, "sources_left": None}
    edge, cell = Choice("upper", 0, 0), Choice("upper", 0)

    def left(**changes: Any) -> list[int]:
        config = options(**{**free, **changes})
        return [left_open(network, choice, config) for choice in (edge, cell)]

    real = edge.existing(network) - 1
    assert left() == [1, 2]
    assert left(budget="macs=9M") == [real, cell.existing(network)], "zero is none of them"
    assert left(budget="macs=9M", strategy="perturbation") == [1, 2]
    assert left(budget="macs=9M", operations_left=2) == [2, cell.existing(network)]


def test_perturbation_keeps_what_the_loss_misses_most() -> None:
    """The first decision, against the losses of networks each built with an option missing."""
    network, config = make_supernet(), options()
    strategy = Perturbation(config)
    strategy.prepare(network, torch.Generator().manual_seed(4))
    whole = copy.deepcopy(network)
    total = len(undecided(network, config))
    just_one = 0.2 + 0.6 * 0.5 / total
    assert strategy.architecture_gradients(network, evidence(network), just_one) is None
    left = set(undecided(network, config))
    (decided,) = [c for c in undecided(whole, config) if c not in left]
    losses = {}
    for option in decided.open_options(whole):
        other = copy.deepcopy(whole)
        decided.close(other, option)
        losses[option] = float(evidence(other).loss_of(evidence(other).held_out).detach())
    losses = {i: loss for i, loss in losses.items() if not decided.is_zero(network, i)}
    assert decided.open_options(network) == [max(losses, key=lambda option: losses[option])]
    weights = {n: p for n, p in whole.named_parameters() if not n.startswith(("alphas", "betas"))}
    now = dict(network.named_parameters())
    assert all(torch.equal(weight, now[name]) for name, weight in weights.items())


def test_perturbation_has_decided_all_in_time_and_waits_for_finite_losses() -> None:
    network, config = blank(), options()
    strategy = Perturbation(config)
    strategy.prepare(network, torch.Generator().manual_seed(0))
    count = len(undecided(network, config))
    assert count > 4
    calls = torch.zeros(())

    def broken(batch: PoseBatch, weights: Any = None, *, exact: bool = False) -> torch.Tensor:
        del batch, weights, exact
        return calls * float("nan")

    strategy.architecture_gradients(network, evidence(network, broken), 0.9)
    assert len(undecided(network, config)) == count, "nothing is decided by a loss of NaN"
    strategy.architecture_gradients(network, evidence(network), 0.1)
    assert len(undecided(network, config)) == count, "not before architecture_start"
    strategy.architecture_gradients(network, evidence(network), 0.5)
    half = len(undecided(network, config))
    assert half == count - -(-count // 2)
    strategy.architecture_gradients(network, evidence(network), 0.8)
    assert not undecided(network, config)


def test_the_order_of_decisions_comes_from_the_seed() -> None:
    def first(seed: int) -> Choice:
        network, strategy = blank(), Perturbation(options())
        strategy.prepare(network, torch.Generator().manual_seed(seed))
        return strategy._in_order(network)[0]

    assert first(1) == first(1)
    assert len({first(seed) for seed in range(8)}) > 3
