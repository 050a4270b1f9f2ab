"""What a graph's pieces cost: multiply-adds, parameters and, by a table, milliseconds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from posefabric.space.architecture import Architecture, Cell, Part, SourceKind
from posefabric.space.cell import build_source
from posefabric.space.fabric import adapt_width, level_widths, pyramid_scales
from posefabric.space.latency import Piece, Table
from posefabric.space.operations import build_operation

Size = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one picture, as torch.utils.flop_counter counts (FLOPs / 2), and
    parameters after folding: the weights of convolutions and one bias a batch norm or channel.
    And the picture's milliseconds, 0 where no table of them is given.
    """

    macs: int = 0
    params: int = 0
    ms: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params, self.ms + other.ms)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.macs - other.macs, self.params - other.params, self.ms - other.ms)

    def timed(self, piece: Piece, table: Table | None) -> Cost:
        """The same with the piece's milliseconds."""
        return self if table is None else replace(self, ms=table.of(piece))


@functools.lru_cache(maxsize=4096)
def operation_cost(name: str, width: int, size: Size, table: Table | None = None) -> Cost:
    """The candidate ``name`` on ``width`` channels and maps of ``size`` (h, w)."""
    cost = _measured(lambda: build_operation(name, width), width, size)
    if name == "zero":
        return cost
    return cost.timed(Piece("operation", name, width, width, size), table)


@functools.lru_cache(maxsize=4096)
def source_cost(
    kind: SourceKind, width_in: int, width_out: int, size: Size, table: Table | None = None
) -> Cost:
    """Bringing (width_in, h, w) of ``size`` (h, w) to a cell of ``width_out`` channels."""
    cost = _measured(lambda: build_source(kind, width_in, width_out), width_in, size)
    return cost.timed(Piece("source", kind, width_in, width_out, size), table)


@functools.lru_cache(maxsize=4096)
def _pointwise_cost(width_in: int, width_out: int, size: Size, table: Table | None = None) -> Cost:
    pixels = size[0] * size[1]
    cost = Cost(pixels * width_in * width_out, width_in * width_out + width_out)
    return cost.timed(Piece("pointwise", "conv_1x1", width_in, width_out, size), table)


def keep_cost(cell: Cell, size: Size, table: Table | None = None) -> Cost:
    """The 1x1 convolution and batch norm that close a cell."""
    nodes = len({edge.end for edge in cell.edges})
    return _pointwise_cost(cell.width * nodes, cell.width, size, table)


@functools.lru_cache(maxsize=4096)
def _adapting_cost(channels: int, width: int, size: Size) -> Cost:
    return _measured(lambda: adapt_width(channels, width, False), channels, size)


def reduce_cost(
    part: Part, channels: int, scale: int, input_wh: Size, table: Table | None = None
) -> Cost:
    """The 1x1 convolution that brings a backbone's level to a part's width."""
    width, size = level_widths(part)[scale], map_size(input_wh, scale)
    return _adapting_cost(channels, width, size).timed(
        Piece("pointwise", "conv_1x1", channels, width, size), table
    )


def head_cost(part: Part, graph: Architecture, table: Table | None = None) -> Cost:
    """The layers that turn a part's finest cell into its maps."""
    head, keypoints, width = graph.head, len(part.keypoints), level_widths(part)[0]
    size = map_size(graph.input_wh, 0)
    if head.kind == "vector3d":
        inner = _pointwise_cost(width, width * head.dim, size, table)
        return inner + _pointwise_cost(width, keypoints, (size[0] * head.dim, size[1]), table)
    maps = keypoints * (head.dim if head.kind == "vector" else 1)
    return _pointwise_cost(width, maps, size, table)


def cell_cost(cell: Cell, part: Part, input_wh: Size, table: Table | None = None) -> Cost:
    """A cell with everything the graph keeps of it; a cell without edges is a constant."""
    if not cell.edges:
        return Cost(0, cell.width)
    widths, size = level_widths(part), map_size(input_wh, cell.scale)
    total = keep_cost(cell, size, table)
    for source in cell.sources:
        total += source_cost(
            source.kind, widths[source.scale], cell.width, map_size(input_wh, source.scale), table
        )
    for edge in cell.edges:
        for choice in edge.choices:
            total += operation_cost(choice.operation, cell.width, size, table)
    return total


def part_cost(part: Part, graph: Architecture, table: Table | None = None) -> Cost:
    """One of the graph's fabrics: 1x1 convolutions, cells, head; of a backbone's the cells."""
    total = Cost()
    if part.keypoints:
        total = head_cost(part, graph, table)
        for scale in pyramid_scales(part, graph.first_layer):
            channels = graph.backbone.channels[scale]
            total += reduce_cost(part, channels, scale, graph.input_wh, table)
    for cell in part.cells:
        total += cell_cost(cell, part, graph.input_wh, table)
    return total


def fabrics_cost(graph: Architecture, table: Table | None = None) -> Cost:
    """All that is searched: the parts, and the cells of a fabric backbone."""
    total = Cost()
    for part in graph.fabrics:
        total += part_cost(part, graph, table)
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
