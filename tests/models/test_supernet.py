"""The mixture: relaxations, alpha and beta, and its forward pass computed a second way."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from networks import EVERY, PLAIN, make_supernet
from scipy import optimize
from torch import Tensor
from torch.nn import functional

from posefabric.evaluate.reference import (
    fill_by_name,
    reference_quantities,
    relative_difference,
)
from posefabric.models.backbones import TimmBackbone
from posefabric.models.relaxation import sparsemax
from posefabric.models.supernet import Supernet
from posefabric.space.architecture import Head
from posefabric.space.fabric import FabricShape
from posefabric.structures import PosefabricError


def brute_projection(z: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex, by trying every support."""
    best, nearest = math.inf, z
    for size in range(1, len(z) + 1):
        for support in itertools.combinations(range(len(z)), size):
            point = np.zeros_like(z)
            rows = list(support)
            point[rows] = z[rows] + (1 - z[rows].sum()) / size
            distance = ((point - z) ** 2).sum()
            if point.min() >= 0 and distance < best:
                best, nearest = distance, point
    return nearest


@given(z=arrays(np.float64, st.integers(1, 5), elements=st.floats(-5, 5, width=32)))
@settings(max_examples=60, deadline=None)
def test_sparsemax_is_the_nearest_point_of_the_simplex(z: np.ndarray) -> None:
    found = sparsemax(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(found, brute_projection(z), rtol=0, atol=1e-9)


def test_sparsemax_against_an_optimiser() -> None:
    z = np.array([0.9, 0.2, -0.4, 0.65])
    solved = optimize.minimize(
        lambda p: ((p - z) ** 2).sum(),
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        options={"ftol": 1e-14},
    )
    found = sparsemax(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(found, solved.x, rtol=0, atol=1e-6)
    assert found[2] == 0.0, "an exact zero"


def test_sparsemax_over_batches_and_its_gradient() -> None:
    z = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = sparsemax(z).reshape(-1, 4).numpy()
    for row, logits in zip(rows, z.reshape(-1, 4).numpy(), strict=True):
        np.testing.assert_allclose(row, brute_projection(logits), rtol=0, atol=1e-9)
    assert torch.autograd.gradcheck(sparsemax, (z.requires_grad_(),))


def parameters_of(network: Supernet) -> dict[str, Tensor]:
    named = dict(network.named_parameters())
    return {name: p for name, p in named.items() if name.startswith(("alphas.", "betas."))}


def test_alpha_and_beta_are_registered_with_the_papers_sizes() -> None:
    network = make_supernet()
    assert {n: tuple(p.shape) for n, p in parameters_of(network).items()} == {
        "alphas.upper": (1, 1, 4),
        "alphas.lower": (1, 1, 4),
        "betas.upper": (6, 3),
        "betas.lower": (6, 3),
    }
    assert set(network.arch_parameters()) == {
        "upper.alphas",
        "upper.betas",
        "lower.alphas",
        "lower.betas",
    }
    assert network.arch_parameters()["lower.betas"] is network.betas["lower"]
    percell = make_supernet(shared_alpha=False, hidden_nodes=2, operations=EVERY)
    assert tuple(percell.alphas["upper"].shape) == (6, 3, 11)
    head = {id(p) for p in network.head_parameters()}
    assert not head & {id(p) for p in parameters_of(network).values()}
    assert not head & {id(p) for p in network.backbone.parameters()}


@pytest.mark.parametrize("relaxation", ["softmax", "sparsemax"])
@pytest.mark.parametrize("faithful", [False, True])
def test_alpha_and_beta_gradients_by_finite_differences(relaxation: str, faithful: bool) -> None:
    network = make_supernet(
        relaxation=relaxation, faithful=faithful, hidden_nodes=2, seed=3, head="vector"
    ).double()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        # Inside the simplex, where sparsemax is smooth.
        for parameter in parameters_of(network).values():
            parameter.mul_(0.1)
        pyramid = [level.detach() for level in network.backbone(images)]
    towards = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).double()

    def objective() -> Tensor:
        return (network.head_forward(pyramid) * towards).sum()

    objective().backward()
    step = 1e-7  # small, because few ReLUs may switch within it
    for name, parameter in parameters_of(network).items():
        assert parameter.grad is not None, name
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), 3):
            kept = float(flat[i])
            with torch.no_grad():
                flat[i] = kept + step
                above = objective()
                flat[i] = kept - step
                below = objective()
                flat[i] = kept
            slope = float(above - below) / (2 * step)
            assert float(gradient[i]) == pytest.approx(slope, rel=1e-3, abs=1e-4), (name, i)


@pytest.mark.parametrize("relaxation", ["softmax", "sparsemax"])
def test_absent_sources_weigh_nothing_and_the_others_sum_to_one(relaxation: str) -> None:
    network = make_supernet(relaxation=relaxation, seed=2)
    _, beta = network.probabilities("lower")
    for row, place in enumerate(network.shape.places):
        present = [slot for slot, _, _ in network.shape.sources(*place)]
        absent = [slot for slot in range(3) if slot not in present]
        assert (beta[row, absent] == 0).all()
    torch.testing.assert_close(beta.sum(-1), torch.ones(6))
    beta.square().sum().backward()
    gradient = network.betas["lower"].grad
    assert gradient is not None and (gradient[network.get_buffer("absent_sources")] == 0).all()


def test_the_temperature_divides_the_logits() -> None:
    network = make_supernet(seed=2)
    network.get_buffer("temperature").fill_(0.25)
    alpha, beta = network.probabilities("upper")
    torch.testing.assert_close(alpha, (4 * network.alphas["upper"]).softmax(-1))
    present = ~network.get_buffer("absent_sources")
    expected = (4 * network.betas["upper"]).exp() * present
    torch.testing.assert_close(beta, expected / expected.sum(-1, keepdim=True))
    assert "temperature" in network.state_dict(), "a resumed search goes on at its temperature"


def test_entropies_are_one_at_the_start_and_zero_when_decided() -> None:
    network = make_supernet(relaxation="sparsemax", hidden_nodes=2)
    with torch.no_grad():
        for parameter in network.arch_parameters().values():
            parameter.zero_()
    assert network.entropies() == pytest.approx({"alpha_entropy": 1.0, "beta_entropy": 1.0})
    sources = [len(network.shape.sources(*place)) for place in network.shape.places]
    alpha, beta = network.indecision()
    assert alpha.item() == pytest.approx(3 * (1 - 1 / 4))
    assert beta.item() == pytest.approx(sum(1 - 1 / n for n in sources))
    with torch.no_grad():
        for parameter in network.arch_parameters().values():
            parameter[..., 0] = 5.0
    assert network.entropies() == {"alpha_entropy": 0.0, "beta_entropy": 0.0}
    assert [value.item() for value in network.indecision()] == [0.0, 0.0]


def test_entropies_of_half_a_decision() -> None:
    network = make_supernet(relaxation="sparsemax", parts={"all": (0, 1, 2, 3)})
    with torch.no_grad():
        network.alphas["all"].copy_(torch.tensor([0.0, 0.0, -9.0, -9.0]))
        network.betas["all"].zero_()
        network.betas["all"][0] = torch.tensor([9.0, 0.0, 0.0])
    assert network.entropies() == pytest.approx({"alpha_entropy": 0.5, "beta_entropy": 5 / 6})


def test_a_single_candidate_has_no_entropy() -> None:
    assert make_supernet(operations=("skip",)).entropies()["alpha_entropy"] == 0.0


def test_an_unknown_relaxation() -> None:
    with pytest.raises(PosefabricError, match=r"relaxation=argmax.*softmax, sparsemax"):
        make_supernet(relaxation="argmax")


def part_by_hand(network: Supernet, name: str, pyramid: list[Tensor]) -> Tensor:
    """One part of a mixture, from its description in PAPER section 1, module by module."""
    part = network.parts[name]
    shape = network.shape
    faithful = shape.faithful
    rows = list(shape.places)
    alphas, betas = network.alphas[name], network.betas[name]
    scales = {}
    for level, x in enumerate(pyramid):
        scales[(shape.first_layer - 1, level)] = part.get_submodule(f"reduce.{level}")(x)
    for row, (layer, scale) in enumerate(rows):
        cell = part.get_submodule(f"fabric.cells.{layer}_{scale}")
        kept = shape.sources(layer, scale)
        logits = torch.stack([betas[row, slot] for slot, _, _ in kept])
        beta = logits.softmax(0) * (3 if faithful else 1)
        x = sum(
            weight * cell.get_submodule(f"sources.{slot}")(scales[(layer - 1, source)])
            for weight, (slot, _, source) in zip(beta, kept, strict=True)
        )
        nodes = [functional.relu(x)]
        alpha = alphas[row if len(alphas) > 1 else 0]
        edge = 0
        for j in range(1, shape.hidden_nodes + 1):
            total: Tensor = torch.zeros_like(nodes[0])
            for i in range(j):
                mixture = alpha[edge].softmax(0) * (len(shape.operations) if faithful else 1)
                for weight, operation in zip(mixture, shape.operations, strict=True):
                    total = total + weight * cell.get_submodule(f"edges.{i}-{j}.{operation}")(
                        nodes[i]
                    )
                edge += 1
            nodes.append(total)
        out = cell.get_submodule("keep")(torch.cat(nodes[1:], 1))
        scales[(layer, scale)] = cell.get_submodule("norm")(out)
    x = scales[(shape.depth - 1, 0)]
    convolution = part.get_submodule("head.final_layer.1")
    return convolution(x.clamp(min=0))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(hidden_nodes=3, operations=EVERY),
        dict(shared_alpha=False, hidden_nodes=2, first_layer=4),
        dict(faithful=True, hidden_nodes=2),
        dict(faithful=True, shared_alpha=False, operations=PLAIN[1:]),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_mixture_computed_a_second_way(options: dict, training: bool) -> None:
    network = make_supernet(seed=5, **options).double().train(training)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        found = network(images)
        pyramid = network.backbone(images)
        expected = torch.zeros_like(found)
        for part in network.graph.parts:
            maps = part_by_hand(network, part.name, pyramid)
            for row, keypoint in enumerate(part.keypoints):
                expected[:, keypoint] += maps[:, row]
    # In training mode the backbone has moved its statistics, but uses the batch's own.
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    assert found.shape == (2, 4, 16, 16)


def test_the_graph_tells_the_present_weights() -> None:
    network = make_supernet(seed=6, relaxation="sparsemax", faithful=True)
    alpha, beta = network.probabilities("upper")
    cell = network.architecture().parts[0].cells[4]
    assert [s.weight for s in cell.sources] == pytest.approx((3 * beta[4]).tolist())
    assert [c.weight for c in cell.edges[0].choices] == pytest.approx((4 * alpha[0, 0]).tolist())
    assert (
        network.architecture().faithful and network.graph.parts[0].cells[4].sources[0].weight == 1
    )


# The released model, computed by its own code in float64 (../shared/reference/README.md).

NAMES = {"Zero": "zero", "skip_connect": "skip", "Atr_Conv_3x3": "dil_conv_3x3"}
NAMES["Sep_Conv_3x3"] = "sep_conv_3x3"


def reference_name(name: str, reference: dict) -> str:
    """The released code's name of one of our tensors."""
    operators = reference["cell_config"]["operators"]
    kind, rest = name.split(".", 1)
    if kind == "backbone":
        return "backbone." + rest.removeprefix("body.")
    if kind in ("alphas", "betas"):
        return f"{rest}.{kind}"
    part, place, rest = rest.split(".", 2)
    if place == "reduce":
        level, _, rest = rest.split(".", 2)
        return f"reduce.{list(reference['parts']).index(part)}.{level}.{rest}"
    if place == "head":
        return f"{part}.{rest}"
    _, cell, piece, rest = rest.split(".", 3)
    cell = f"{part}.cell_{cell}"
    if piece == "keep":
        return f"{cell}.channel_keep.{rest}"
    if piece == "sources":
        slot, layer, rest = rest.split(".")
        return f"{cell}.propress_list.{slot}.SOURCE.{layer}.{rest}"
    assert piece == "edges"
    edge, operation, rest = rest.split(".", 2)
    index = [NAMES[o] for o in operators].index(operation)
    assert edge == "0-1"
    return f"{cell}.cell_arch.0.ops.{index}.{rest}"


def load_reference(reference: dict) -> Supernet:
    cells = reference["cell_config"]
    vector = cells["vector_in_pixel"]
    height, width = reference["input"][2:]
    network = Supernet(
        shape=FabricShape(
            depth=cells["depth"],
            first_layer=cells["cut_layers_num"],
            channel_factor=cells["factor"],
            hidden_nodes=cells["hidden_states_num"],
            operations=tuple(NAMES[o] for o in cells["operators"]),
            faithful=True,
        ),
        parts={name: tuple(keypoints) for name, keypoints in reference["parts"].items()},
        backbone=TimmBackbone("resnet50", levels=4),
        skeleton=reference["dataset"],
        keypoint_names=tuple(map(str, range(reference["output"][1]))),
        input_wh=(width, height),
        head=Head(
            kind="vector" if vector else "heatmap", dim=cells["vector_dim"], scores="identity"
        ),
    ).double()
    values = fill_by_name(dict(reference["state"]))
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "num_batches" in name or name == "temperature":
                continue
            theirs = reference_name(name, reference)
            if ".SOURCE." in theirs:
                options = [
                    theirs.replace("SOURCE.conv.", "operation.0.").replace(
                        "SOURCE.norm.", "operation.1."
                    ),
                    theirs.replace("SOURCE.conv.", "conv_1x1.").replace("SOURCE.norm.", "bn."),
                ]
                (theirs,) = [option for option in options if option in values]
            tensor.copy_(values[theirs].view(tensor.shape))
    return network


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnet50_cnf1_coco_heatmap"),
        pytest.param("resnet50_cnf3_coco_vector8", marks=pytest.mark.slow),
    ],
)
def test_the_faithful_mixture_is_the_released_model(shared: Path, name: str) -> None:
    """Heatmaps to 1e-6, loss and gradients of alpha and beta to 1e-8, as the page asks."""
    folder = shared / "reference/posenfs"
    reference = json.loads((folder / f"{name}.json").read_text())
    expected = np.load(folder / f"{name}.npz")
    network = load_reference(reference)
    found = reference_quantities(
        network, reference["input"], reference["output"], arch=network.arch_parameters()
    )
    for key, value in found.items():
        wanted = reference["loss_train"] if key == "loss" else expected[key]
        limit = 1e-6 if key.startswith("heatmaps") else 1e-8
        # Shared alpha has an axis over cells here.
        difference = relative_difference(value.reshape(np.shape(wanted)), wanted)
        assert difference < limit, key
