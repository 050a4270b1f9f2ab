"""A network built from a frozen architecture: no alpha, no beta, only what is kept."""

from __future__ import annotations

from posefabric.models.backbones import make_backbone
from posefabric.models.fabric_backbone import FabricBackbone
from posefabric.models.network import FabricNetwork
from posefabric.models.pyramid import PyramidBackbone
from posefabric.space.architecture import Architecture, Part
from posefabric.space.fabric import CellWeights


class CompactNetwork(FabricNetwork):
    """The graph's weights are constants; after folding they are all 1 and disappear."""

    def __init__(self, *, graph: Architecture, backbone: PyramidBackbone) -> None:
        super().__init__(graph=graph, backbone=backbone)
        self._weights = {
            part.name: [CellWeights.of_graph(cell) for cell in part.cells] for part in graph.fabrics
        }
        self.folded = False

    def cell_weights(self, part: Part) -> list[CellWeights]:
        return self._weights[part.name]

    def set_cell_weights(self, weights: dict[str, list[CellWeights]]) -> None:
        """Replace the constants, as folding does when it moves them into convolutions."""
        self._weights = weights

    def architecture(self) -> Architecture:
        return self.graph


def build_compact(graph: Architecture) -> CompactNetwork:
    """A compact network with random weights, its backbone cut to the levels the graph reads."""
    backbone: PyramidBackbone
    if graph.backbone.fabric is not None:
        backbone = FabricBackbone(graph.backbone, faithful=graph.faithful)
    else:
        backbone = make_backbone(graph.backbone.name, levels=len(graph.backbone.channels))
    return CompactNetwork(graph=graph, backbone=backbone)
