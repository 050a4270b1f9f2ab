"""The yardstick: the released code's network and step, eager, fp32, NCHW, nothing made faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from posefabric.config import Config
from posefabric.models.backbones import make_backbone
from posefabric.models.build import make_head, make_shape
from posefabric.models.posenfs_fabric import PosenfsNetwork, PosenfsPart
from posefabric.skeletons import load_skeleton
from posefabric.space.operations import DepthwiseConv2d
from posefabric.space.parts import choose_parts
from posefabric.structures import PoseBatch
from posefabric.train.loss import LOSSES

BASELINE = "faithful eager fp32, NCHW"


def released_network(config: Config) -> PosenfsNetwork:
    """``model.faithful`` of a configuration, computed as the released code does.

    Part after part and candidate after candidate, every product of a weight and a map in
    memory, dilated depthwise convolutions left to the library. Random weights by
    ``config.seed``; outputs as those of the mixture (with ``model.faithful``) of the same
    configuration.
    """
    faithful = config.model_copy(deep=True)
    faithful.model.faithful = True
    torch.manual_seed(config.seed)
    skeleton, shape = load_skeleton(config.data.skeleton), make_shape(faithful)
    backbone: Any = make_backbone(config.model.backbone, levels=shape.pyramid_levels)
    parts = choose_parts(skeleton, config.model.parts, seed=config.seed)
    network = PosenfsNetwork(
        backbone=backbone,
        parts=[
            PosenfsPart(
                shape.graph(name, tuple(keypoints)),
                shape=shape,
                channels=backbone.channels,
                adapted=tuple(backbone.channels) != shape.widths[: len(backbone.channels)],
                head=make_head(config),
                alpha_size=(len(shape.edges), len(shape.operations)),
            )
            for name, keypoints in parts.items()
        ],
        num_keypoints=skeleton.num_keypoints,
    )
    plain: Any = nn.Conv2d
    for module in network.modules():
        if type(module) is DepthwiseConv2d:
            # The same convolution without what was added to it since.
            module.__class__ = plain
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class ReleasedForEvaluation(nn.Module):
    """The yardstick under the runner, which hands over channels_last images."""

    def __init__(self, network: PosenfsNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.contiguous())

    def score_maps(self, outputs: Tensor) -> Tensor:
        return self.network.score_maps(outputs)


def released_steps(
    config: Config,
    batch: PoseBatch,
    device: torch.device,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[], float]:
    """An arm: one step of search on the batch, by one Adam for weights, alpha and beta.

    Returns seconds. The loss is read, as any training does that logs it.
    """
    network = released_network(config).to(device).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=config.search.learning_rate)
    loss_of = LOSSES[config.search.loss]
    images = batch.images.contiguous()

    def step() -> float:
        started = clock()
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(network(images), batch.heatmaps, batch.weights)
        loss.backward()
        optimiser.step()
        float(loss.detach())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - started

    return step
