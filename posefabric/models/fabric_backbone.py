"""A cell-based fabric as the backbone: a stem, the first layers, and a pyramid of the last."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from posefabric.data.batch import Normalisation
from posefabric.models.pyramid import PyramidBackbone
from posefabric.space.architecture import STEM_WIDTH, Backbone
from posefabric.space.fabric import BackboneShape, CellWeights, Fabric, adapt_width, level_widths

LAYERS = 5
POOLS = ("avg_pool_3x3", "max_pool_3x3")
# Channel factor C and hidden nodes H. With five layers and the default candidates they have
# 5.80, 6.80 and 10.48 M parameters; published are 5.8, 6.8 and 10.5 M (PAPER section 4), of
# which depth and widths are not said.
FABRIC_BACKBONES: dict[str, tuple[int, int]] = {
    "fabric_1": (12, 1),
    "fabric_2": (13, 1),
    "fabric_3": (12, 2),
}


class FabricBackbone(PyramidBackbone):
    """Images (B, 3, H, W) to a list of (B, channels[s], H/4/2**s, W/4/2**s).

    Two strided 3x3 convolutions, a 1x1 convolution to the finest node width, the graph's cells.
    A level that the graph no longer has is a map without channels. The cells weigh what the
    graph says, until a network that knows better is asked for it.
    """

    def __init__(self, graph: Backbone, *, faithful: bool) -> None:
        super().__init__(graph.name)
        assert graph.fabric is not None
        self.graph = graph
        self.channels = graph.channels
        self.normalisation = Normalisation()
        self.stem = nn.Sequential(
            *_strided(3, STEM_WIDTH),
            *_strided(STEM_WIDTH, STEM_WIDTH),
        )
        self.reduce = adapt_width(STEM_WIDTH, level_widths(graph.fabric)[0], faithful)
        self.fabric = Fabric(graph.fabric, first_layer=0, faithful=faithful)
        constants = [CellWeights.of_graph(cell) for cell in graph.fabric.cells]
        self._weights: Callable[[], list[CellWeights]] = lambda: constants

    def take_weights_from(self, weights: Callable[[], list[CellWeights]]) -> None:
        """Ask ``weights``, a method of the network, for the cells' weights from now on.

        A bound method, unlike a function, is copied along with the network.
        """
        self._weights = weights

    def forward(self, images: Tensor) -> list[Tensor]:
        stem = self.stem(images)
        levels = self.fabric.last_layer({0: self.reduce(stem)}, self._weights(), finest=stem)
        return [
            levels[scale] if scale in levels else stem[:, :0, :: 2**scale, :: 2**scale]
            for scale in range(len(self.channels))
        ]

    def _first_layers(self) -> list[nn.Module]:
        return list(self.stem.modules())


def _strided(width_in: int, width_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width_out), nn.ReLU()]


def fabric_backbone_shape(
    name: str, *, operations: tuple[str, ...], faithful: bool, levels: int
) -> BackboneShape:
    """``fabric_1``, ``fabric_2`` or ``fabric_3``, with poolings among the candidates."""
    channel_factor, hidden_nodes = FABRIC_BACKBONES[name]
    return BackboneShape(
        depth=LAYERS,
        first_layer=0,
        channel_factor=channel_factor,
        hidden_nodes=hidden_nodes,
        operations=(*operations, *(pool for pool in POOLS if pool not in operations)),
        faithful=faithful,
        levels=levels,
    )


def build_fabric_backbone(name: str, shape: BackboneShape) -> FabricBackbone:
    """A fabric backbone with every candidate and random weights."""
    graph = Backbone(
        name=name,
        channels=shape.widths[: shape.levels],
        fabric=shape.graph("backbone", ()),
    )
    return FabricBackbone(graph, faithful=shape.faithful)
