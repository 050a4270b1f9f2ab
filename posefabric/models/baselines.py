"""The networks a search is measured against: Branchnet parts, SimpleBaseline, HRNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from posefabric.models.heads import build_head
from posefabric.models.network import PoseNetwork
from posefabric.models.pyramid import PyramidBackbone
from posefabric.space.architecture import Head
from posefabric.space.baseline import Baseline
from posefabric.space.parts import SumOfParts

BOTTLENECK = 4
DECONVOLUTIONS = 3
# A backbone's levels that each of them reads.
LEVELS = {"branchnet": 4, "simple_baseline": 4, "hrnet": 1}


class BaselineNetwork(PoseNetwork):
    """A network described by a :class:`Baseline`; nothing in it is searched."""

    graph: Baseline

    def __init__(self, *, graph: Baseline, backbone: PyramidBackbone) -> None:
        super().__init__(backbone=backbone)
        self.graph = graph

    def architecture(self) -> Baseline:
        return self.graph


class ResidualBlock(nn.Module):
    """1x1 to a quarter of the width, 3x3, 1x1 back, each with batch norm, and the residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // BOTTLENECK)
        self.layers = nn.Sequential(
            *_conv_norm(width, inner, 1),
            nn.ReLU(),
            *_conv_norm(inner, inner, 3),
            nn.ReLU(),
            *_conv_norm(inner, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.layers(x))


class Branch(nn.Module):
    """1x1 to the branch's width, the residual blocks, the head."""

    def __init__(
        self, width_in: int, *, width: int, blocks: int, keypoints: int, head: Head
    ) -> None:
        super().__init__()
        self.reduce = nn.Sequential(*_conv_norm(width_in, width, 1), nn.ReLU())
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.head = build_head(width, keypoints, head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.reduce(x)))


class Branchnet(BaselineNetwork):
    """Hand-made parts: a branch of residual blocks for each, at 1/4 of the input.

    A branch reads all levels of the pyramid, the coarser ones upsampled (bilinear), one after
    another along the channels. That and bottleneck blocks of a quarter of the width give the
    published parameters to 0.2 % (PAPER section 5); neither is described there.
    """

    def __init__(self, *, graph: Baseline, backbone: PyramidBackbone) -> None:
        super().__init__(graph=graph, backbone=backbone)
        self.parts = nn.ModuleDict(
            {
                part.name: Branch(
                    sum(backbone.channels),
                    width=graph.width,
                    blocks=graph.blocks,
                    keypoints=len(part.keypoints),
                    head=graph.head,
                )
                for part in graph.parts
            }
        )
        self.join = SumOfParts([part.keypoints for part in graph.parts], len(graph.keypoint_names))

    def head_forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        finest = pyramid[0]
        levels = [finest]
        for scale, level in enumerate(pyramid[1:], start=1):
            levels.append(functional.interpolate(level, scale_factor=2**scale, mode="bilinear"))
        joined = torch.cat(levels, dim=1)
        return self.join([self.parts[part.name](joined) for part in self.graph.parts])


class SimpleBaseline(BaselineNetwork):
    """Three 4x4 deconvolutions of stride 2 on the deepest level, and the head (Xiao et al., 2018).

    Of the backbone only the level at stride 32 is read.
    """

    def __init__(self, *, graph: Baseline, backbone: PyramidBackbone) -> None:
        super().__init__(graph=graph, backbone=backbone)
        layers: list[nn.Module] = []
        width = backbone.channels[-1]
        for step in range(DECONVOLUTIONS):
            layers.append(
                nn.ConvTranspose2d(width, graph.width, 4, stride=2, padding=1, bias=False)
            )
            nn.init.normal_(layers[-1].weight, std=0.001)  # type: ignore[arg-type]
            layers.append(nn.BatchNorm2d(graph.width))
            # A head begins with the last one's ReLU, but for vector3d's.
            if step < DECONVOLUTIONS - 1 or graph.head.kind == "vector3d":
                layers.append(nn.ReLU())
            width = graph.width
        self.deconvolutions = nn.Sequential(*layers)
        self.head = build_head(graph.width, len(graph.keypoint_names), graph.head)

    def head_forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        return self.head(self.deconvolutions(pyramid[-1]))


class HRNetPose(BaselineNetwork):
    """The head on HRNet's finest resolution (Sun et al., 2019)."""

    def __init__(self, *, graph: Baseline, backbone: PyramidBackbone) -> None:
        super().__init__(graph=graph, backbone=backbone)
        self.head = build_head(backbone.channels[0], len(graph.keypoint_names), graph.head)

    def head_forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        return self.head(pyramid[0])


BASELINES: dict[str, Callable[..., BaselineNetwork]] = {
    "branchnet": Branchnet,
    "simple_baseline": SimpleBaseline,
    "hrnet": HRNetPose,
}


def _conv_norm(width_in: int, width_out: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width_out),
    ]
