"""The cell-based neural fabric: which cells exist, what feeds them, and the modules of it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from posefabric.space.architecture import Cell as CellGraph
from posefabric.space.architecture import Choice, Edge, Part, Source, SourceKind
from posefabric.space.cell import Cell, Weight
from posefabric.structures import PosefabricError

MAX_SCALES = 4


@dataclass(frozen=True)
class FabricShape:
    """The size of a part's fabric (PAPER section 1).

    Attributes:
        depth: L, layers 0 .. L - 1; layer j has min(j + 2, 4, L - j) cells, finest first.
        first_layer: the first layer kept; the layer before it is the backbone's pyramid.
        channel_factor: C; a node at scale s has 4 C 2**s channels.
        hidden_nodes: H, hidden nodes of a cell.
        operations: candidate names.
        faithful: border copies, factors |O| and 3, no norm after a cell: the released code.
    """

    depth: int
    first_layer: int
    channel_factor: int
    hidden_nodes: int
    operations: tuple[str, ...]
    faithful: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.first_layer < self.depth:
            raise PosefabricError(
                f"model.first_layer={self.first_layer}: expected 1 .. depth - 1 = {self.depth - 1}"
            )

    def cells_in(self, layer: int) -> int:
        return min(layer + 2, MAX_SCALES, self.depth - layer)

    def width(self, scale: int) -> int:
        return 4 * self.channel_factor * 2**scale

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width(scale) for scale in range(MAX_SCALES))

    @property
    def pyramid_levels(self) -> int:
        return self.cells_in(self.first_layer - 1)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(layer, scale) of every cell, in order of computation."""
        layers = range(self.first_layer, self.depth)
        return [(layer, scale) for layer in layers for scale in range(self.cells_in(layer))]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(start, end) of every edge of a cell: node 1 from 0, node 2 from 0 and 1, ..."""
        return [(i, j) for j in range(1, self.hidden_nodes + 1) for i in range(j)]

    def sources(self, layer: int, scale: int) -> list[tuple[int, SourceKind, int]]:
        """(slot, kind, scale it comes from) of every source of a cell.

        Slots are same, finer, coarser. A missing source is left out, or, in the faithful mode,
        replaced by a copy of another (same by the next finer one,
        finer and coarser by the possibly replaced same).
        """
        available = self.cells_in(layer - 1)
        wanted = [scale, scale - 1, scale + 1]
        exists = [0 <= s < available for s in wanted]
        if self.faithful:
            same = scale if exists[0] else scale - 1
            wanted = [s if found else same for s, found in zip(wanted, exists, strict=True)]
            exists = [True, True, True]
        kinds: dict[int, SourceKind] = {0: "same", -1: "finer", 1: "coarser"}
        return [
            (slot, kinds[s - scale], s)
            for slot, (s, found) in enumerate(zip(wanted, exists, strict=True))
            if found
        ]

    def graph(self, name: str, keypoints: tuple[int, ...]) -> Part:
        """The part's graph with everything kept at equal weights."""
        choice_weight = 1.0 if self.faithful else 1.0 / len(self.operations)
        cells = []
        for layer, scale in self.places:
            sources = self.sources(layer, scale)
            weight = 1.0 if self.faithful else 1.0 / len(sources)
            choices = tuple(Choice(operation=o, weight=choice_weight) for o in self.operations)
            cells.append(
                CellGraph(
                    layer=layer,
                    scale=scale,
                    width=self.width(scale),
                    sources=tuple(
                        Source(kind=kind, scale=s, weight=weight, slot=slot)
                        for slot, kind, s in sources
                    ),
                    edges=tuple(Edge(start=i, end=j, choices=choices) for i, j in self.edges),
                )
            )
        return Part(name=name, keypoints=keypoints, cells=tuple(cells))


@dataclass(frozen=True)
class BackboneShape(FabricShape):
    """The size of a fabric that is the backbone (PAPER section 1): it keeps the first layers.

    Layer j has min(j + 2, 4) cells as long as they can still reach one of the ``levels`` that
    are read; the layer before the first is the stem's one map at 1/4 of the input.
    """

    levels: int = MAX_SCALES

    def __post_init__(self) -> None:
        if self.first_layer != 0 or self.depth < MAX_SCALES - 1:
            raise PosefabricError(
                f"a fabric backbone of {self.depth} layers from layer {self.first_layer}: expected "
                f"{MAX_SCALES - 1} layers or more, from layer 0"
            )

    def cells_in(self, layer: int) -> int:
        return min(layer + 2, MAX_SCALES, self.levels + self.depth - 1 - layer)


def adapt_width(
    width_in: int, width_out: int, faithful: bool, *, if_equal: bool = False
) -> nn.Module:
    """1x1 convolution and batch norm, before a fabric.

    Faithful: without the norm, and between equal widths only ``if_equal``.
    """
    if faithful and width_in == width_out and not if_equal:
        return nn.Identity()
    norm = nn.Identity() if faithful else nn.BatchNorm2d(width_out)
    return nn.Sequential(nn.Conv2d(width_in, width_out, 1), norm)


@dataclass
class CellWeights:
    """What one cell multiplies by, in the order of its graph's sources, edges and choices."""

    sources: list[Weight]
    choices: list[list[Weight]]

    @classmethod
    def of_graph(cls, graph: CellGraph) -> CellWeights:
        return cls(
            sources=[source.weight for source in graph.sources],
            choices=[[choice.weight for choice in edge.choices] for edge in graph.edges],
        )


class Fabric(nn.Module):
    """The cells of one part's graph: pyramid levels in, the finest cell of the last layer out."""

    def __init__(self, part: Part, *, first_layer: int, faithful: bool) -> None:
        super().__init__()
        self.graph = part
        widths = level_widths(part)
        self.cells = nn.ModuleDict()
        for cell in part.cells:
            self.cells[cell_name(cell)] = Cell(cell, widths=widths, faithful=faithful)
        self.first_layer = first_layer

    def forward(
        self, levels: dict[int, Tensor], weights: Sequence[CellWeights], *, finest: Tensor
    ) -> Tensor:
        """``levels`` maps a scale to (B, 4 C 2**s, H/4/2**s, W/4/2**s); out (B, 4 C, H/4, W/4)."""
        return self.last_layer(levels, weights, finest=finest)[0]

    def last_layer(
        self, levels: dict[int, Tensor], weights: Sequence[CellWeights], *, finest: Tensor
    ) -> dict[int, Tensor]:
        """The outputs of the last layer's cells, by scale."""
        layers: dict[int, dict[int, Tensor]] = {self.first_layer - 1: levels}
        for cell, own in zip(self.graph.cells, weights, strict=True):
            inputs = layers.get(cell.layer - 1, {})
            module = self.cells[cell_name(cell)]
            output: Tensor = module(inputs, own.sources, own.choices, finest=finest)
            layers.setdefault(cell.layer, {})[cell.scale] = output
        return layers[self.graph.cells[-1].layer]


def cell_name(cell: CellGraph) -> str:
    return f"{cell.layer}_{cell.scale}"


def level_widths(part: Part) -> tuple[int, ...]:
    """Node widths by scale, told by any cell: a node at scale s has 2**s times the finest's."""
    cell = part.cells[-1]
    finest = cell.width // 2**cell.scale
    return tuple(finest * 2**scale for scale in range(MAX_SCALES))


def pyramid_scales(part: Part, first_layer: int) -> tuple[int, ...]:
    """The backbone levels that a part's cells read."""
    scales = {
        source.scale for cell in part.cells if cell.layer == first_layer for source in cell.sources
    }
    return tuple(sorted(scales))
