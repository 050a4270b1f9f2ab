"""What all networks share, and the body of a mixture and a compact one: fabrics, heads, sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from posefabric.data.batch import Normalisation
from posefabric.models.fabric_backbone import FabricBackbone
from posefabric.models.heads import build_head, score_maps
from posefabric.models.pyramid import PyramidBackbone
from posefabric.space.architecture import Architecture, Head, Part
from posefabric.space.baseline import Baseline
from posefabric.space.fabric import (
    CellWeights,
    Fabric,
    adapt_width,
    level_widths,
    pyramid_scales,
)
from posefabric.space.parts import SumOfParts


class PartNetwork(nn.Module):
    """One part: 1x1 convolutions to the node widths, the fabric, the head."""

    def __init__(
        self, part: Part, *, channels: Sequence[int], head: Head, first_layer: int, faithful: bool
    ) -> None:
        super().__init__()
        widths = level_widths(part)
        # The released code looks at the finest level alone; what a level reads is not cut with
        # the pyramid's deeper levels.
        same = channels[0] == widths[0]
        self.reduce = nn.ModuleDict()
        for scale in pyramid_scales(part, first_layer):
            self.reduce[str(scale)] = adapt_width(
                channels[scale], widths[scale], faithful, if_equal=not same
            )
        self.fabric = Fabric(part, first_layer=first_layer, faithful=faithful)
        self.head = build_head(widths[0], len(part.keypoints), head)

    def forward(self, pyramid: Sequence[Tensor], weights: Sequence[CellWeights]) -> Tensor:
        """Pyramid levels, finest first, to the part's raw outputs (B, K_p, H/4, W/4)."""
        levels = {int(scale): reduce(pyramid[int(scale)]) for scale, reduce in self.reduce.items()}
        return self.head(self.fabric(levels, weights, finest=pyramid[0]))


class PoseNetwork(nn.Module):
    """What training, evaluation and export know of a network, fabric or baseline.

    Images (B, 3, H, W), normalised, in; raw outputs (B, K, H/4, W/4) out, which
    :meth:`score_maps` turns into scores. ``graph`` tells what it is, its head and keypoints.
    """

    graph: Architecture | Baseline

    def __init__(self, *, backbone: PyramidBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def normalisation(self) -> Normalisation:
        own = self.backbone.normalisation
        return dataclasses.replace(own, channel_order=self.graph.channel_order)

    def architecture(self) -> Architecture | Baseline:
        """The graph as it stands now, with its weights."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.head_forward(self.backbone(images))

    def head_forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Everything after the backbone: pyramid levels to raw outputs (B, K, H/4, W/4)."""
        raise NotImplementedError

    def score_maps(self, outputs: Tensor) -> Tensor:
        return score_maps(outputs, self.graph.head)


class FabricNetwork(PoseNetwork):
    """A network built from a graph; subclasses say what the graph's choices weigh."""

    graph: Architecture

    def __init__(self, *, graph: Architecture, backbone: PyramidBackbone) -> None:
        super().__init__(backbone=backbone)
        self.graph = graph
        self.parts = nn.ModuleDict(
            {
                part.name: PartNetwork(
                    part,
                    channels=backbone.channels,
                    head=graph.head,
                    first_layer=graph.first_layer,
                    faithful=graph.faithful,
                )
                for part in graph.parts
            }
        )
        self.join = SumOfParts([part.keypoints for part in graph.parts], len(graph.keypoint_names))
        if graph.backbone.fabric is not None:
            assert isinstance(backbone, FabricBackbone)
            backbone.take_weights_from(self.backbone_weights)

    def cell_weights(self, part: Part) -> list[CellWeights]:
        """The weights of the cells of one of the graph's fabrics, in order of computation."""
        raise NotImplementedError

    def backbone_weights(self) -> list[CellWeights]:
        """The weights of a fabric backbone's cells."""
        assert self.graph.backbone.fabric is not None
        return self.cell_weights(self.graph.backbone.fabric)

    def fabric_places(self) -> dict[str, str]:
        """The name of each of the graph's fabrics to the name of its module."""
        places = {part.name: f"parts.{part.name}.fabric" for part in self.graph.parts}
        own = self.graph.backbone.fabric
        return places if own is None else {own.name: "backbone.fabric", **places}

    def architecture(self) -> Architecture:
        raise NotImplementedError

    def part_maps(self, name: str, pyramid: Sequence[Tensor]) -> Tensor:
        """One part's raw outputs (B, K_p, H/4, W/4)."""
        (part,) = (part for part in self.graph.parts if part.name == name)
        return self.parts[name](pyramid, self.cell_weights(part))

    def head_forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        return self.join([self.part_maps(part.name, pyramid) for part in self.graph.parts])

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.parts.parameters())


def first_non_finite(network: nn.Module, images: Tensor) -> str | None:
    """The first module, in order of computation, whose output is not finite, or the images."""
    # Other processes, whose norms may wait for this one's, have other images.
    found = [] if torch.isfinite(images).all() else ["the input images"]

    def watch(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, list | tuple) else [output]
            bad = any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors)
            if bad and not found:
                found.append(f"{name} ({type(module).__name__})")

        return hook

    leaves = [(n, m) for n, m in network.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
