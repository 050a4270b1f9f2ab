"""What a graph's pieces cost: multiply-adds and parameters of choices, sources, cells, parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from posefabric.space.architecture import Architecture, Cell, Part, SourceKind
from posefabric.space.cell import build_source
from posefabric.space.fabric import adapt_width, level_widths, pyramid_scales
from posefabric.space.operations import build_operation

Size = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one picture, as torch.utils.flop_counter counts (FLOPs / 2), and
    parameters after folding: the weights of convolutions and one bias a batch norm or channel.
    """

    macs: int = 0
    params: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.macs - other.macs, self.params - other.params)


@functools.lru_cache(maxsize=4096)
def operation_cost(name: str, width: int, size: Size) -> Cost:
    """The candidate ``name`` on ``width`` channels and maps of ``size`` (h, w)."""
    return _measured(lambda: build_operation(name, width), width, size)


@functools.lru_cache(maxsize=4096)
def source_cost(kind: SourceKind, width_in: int, width_out: int, size: Size) -> Cost:
    """Bringing (width_in, h, w) of ``size`` (h, w) to a cell of ``width_out`` channels."""
    return _measured(lambda: build_source(kind, width_in, width_out), width_in, size)


@functools.lru_cache(maxsize=4096)
def _pointwise_cost(width_in: int, width_out: int, size: Size) -> Cost:
    pixels = size[0] * size[1]
    return Cost(pixels * width_in * width_out, width_in * width_out + width_out)


def keep_cost(cell: Cell, size: Size) -> Cost:
    """The 1x1 convolution and batch norm that close a cell."""
    nodes = len({edge.end for edge in cell.edges})
    return _pointwise_cost(cell.width * nodes, cell.width, size)


def reduce_cost(part: Part, channels: int, scale: int, input_wh: Size) -> Cost:
    """The 1x1 convolution that brings a backbone's level to a part's width."""
    width = level_widths(part)[scale]
    return _measured(
        lambda: adapt_width(channels, width, False), channels, map_size(input_wh, scale)
    )


def head_cost(part: Part, graph: Architecture) -> Cost:
    """The layers that turn a part's finest cell into its maps."""
    head, keypoints, width = graph.head, len(part.keypoints), level_widths(part)[0]
    size = map_size(graph.input_wh, 0)
    if head.kind == "vector3d":
        inner = _pointwise_cost(width, width * head.dim, size)
        return inner + _pointwise_cost(width, keypoints, (size[0] * head.dim, size[1]))
    maps = keypoints * (head.dim if head.kind == "vector" else 1)
    return _pointwise_cost(width, maps, size)


def cell_cost(cell: Cell, part: Part, input_wh: Size) -> Cost:
    """A cell with everything the graph keeps of it; a cell without edges is a constant."""
    if not cell.edges:
        return Cost(0, cell.width)
    widths, size = level_widths(part), map_size(input_wh, cell.scale)
    total = keep_cost(cell, size)
    for source in cell.sources:
        total += source_cost(
            source.kind, widths[source.scale], cell.width, map_size(input_wh, source.scale)
        )
    for edge in cell.edges:
        for choice in edge.choices:
            total += operation_cost(choice.operation, cell.width, size)
    return total


def part_cost(part: Part, graph: Architecture) -> Cost:
    """One of the graph's fabrics: 1x1 convolutions, cells, head; of a backbone's the cells."""
    total = Cost()
    if part.keypoints:
        total = head_cost(part, graph)
        for scale in pyramid_scales(part, graph.first_layer):
            total += reduce_cost(part, graph.backbone.channels[scale], scale, graph.input_wh)
    for cell in part.cells:
        total += cell_cost(cell, part, graph.input_wh)
    return total


def fabrics_cost(graph: Architecture) -> Cost:
    """All that is searched: the parts, and the cells of a fabric backbone."""
    total = Cost()
    for part in graph.fabrics:
        total += part_cost(part, graph)
    return total


def map_size(input_wh: Size, scale: int) -> Size:
    """(h, w) of a map at ``scale``: stride 4 * 2**scale."""
    width, height = input_wh
    return height // 4 // 2**scale, width // 4 // 2**scale


def _measured(build: Callable[[], nn.Module], width: int, size: Size) -> Cost:
    with torch.device("meta"):
        module = build().eval()
        images = torch.empty(1, width, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images)
    return Cost(counter.get_total_flops() // 2, _folded_parameters(module))


def _folded_parameters(module: nn.Module) -> int:
    """A batch norm becomes the bias of the convolution before it, else an own scale and bias."""
    total, biased, after_conv = 0, False, False
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            total += layer.weight.numel()
            biased, after_conv = layer.bias is not None, True
            total += layer.out_channels if biased else 0
        elif isinstance(layer, nn.BatchNorm2d):
            if not after_conv:
                total += 2 * layer.num_features
            elif not biased:
                total += layer.num_features
            after_conv = False
        elif isinstance(layer, nn.ReLU):
            after_conv = False
    return total
