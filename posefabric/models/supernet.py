"""The plain mixture: every candidate of every cell, weighted by relaxed alpha and beta.

The oracle of any faster mixture.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from posefabric.models.fabric_backbone import FabricBackbone
from posefabric.models.network import FabricNetwork
from posefabric.models.pyramid import PyramidBackbone
from posefabric.models.relaxation import ABSENT, RELAXATIONS
from posefabric.space.architecture import Architecture, Backbone, Cell, Edge, Head, Part
from posefabric.space.cell import Weight
from posefabric.space.fabric import BackboneShape, CellWeights, FabricShape
from posefabric.structures import PosefabricError


class Supernet(FabricNetwork):
    """P part fabrics on one backbone, with alpha and beta as registered parameters.

    ``alphas[part]`` is (cells or 1, edges, operations): logits of an edge's candidates, shared
    by the part's cells by default. ``betas[part]`` is (cells, 3): logits of same, finer and
    coarser source. Both start at zero. ``temperature`` divides them before the relaxation.
    ``noise`` has a pair of tensors for a part whose options are drawn in the next forward pass.

    A fabric backbone, of ``backbone_shape``, has alpha and beta too, under the name "backbone".
    """

    def __init__(
        self,
        *,
        shape: FabricShape,
        parts: dict[str, tuple[int, ...]],
        backbone: PyramidBackbone,
        skeleton: str,
        keypoint_names: tuple[str, ...],
        input_wh: tuple[int, int],
        head: Head,
        relaxation: str = "softmax",
        shared_alpha: bool = True,
        backbone_shape: BackboneShape | None = None,
        channel_order: Literal["rgb", "bgr"] = "rgb",
    ) -> None:
        if relaxation not in RELAXATIONS:
            raise PosefabricError(
                f"search.relaxation={relaxation}: expected one of {', '.join(RELAXATIONS)}"
            )
        own_fabric = backbone.graph.fabric if isinstance(backbone, FabricBackbone) else None
        graph = Architecture(
            skeleton=skeleton,
            keypoint_names=keypoint_names,
            input_wh=input_wh,
            channel_order=channel_order,
            backbone=Backbone(name=backbone.name, channels=backbone.channels, fabric=own_fabric),
            first_layer=shape.first_layer,
            faithful=shape.faithful,
            head=head,
            parts=tuple(shape.graph(name, keypoints) for name, keypoints in parts.items()),
        )
        super().__init__(graph=graph, backbone=backbone)
        self.shape = shape
        self.relaxation = relaxation
        self.shapes: dict[str, FabricShape] = {name: shape for name in parts}
        self.register_buffer("absent_sources", _absent_sources(shape), persistent=False)
        if own_fabric is not None:
            assert backbone_shape is not None
            fabric = own_fabric.name
            if fabric in parts:
                raise PosefabricError(
                    f"model.backbone={backbone.name}: a part of skeleton {skeleton} is called "
                    f"{fabric} too; give that part another name"
                )
            self.shapes[fabric] = backbone_shape
            absent = _absent_sources(backbone_shape)
            self.register_buffer("absent_backbone_sources", absent, persistent=False)
        self.alphas, self.betas = nn.ParameterDict(), nn.ParameterDict()
        for name, own in self.shapes.items():
            rows = 1 if shared_alpha else len(own.places)
            sizes = (rows, len(own.edges), len(own.operations))
            self.alphas[name] = nn.Parameter(torch.zeros(sizes))
            self.betas[name] = nn.Parameter(torch.zeros(len(own.places), 3))
        self.register_buffer("temperature", torch.tensor(1.0))
        self.noise: dict[str, tuple[Tensor, Tensor]] = {}

    def arch_parameters(self) -> dict[str, nn.Parameter]:
        """``"PART.alphas"`` and ``"PART.betas"`` to parameters; PART may be the backbone."""
        found = {}
        for part in self.graph.fabrics:
            found[f"{part.name}.alphas"] = self.alphas[part.name]
            found[f"{part.name}.betas"] = self.betas[part.name]
        return found

    def probabilities(self, part: str) -> tuple[Tensor, Tensor]:
        """Relaxed alpha (cells or 1, edges, operations) and beta (cells, 3; absent sources 0)."""
        relax, temperature = RELAXATIONS[self.relaxation], self.get_buffer("temperature")
        return (
            relax.probabilities(self.alphas[part], temperature),
            relax.probabilities(self.source_logits(part), temperature),
        )

    def mixing(self, part: str) -> tuple[Tensor, Tensor]:
        """What alpha's and beta's options are multiplied by, in the shapes of probabilities."""
        relax, temperature = RELAXATIONS[self.relaxation], self.get_buffer("temperature")
        alpha_noise, beta_noise = (
            self.noise.get(part, (None, None)) if self.training else (None,) * 2
        )
        return (
            relax.weights(self.alphas[part], temperature, alpha_noise),
            relax.weights(self.source_logits(part), temperature, beta_noise),
        )

    def source_logits(self, part: str) -> Tensor:
        """Beta (cells, 3), sources that a cell does not have out of reach."""
        return self.betas[part].masked_fill(self.absent_of(part), ABSENT)

    def absent_of(self, part: str) -> Tensor:
        """(cells, 3) of bools: the sources that cells of a fabric do not have."""
        own = self.graph.backbone.fabric
        of_backbone = own is not None and part == own.name
        return self.get_buffer("absent_backbone_sources" if of_backbone else "absent_sources")

    def cell_weights(self, part: Part) -> list[CellWeights]:
        alpha, beta = self.mixing(part.name)
        operations = len(self.shapes[part.name].operations)
        if self.shape.faithful:
            alpha, beta = alpha * operations, beta * 3
        # What weighs exactly nothing changes neither outputs nor gradients; training leaves it
        # out. Evaluation computes all of it: a mixture costs what its candidates cost.
        choices, sources = _numbers(alpha, self.training), _numbers(beta, self.training)
        edges = alpha.shape[1]
        weights = []
        for row, cell in enumerate(part.cells):
            first = row * edges if alpha.shape[0] > 1 else 0
            own = [
                choices[(first + edge) * operations : (first + edge + 1) * operations]
                for edge in range(len(cell.edges))
            ]
            weights.append(
                CellWeights(sources=[sources[3 * row + s.slot] for s in cell.sources], choices=own)
            )
        return weights

    def architecture(self) -> Architecture:
        """The whole graph with everything kept and the present relaxed weights."""
        with torch.no_grad():
            fabrics = {p.name: _weighted(p, self.cell_weights(p)) for p in self.graph.fabrics}
        return self.graph.with_fabrics(fabrics)

    def entropies(self) -> dict[str, float]:
        """Mean entropy of alpha and of beta over the fabrics, 1 = uniform, 0 = decided."""
        relax = RELAXATIONS[self.relaxation]
        alphas, betas = [], []
        with torch.no_grad():
            for part in self.graph.fabrics:
                alpha, beta = self.probabilities(part.name)
                count = alpha.new_tensor(max(2.0, alpha.shape[-1]))
                alphas.append(relax.doubt(alpha, count).mean())
                options = (~self.absent_of(part.name)).sum(-1).to(beta)
                open_rows = options > 1
                betas.append(relax.doubt(beta, options.clamp(min=2))[open_rows].mean())
            means = torch.stack(alphas).mean(), torch.stack(betas).mean()
        return {"alpha_entropy": float(means[0]), "beta_entropy": float(means[1])}

    def indecision(self) -> tuple[Tensor, Tensor]:
        """The relaxation's impurity of alpha, summed over edges, and of beta, over cells.

        Both are means over the fabrics; zero exactly when every edge has one operation, every cell
        one source.
        """
        relax = RELAXATIONS[self.relaxation]
        pairs = [self.probabilities(part.name) for part in self.graph.fabrics]
        alpha = torch.stack([relax.impurity(a).sum() for a, _ in pairs]).mean()
        beta = torch.stack([relax.impurity(b).sum() for _, b in pairs]).mean()
        return alpha, beta


def _absent_sources(shape: FabricShape) -> Tensor:
    absent = torch.ones(len(shape.places), 3, dtype=torch.bool)
    for row, (layer, scale) in enumerate(shape.places):
        absent[row, [slot for slot, _, _ in shape.sources(layer, scale)]] = False
    return absent


def _numbers(weights: Tensor, training: bool) -> list[Weight]:
    """Every weight, in order, as a scalar; while training those of nothing are the number 0."""
    flat = weights.flatten()
    nothing = (flat == 0).logical_and(torch.tensor(training, device=flat.device)).tolist()
    scalars = flat.unbind()
    return [0.0 if none else value for none, value in zip(nothing, scalars, strict=True)]


def _weighted(part: Part, weights: list[CellWeights]) -> Part:
    cells = []
    for cell, own in zip(part.cells, weights, strict=True):
        sources = tuple(
            source.model_copy(update={"weight": float(weight)})
            for source, weight in zip(cell.sources, own.sources, strict=True)
        )
        edges = tuple(
            _weighted_edge(edge, row) for edge, row in zip(cell.edges, own.choices, strict=True)
        )
        cells.append(Cell(**{**dict(cell), "sources": sources, "edges": edges}))
    return part.model_copy(update={"cells": tuple(cells)})


def _weighted_edge(edge: Edge, weights: list[Weight]) -> Edge:
    choices = tuple(
        choice.model_copy(update={"weight": float(weight)})
        for choice, weight in zip(edge.choices, weights, strict=True)
    )
    return edge.model_copy(update={"choices": choices})
