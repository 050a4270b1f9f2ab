"""A step's loss and its gradients: each part goes forward and backward before the next begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posefabric.models.fused_products import Meeting
from posefabric.models.network import FabricNetwork, PoseNetwork
from posefabric.space.architecture import Architecture
from posefabric.space.parts import SumOfParts
from posefabric.structures import PoseBatch
from posefabric.train.loss import loss_share


def add_gradients(
    network: PoseNetwork,
    batch: PoseBatch,
    *,
    loss: str,
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
    scale: Callable[[Tensor], Tensor],
) -> Tensor:
    """Add the gradients of the loss ``loss`` to the parameters'; this rank's share of it, detached.

    A loss is a sum over keypoints, so that parts without a common keypoint have gradients of their
    own: each is computed forward and backward by itself, and the backbone's backward pass comes
    last. That is the gradient of the whole, with one part's maps in memory instead of all.

    Args:
        autocast: makes the context of a forward pass.
        scale: what the loss is multiplied by before its backward pass, as of a GradScaler.
    """
    share = loss_share(loss, batch.weights)
    groups = separate_parts(network.graph) if isinstance(network, FabricNetwork) else []
    if not isinstance(network, FabricNetwork) or len(groups) < 2:
        with autocast():
            outputs = network(batch.images)
        whole = share(_full(outputs), batch.heatmaps, batch.weights)
        scale(whole).backward()
        return whole.detach()
    with autocast():
        pyramid = network.backbone(batch.images)
    levels = [level.detach().requires_grad_(level.requires_grad) for level in pyramid]
    for level in levels:
        level.meeting = Meeting()  # type: ignore[attr-defined]
    losses = []
    for names, keypoints in groups:
        with autocast():
            maps = [network.part_maps(name, levels) for name in names]
            outputs = _joined(network.graph, names, keypoints, maps)
        own = share(_full(outputs), batch.heatmaps[:, keypoints], batch.weights[:, keypoints])
        scale(own).backward()
        losses.append(own.detach())
    slopes = [_slope(level) for level in levels]
    read = [(a, slope) for a, slope in zip(pyramid, slopes, strict=True) if slope is not None]
    if read:
        torch.autograd.backward([a for a, _ in read], [slope for _, slope in read])
    return torch.stack(losses).sum()


def _slope(level: Any) -> Tensor | None:
    """The gradient that all parts together have found for a level; None where none reads it."""
    grad, total = level.grad, level.meeting.total
    return total if grad is None else grad if total is None else grad + total


def separate_parts(graph: Architecture) -> list[tuple[list[str], list[int]]]:
    """Groups of parts that share no keypoint: (names, keypoints, both in the graph's order)."""
    groups: list[tuple[list[str], set[int]]] = []
    for part in graph.parts:
        names, keypoints = [part.name], set(part.keypoints)
        for other in [g for g in groups if g[1] & keypoints]:
            groups.remove(other)
            names, keypoints = other[0] + names, other[1] | keypoints
        groups.append((names, keypoints))
    order = [part.name for part in graph.parts]
    return [(sorted(names, key=order.index), sorted(keypoints)) for names, keypoints in groups]


def _joined(
    graph: Architecture, names: list[str], keypoints: list[int], maps: list[Tensor]
) -> Tensor:
    places = {keypoint: i for i, keypoint in enumerate(keypoints)}
    own = [[places[k] for k in part.keypoints] for part in graph.parts if part.name in names]
    return SumOfParts(own, len(keypoints)).to(maps[0].device)(maps)


def _full(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.element_size() < 4 else outputs
