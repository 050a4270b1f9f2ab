"""A step's gradients part by part against those of the whole network at once, in float64."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from networks import make_fabric_supernet, make_supernet, pose_batches
from torch import Tensor, nn

from posefabric.models.grouped import fast_path
from posefabric.models.network import FabricNetwork, PartNetwork
from posefabric.structures import PoseBatch
from posefabric.train.gradients import add_gradients, separate_parts
from posefabric.train.loss import make_loss

APART = {"one": (2,), "two": (0, 3), "three": (1,)}
MIXED = {"one": (2,), "two": (0, 3), "three": (1, 3)}  # two and three share a keypoint


def a_batch(network: FabricNetwork, dtype: torch.dtype = torch.float64) -> PoseBatch:
    (batch,) = pose_batches(network, 1, persons=3, dtype=dtype)
    batch.weights[0, 1] = batch.weights[1, 2] = 0
    return batch


def by_parts(network: Any, batch: PoseBatch, loss: str, factor: float = 1.0) -> dict[str, Tensor]:
    value = add_gradients(
        network,
        batch,
        loss=loss,
        autocast=contextlib.nullcontext,
        scale=lambda own: own * factor,
    )
    return state(network, value)


def at_once(network: Any, batch: PoseBatch, loss: str, factor: float = 1.0) -> dict[str, Tensor]:
    value = make_loss(loss)(network(batch.images), batch.heatmaps, batch.weights)
    (value * factor).backward()
    return state(network, value.detach())


def state(network: nn.Module, value: Tensor) -> dict[str, Tensor]:
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    buffers = {n: b for n, b in network.named_buffers() if b.is_floating_point()}
    return {"loss": value, **gradients, **buffers}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-9 * float(value.abs().max()) + 1e-12
        assert float((found[name] - value).abs().max()) <= bound, name


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("parts", [APART, MIXED], ids=["apart", "mixed"])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("head", ["heatmap", "vector"])
def test_parts_one_by_one_have_the_gradients_of_the_whole(
    loss: str, parts: dict[str, tuple[int, ...]], fast: bool, head: str
) -> None:
    network = make_supernet(parts=parts, shared_alpha=False, head=head).double().train()
    if fast:
        network = fast_path(network.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    other = copy.deepcopy(network)
    batch = a_batch(network)
    assert_close(by_parts(network, batch, loss, 8.0), at_once(other, batch, loss, 8.0))


def test_a_level_that_does_not_learn_gets_no_gradient() -> None:
    network = make_supernet(parts=APART).double().train()
    for parameter in network.backbone.parameters():
        parameter.requires_grad_(False)
    other = copy.deepcopy(network)
    batch = a_batch(network)
    assert_close(by_parts(network, batch, "mse"), at_once(other, batch, "mse"))
    assert all(parameter.grad is None for parameter in network.backbone.parameters())


def test_a_fabric_backbone_gets_its_gradients_from_every_part() -> None:
    network = make_fabric_supernet(parts=APART).double().train()
    other = copy.deepcopy(network)
    batch = a_batch(network)
    found = by_parts(network, batch, "cross_entropy")
    assert_close(found, at_once(other, batch, "cross_entropy"))
    assert "alphas.backbone" in found


def test_gradients_are_added() -> None:
    network = make_supernet(parts=APART).double().train()
    batch = a_batch(network)
    once = {n: p.clone() for n, p in by_parts(network, batch, "mse").items() if n != "loss"}
    twice = by_parts(network, batch, "mse")
    for name, _ in network.named_parameters():
        torch.testing.assert_close(twice[name], 2 * once[name], rtol=1e-6, atol=1e-12)


def test_one_part_s_maps_are_in_memory_at_a_time() -> None:
    """Each part's backward pass ends before the next part's forward pass begins."""
    network = make_supernet(parts=APART).train()
    events: list[str] = []
    for name, part in network.parts.items():
        assert isinstance(part, PartNetwork)
        part.register_forward_hook(lambda *_, name=name: events.append(f"{name} forward"))
        weight = next(iter(part.head.parameters()))
        weight.register_hook(lambda _, name=name: events.append(f"{name} backward"))
    by_parts(network, a_batch(network, torch.float32), "cross_entropy")
    expected = [f"{name} {way}" for name in APART for way in ("forward", "backward")]
    assert events == expected


def test_parts_that_share_keypoints_stay_together() -> None:
    assert separate_parts(make_supernet(parts=APART).graph) == [
        (["one"], [2]),
        (["two"], [0, 3]),
        (["three"], [1]),
    ]
    assert separate_parts(make_supernet(parts=MIXED).graph) == [
        (["one"], [2]),
        (["two", "three"], [0, 1, 3]),
    ]
    chain = {"one": (0, 1), "two": (2, 3), "three": (1, 2)}
    assert separate_parts(make_supernet(parts=chain).graph) == [
        (["one", "two", "three"], [0, 1, 2, 3])
    ]
