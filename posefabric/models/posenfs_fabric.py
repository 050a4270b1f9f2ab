"""The released PoseNFS network: our faithful fabric, its heads, and its tensors' names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from posefabric.models.heads import build_head
from posefabric.models.posenfs_backbones import PosenfsBackbone
from posefabric.space.architecture import Head, Part
from posefabric.space.cell import Cell, edge_name
from posefabric.space.fabric import CellWeights, Fabric, FabricShape, cell_name, pyramid_scales
from posefabric.space.parts import SumOfParts
from posefabric.structures import PosefabricError

# Where a cell's source keeps its layers: ours, and the released code's by kind.
SOURCE_LAYERS = {
    "same": {},
    "finer": {"conv": "operation.0", "norm": "operation.1"},
    "coarser": {"conv": "conv_1x1", "norm": "bn"},
}


class PosenfsPart(nn.Module):
    """One part: 1x1 convolutions where the backbone's widths differ, fabric, head.

    ``alphas`` is (rows, operations), or (cells, rows, operations) with one alpha a cell; rows
    beyond the edges belong to a second input node that the released code never feeds.
    ``betas`` is (cells, 3).
    """

    def __init__(
        self,
        graph: Part,
        *,
        shape: FabricShape,
        channels: Sequence[int],
        adapted: bool,
        head: Head,
        alpha_size: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.graph = graph
        self.alphas = nn.Parameter(torch.zeros(alpha_size))
        self.betas = nn.Parameter(torch.zeros(len(shape.places), 3))
        self.scales = pyramid_scales(graph, shape.first_layer)
        self.reduce = nn.ModuleDict()
        if adapted:
            for scale in self.scales:
                self.reduce[str(scale)] = nn.Conv2d(channels[scale], shape.width(scale), 1)
        self.fabric = Fabric(graph, first_layer=shape.first_layer, faithful=True)
        width, count = shape.width(0), len(graph.keypoints)
        self.head = build_head(width, count, head)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Pyramid levels, finest first, to the part's maps (B, K_p, H/4, W/4)."""
        levels = {scale: pyramid[scale] for scale in self.scales}
        for scale, convolution in self.reduce.items():
            levels[int(scale)] = convolution(pyramid[int(scale)])
        return self.head(self.fabric(levels, self._weights(), finest=pyramid[0]))

    def _weights(self) -> list[CellWeights]:
        """|O| softmax(alpha) and 3 softmax(beta) for every cell."""
        alphas = self.alphas.softmax(-1) * self.alphas.shape[-1]
        betas = self.betas.softmax(-1) * 3
        weights = []
        for row, cell in enumerate(self.graph.cells):
            alpha = alphas[row] if alphas.ndim == 3 else alphas
            weights.append(
                CellWeights(
                    sources=[betas[row, source.slot] for source in cell.sources],
                    choices=[list(alpha[edge]) for edge in range(len(cell.edges))],
                )
            )
        return weights

    def released_tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its released name; ``index`` is the part's place among the parts."""
        name = self.graph.name
        yield f"{name}.alphas", self.alphas
        yield f"{name}.betas", self.betas
        for graph in self.graph.cells:
            cell = self.fabric.cells[cell_name(graph)]
            assert isinstance(cell, Cell)
            yield from _cell_tensors(cell, f"{name}.cell_{graph.layer}_{graph.scale}")
        for key, tensor in _tensors(self.head, name):
            # Ours lacks the axis over the slices, which is 1 long.
            yield key, tensor[:, :, None] if key.endswith("final_layer_3d.weight") else tensor
        yield from _tensors(self.reduce, f"reduce.{index}")


def _cell_tensors(cell: Cell, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for index, edge in enumerate(cell.graph.edges):
        for place, choice in enumerate(edge.choices):
            operation = cell.get_submodule(f"edges.{edge_name(edge)}.{choice.operation}")
            yield from _tensors(operation, f"{prefix}.cell_arch.{index}.ops.{place}")
    for source in cell.graph.sources:
        for ours, theirs in SOURCE_LAYERS[source.kind].items():
            layer = cell.get_submodule(f"sources.{source.slot}.{ours}")
            yield from _tensors(layer, f"{prefix}.propress_list.{source.slot}.{theirs}")
    yield from _tensors(cell.keep, f"{prefix}.channel_keep")


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not name.endswith("num_batches_tracked"):
            yield f"{prefix}.{name}", tensor


class PosenfsNetwork(nn.Module):
    """P part fabrics on one backbone, as the paper's released code computes them.

    Images (B, 3, H, W) in, heatmaps (B, K, H/4, W/4) out, keypoints in the released code's
    order. The checkpoints were trained on BGR images with ImageNet's RGB constants
    (CONVENTIONS, normalisation).
    """

    def __init__(
        self, *, backbone: PosenfsBackbone, parts: Sequence[PosenfsPart], num_keypoints: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.parts = nn.ModuleList(parts)
        self.join = SumOfParts([part.graph.keypoints for part in parts], num_keypoints)
        coarsest = max(cell.scale for part in parts for cell in part.graph.cells)
        self.stride = 4 * 2 ** max(coarsest, len(backbone.channels) - 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if height % self.stride or width % self.stride:
            raise PosefabricError(
                f"images are {width} x {height} pixels, expected multiples of {self.stride}; "
                f"choose another input size"
            )
        return self.head_forward(self.backbone(images))

    def head_forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Everything after the backbone: pyramid levels to heatmaps (B, K, H/4, W/4)."""
        return self.join([part(pyramid) for part in self.parts])

    def score_maps(self, outputs: Tensor) -> Tensor:
        """The heatmaps are scores already: mean squared error trained them."""
        return outputs

    def arch_parameters(self) -> dict[str, nn.Parameter]:
        """``"PART.alphas"`` and ``"PART.betas"`` to parameters, parts in their order."""
        found: dict[str, nn.Parameter] = {}
        for part in self._parts():
            found[f"{part.graph.name}.alphas"] = part.alphas
            found[f"{part.graph.name}.betas"] = part.betas
        return found

    def released_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the network by its name in the released code, batch counters aside."""
        found = dict(_tensors(self.backbone, "backbone"))
        for index, part in enumerate(self._parts()):
            found.update(part.released_tensors(index))
        return found

    def _parts(self) -> Iterator[PosenfsPart]:
        for part in self.parts:
            assert isinstance(part, PosenfsPart)
            yield part
