"""First- and second-order gradients against autograd through the unrolled step; no traces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import make_supernet
from torch import Tensor, nn
from torch.nn import functional

from posefabric.config import SearchConfig
from posefabric.search.bilevel import FirstOrder, SecondOrder, unrolled_gradients
from posefabric.structures import PoseBatch
from posefabric.train.loss import LOSSES, mean_squared_error
from posefabric.train.optim import make_optimiser, rates_by_name, set_rate, weight_groups
from posefabric.train.probe import Probe
from posefabric.train.strategy import Evidence


class Toy(nn.Module):
    """A smooth network with a batch norm: alpha mixes three functions, beta two branches."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Conv2d(4, 2, 1)
        self.alphas = nn.ParameterDict({"all": nn.Parameter(torch.randn(3))})
        self.betas = nn.ParameterDict({"all": nn.Parameter(torch.randn(2))})

    def arch_parameters(self) -> dict[str, nn.Parameter]:
        return {"all.alphas": self.alphas["all"], "all.betas": self.betas["all"]}

    def forward(self, images: Tensor) -> Tensor:
        a, b = self.alphas["all"].softmax(-1), self.betas["all"].softmax(-1)
        x = self.norm(self.backbone(images))
        x = b[0] * self.left(x) + b[1] * self.right(x)
        x = a[0] * x + a[1] * x.tanh() + a[2] * functional.softplus(x)
        return self.out(self.drop(x))


def make_toy(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    return Toy(dropout).double().train()


def make_batch(seed: int, *, size: int = 4, keypoints: int = 2, stride: int = 1) -> PoseBatch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=generator)
    side = size // stride
    heatmaps = torch.rand(2, keypoints, side, side, dtype=torch.float64, generator=generator)
    return PoseBatch(
        images=images,
        heatmaps=heatmaps,
        weights=torch.ones(2, keypoints, dtype=torch.float64),
        input_to_image=torch.zeros(2, 2, 3),
        index=torch.arange(2),
    )


def make_evidence(
    network: Any, rates: dict[str, float], *, loss: str = "mse", **batch: int
) -> Evidence:
    return Evidence(
        train=make_batch(1, **batch),
        held_out=make_batch(2, **batch),
        rates=rates,
        loss_of=Probe(network, loss=LOSSES[loss]),
    )


def weights_of(network: nn.Module) -> dict[str, nn.Parameter]:
    named = dict(network.named_parameters())
    return {
        n: p
        for n, p in named.items()
        if p.requires_grad and not n.startswith(("alphas.", "betas."))
    }


def exact(
    network: Any, evidence: Evidence, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """The unrolled gradient by autograd through the step of gradient descent itself."""
    network = copy.deepcopy(network)
    weights = weights_of(network)

    def of(batch: PoseBatch, given: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(network, given, (batch.images,))
        return loss(outputs, batch.heatmaps, batch.weights)

    slopes = torch.autograd.grad(
        of(evidence.train, dict(weights)),
        list(weights.values()),
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    moved = {
        name: weight - evidence.rates[name] * slope
        for (name, weight), slope in zip(weights.items(), slopes, strict=True)
    }
    architecture = list(network.arch_parameters().values())
    return list(torch.autograd.grad(of(evidence.held_out, moved), architecture))


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over largest value."""
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, expected))
    return float((a - b).abs().max() / b.abs().max())


def unrolled(network: Any, evidence: Evidence, perturbation: float = 0.01) -> list[Tensor]:
    return unrolled_gradients(
        list(network.arch_parameters().values()),
        weights_of(network),
        evidence,
        rates=evidence.rates,
        perturbation=perturbation,
    )[1]


@pytest.mark.parametrize("backbone_rate", [0.5, 0.05, 0.0])
def test_the_second_order_gradient_is_the_unrolled_one(backbone_rate: float) -> None:
    """One rate, two rates, and a backbone that rests."""
    network = make_toy()
    rates = {n: 0.5 if "backbone" not in n else backbone_rate for n in weights_of(network)}
    evidence = make_evidence(network, rates)
    expected = exact(network, evidence, mean_squared_error)
    assert difference(unrolled(network, evidence), expected) < 1e-4

    # Central differences: the error falls with the square of the perturbation.
    errors = [difference(unrolled(network, evidence, e), expected) for e in (1.0, 0.1, 0.01)]
    assert 50 < errors[0] / errors[1] < 200 and 50 < errors[1] / errors[2] < 200
    assert difference(unrolled(network, evidence, 1e-4), expected) < 1e-8

    still = FirstOrder(SearchConfig()).architecture_gradients(network, evidence, 0.0)
    assert still is not None
    assert difference(still[1], expected) > 0.01, "the second term matters here"


def test_it_is_darts_equations_by_hand() -> None:
    """The same numbers from equations 7 and 8 as printed, with one xi and their epsilon."""
    network, xi = make_toy(), 0.5
    evidence = make_evidence(network, dict.fromkeys(weights_of(network), xi))
    architecture = list(network.arch_parameters().values())
    names, weights = zip(*weights_of(network).items(), strict=True)

    def moved(by: list[Tensor], step: Any) -> Any:
        other = copy.deepcopy(network)
        with torch.no_grad():
            for name, change in zip(names, by, strict=True):
                other.get_parameter(name).add_(step * change)
        return other

    def gradients(model: Any, batch: PoseBatch, of: list[Any]) -> list[Tensor]:
        loss = mean_squared_error(model(batch.images), batch.heatmaps, batch.weights)
        return list(torch.autograd.grad(loss, of))

    copied = copy.deepcopy(network)
    slopes = gradients(copied, evidence.train, [copied.get_parameter(n) for n in names])
    ahead = moved(slopes, -xi)
    own = list(ahead.arch_parameters().values())
    v = gradients(ahead, evidence.held_out, [ahead.get_parameter(n) for n in names])
    epsilon = 0.01 / torch.cat([t.flatten() for t in v]).norm()
    up, down = moved(v, epsilon), moved(v, -epsilon)
    expected = [
        g - xi * (a - b) / (2 * epsilon)
        for g, a, b in zip(
            gradients(ahead, evidence.held_out, own),
            gradients(up, evidence.train, list(up.arch_parameters().values())),
            gradients(down, evidence.train, list(down.arch_parameters().values())),
            strict=True,
        )
    ]
    assert difference(unrolled(network, evidence), expected) < 1e-9
    assert len(architecture) == 2 and len(weights) == 10


@pytest.mark.parametrize("relaxation", ["softmax", "sparsemax"])
def test_of_a_supernet(relaxation: str) -> None:
    """Real cells, with ReLUs: away from their kinks a small perturbation is exact."""
    network = make_supernet(relaxation=relaxation, channel_factor=1).double().train()
    if relaxation == "sparsemax":
        with torch.no_grad():
            network.alphas["lower"][0, 0] = torch.tensor([0.1, 0.2, 0.3, -5.0])
    rates = dict.fromkeys(weights_of(network), 0.01)
    evidence = make_evidence(network, rates, loss="cross_entropy", size=64, keypoints=4, stride=4)
    expected = exact(network, evidence, LOSSES["cross_entropy"])
    before = copy.deepcopy(network.state_dict())
    found = unrolled(network, evidence, perturbation=1e-6)
    assert difference(found, expected) < 1e-4
    assert_same_state(network, before)
    still = FirstOrder(SearchConfig()).architecture_gradients(network, evidence, 0.0)
    assert still is not None
    assert difference(still[1], expected) > 1e-3, "the second term matters here"


def assert_same_state(network: nn.Module, before: dict[str, Tensor]) -> None:
    after = network.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("strategy", [FirstOrder, SecondOrder])
def test_nothing_moves_while_a_step_is_computed(strategy: type[FirstOrder]) -> None:
    network = make_supernet(channel_factor=1).double().train()
    network.backbone.body.conv_stem.weight.requires_grad_(False)
    network.add_module("dropout", nn.Dropout(0.5))
    network.register_forward_hook(lambda module, _, out: module.get_submodule("dropout")(out))
    made = strategy(SearchConfig())
    made.prepare(network, torch.Generator())
    optimiser = make_optimiser(weight_groups(network, SearchConfig()))
    set_rate(optimiser, 0.7)
    rates = rates_by_name(network, optimiser)
    assert set(rates) == set(weights_of(network))
    assert {round(rate, 9) for rate in rates.values()} == {0.7e-3, 0.7e-2}, "heads are faster"
    for parameter in network.arch_parameters().values():
        parameter.requires_grad_(True)
    evidence = make_evidence(network, rates, size=64, keypoints=4, stride=4)
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    identities = {name: id(p) for name, p in network.named_parameters()}
    before = copy.deepcopy(network.state_dict())
    assert any("num_batches_tracked" in name for name in before)
    random_state = torch.get_rng_state()

    found = made.architecture_gradients(network, evidence, 0.5)

    assert found is not None and all(g.abs().max() > 0 for g in found[1])
    assert_same_state(network, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags
    assert {name: id(p) for name, p in network.named_parameters()} == identities
    assert all(p.grad is None for p in network.parameters())
    assert network.training and not optimiser.state
    again = made.architecture_gradients(network, evidence, 0.5)
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(found[1], again[1], strict=True))


def test_all_four_losses_see_the_same_dropout() -> None:
    """Else the difference of two masks, over a tiny perturbation, would drown the gradient."""
    network = make_toy(dropout=0.5)
    evidence = make_evidence(network, dict.fromkeys(weights_of(network), 0.5))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drop = network.drop.forward

    def seeded(x: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return drop(x)

    found = unrolled(network, evidence)
    network.drop.forward = seeded
    assert difference(found, exact(network, evidence, mean_squared_error)) < 1e-4


def test_the_first_order_gradient_is_autograd_on_the_held_out_batch() -> None:
    network = make_toy()
    evidence = make_evidence(network, dict.fromkeys(weights_of(network), 0.5))
    found = FirstOrder(SearchConfig()).architecture_gradients(network, evidence, 0.0)
    assert found is not None
    other = copy.deepcopy(network)
    batch = evidence.held_out
    loss = mean_squared_error(other(batch.images), batch.heatmaps, batch.weights)
    loss.backward()
    assert torch.equal(found[0], loss.detach())
    for gradient, parameter in zip(found[1], other.arch_parameters().values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-15)


def test_xi_is_an_option_and_zero_is_first_order() -> None:
    network = make_toy()
    evidence = make_evidence(network, dict.fromkeys(weights_of(network), 0.5))
    other = make_evidence(network, dict.fromkeys(weights_of(network), 0.2))

    def gradients(strategy: FirstOrder) -> list[Tensor]:
        found = strategy.architecture_gradients(network, evidence, 0.0)
        assert found is not None
        return found[1]

    present = gradients(SecondOrder(SearchConfig()))
    assert difference(present, exact(network, evidence, mean_squared_error)) < 1e-4
    given = gradients(SecondOrder(SearchConfig(unrolled_rate=0.2)))
    assert difference(given, exact(network, other, mean_squared_error)) < 1e-4
    first = gradients(FirstOrder(SearchConfig()))
    assert difference(gradients(SecondOrder(SearchConfig(unrolled_rate=0))), first) < 1e-12


@pytest.mark.parametrize("strategy", [FirstOrder, SecondOrder])
def test_options(strategy: type[FirstOrder]) -> None:
    network = make_supernet()
    options = SearchConfig(
        architecture_share=0.3,
        architecture_learning_rate=0.02,
        architecture_weight_decay=0.004,
        architecture_start=0.25,
    )
    made = strategy(options)
    made.prepare(network, torch.Generator())
    assert all(not p.requires_grad for p in network.arch_parameters().values())
    assert made.held_out_share() == 0.3 and made.parameter_groups(network) == []
    (group,) = made.architecture_optimiser(network).param_groups
    assert type(made.architecture_optimiser(network)) is torch.optim.Adam
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.02, 0.004, (0.5, 0.999))
    assert {id(p) for p in group["params"]} == {id(p) for p in network.arch_parameters().values()}
    toy = make_toy()
    evidence = make_evidence(toy, dict.fromkeys(weights_of(toy), 0.5))
    assert made.architecture_gradients(toy, evidence, 0.24) is None
    assert made.architecture_gradients(toy, evidence, 0.25) is not None
