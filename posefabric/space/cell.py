"""One cell of a fabric: weighted sources in, weighted operations, one node width out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from posefabric.space.architecture import Cell as CellGraph
from posefabric.space.architecture import Edge, SourceKind
from posefabric.space.operations import build_operation

Weight: TypeAlias = "Tensor | float"


class FromFiner(nn.Module):
    """Strided 3x3 convolution and batch norm: (B, c_in, H, W) to (B, c_out, H/2, W/2)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class FromCoarser(nn.Module):
    """1x1 convolution, batch norm, bilinear x2 with corners aligned."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 1)
        self.norm: nn.Module = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def build_source(kind: SourceKind, width_in: int, width_out: int) -> nn.Module:
    if kind == "finer":
        return FromFiner(width_in, width_out)
    if kind == "coarser":
        return FromCoarser(width_in, width_out)
    return nn.Identity()


class Cell(nn.Module):
    """The modules of one cell of the graph; the weights come with each call.

    A mixture passes relaxed alpha and beta, a compact network the constants of its graph.
    A cell without edges puts out a constant map, the value a cell has whose operations are
    all zero.
    """

    def __init__(self, graph: CellGraph, *, widths: Sequence[int], faithful: bool) -> None:
        super().__init__()
        self.graph = graph
        self.nodes = sorted({edge.end for edge in graph.edges})
        if not graph.edges:
            self.constant = nn.Parameter(torch.zeros(1, graph.width, 1, 1))
            return
        self.sources = nn.ModuleDict(
            {
                str(source.slot): build_source(source.kind, widths[source.scale], graph.width)
                for source in graph.sources
            }
        )
        self.edges = nn.ModuleDict(
            {edge_name(edge): self._build_choices(edge) for edge in graph.edges}
        )
        self.keep = nn.Conv2d(graph.width * len(self.nodes), graph.width, 1)
        # The released code leaves the cell's output unnormalised, which bf16 does not bear.
        self.norm: nn.Module = nn.Identity() if faithful else nn.BatchNorm2d(graph.width)

    def _build_choices(self, edge: Edge) -> nn.ModuleDict:
        width = self.graph.width
        return nn.ModuleDict(
            {choice.operation: build_operation(choice.operation, width) for choice in edge.choices}
        )

    def forward(
        self,
        inputs: Mapping[int, Tensor],
        source_weights: Sequence[Weight],
        choice_weights: Sequence[Sequence[Weight]],
        *,
        finest: Tensor,
    ) -> Tensor:
        """One cell: (B, width, H, W) out.

        ``inputs`` maps a scale to the previous layer's (B, C, H, W) there; ``finest`` is any
        map at a quarter of the input's size, which tells a constant cell its own.
        """
        if not self.graph.edges:
            return self._constant_map(finest)
        return self.compute(self.enter(inputs, source_weights), choice_weights)

    def enter(self, inputs: Mapping[int, Tensor], source_weights: Sequence[Weight]) -> Tensor:
        """Node 0: the weighted sum of the sources, rectified."""
        total: Tensor | None = None
        for source, weight in zip(self.graph.sources, source_weights, strict=True):
            if is_zero(weight):
                continue
            total = add(total, self.sources[str(source.slot)](inputs[source.scale]), weight)
        assert total is not None, "a cell's source weights are never all zero"
        return functional.relu(total)

    def compute(self, entry: Tensor, choice_weights: Sequence[Sequence[Weight]]) -> Tensor:
        """All edges from node 0 on, and what the cell keeps of its nodes."""
        hidden = {0: entry}
        for edge, weights in zip(self.graph.edges, choice_weights, strict=True):
            choices = self.edges[edge_name(edge)]
            assert isinstance(choices, nn.ModuleDict)
            for choice, weight in zip(edge.choices, weights, strict=True):
                if choice.operation == "zero" or is_zero(weight):
                    continue
                value = choices[choice.operation](node_of(hidden, edge.start))
                hidden[edge.end] = add(hidden.get(edge.end), value, weight)
        return self.leave(hidden)

    def leave(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """The cell's output from its nodes."""
        nodes = [node_of(hidden, node) for node in self.nodes]
        joined = nodes[0] if len(nodes) == 1 else torch.cat(nodes, dim=1)
        return self.norm(self.keep(joined))

    def _constant_map(self, finest: Tensor) -> Tensor:
        batch, _, height, width = finest.shape
        factor = 2**self.graph.scale
        return self.constant.to(finest.dtype).expand(batch, -1, height // factor, width // factor)


def node_of(hidden: Mapping[int, Tensor], node: int) -> Tensor:
    """A node that nothing reaches is zero, which an operation need not map to zero."""
    return hidden[node] if node in hidden else torch.zeros_like(hidden[0])


def edge_name(edge: Edge) -> str:
    return f"{edge.start}-{edge.end}"


def is_zero(weight: Weight) -> bool:
    """Exactly zero, said as a number: then nothing depends on what it multiplies."""
    return isinstance(weight, float) and weight == 0.0


def add(total: Tensor | None, value: Tensor, weight: Weight) -> Tensor:
    """total + weight * value, without a product when the weight is the constant 1."""
    scaled = value if isinstance(weight, float) and weight == 1.0 else value * weight
    return scaled if total is None else total + scaled
