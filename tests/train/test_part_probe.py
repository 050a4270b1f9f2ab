"""The loss with one part computed anew: what the whole network says, and no trace of it."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from networks import make_fabric_supernet, make_supernet, pose_batches
from torch import Tensor

from posefabric.models.supernet import Supernet
from posefabric.structures import PoseBatch
from posefabric.train.loss import cross_entropy
from posefabric.train.probe import PartProbe


def probe_of(network: Supernet, seen: list[PoseBatch]) -> PartProbe:
    return PartProbe(network, seen, loss=cross_entropy, autocast=contextlib.nullcontext)


def whole_loss(network: Supernet, seen: list[PoseBatch]) -> Tensor:
    other: Any = copy.deepcopy(network).train()
    with torch.no_grad():
        losses = [cross_entropy(other(b.images), b.heatmaps, b.weights) for b in seen]
    return torch.stack(losses).mean()


def test_a_part_computed_anew_is_the_whole_network_with_it_changed() -> None:
    network = make_supernet(shared_alpha=False, seed=1).train()
    seen = pose_batches(network, 2)
    loss_of = probe_of(network, seen)
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    torch.testing.assert_close(loss_of(), whole_loss(network, seen))
    for part in network.shapes:
        kept = network.alphas[part].data.clone()
        network.alphas[part].data[:, :, 1] += 2
        changed = loss_of(part)
        torch.testing.assert_close(changed, whole_loss(network, seen))
        assert abs(float(changed - loss_of())) > 1e-4
        network.alphas[part].data.copy_(kept)
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_fabric_backbone_is_computed_for_all_parts() -> None:
    network = make_fabric_supernet().train()
    (own,) = set(network.shapes) - {part.name for part in network.graph.parts}
    seen = pose_batches(network, 1)
    loss_of = probe_of(network, seen)
    first = loss_of()
    network.betas[own].data[:, 0] += 3
    changed = loss_of(own)
    torch.testing.assert_close(changed, whole_loss(network, seen))
    assert float(changed) != pytest.approx(float(first), abs=1e-6)
