"""Folding: every scalar weight and batch norm of a compact network moves into convolutions."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from posefabric.models.baselines import BaselineNetwork
from posefabric.models.compact import CompactNetwork
from posefabric.models.fabric_backbone import FabricBackbone
from posefabric.space.cell import Cell, FromCoarser, FromFiner, edge_name
from posefabric.space.fabric import CellWeights, cell_name

NetworkType = TypeVar("NetworkType", bound=nn.Module)


def deployable(network: NetworkType) -> NetworkType:
    """A network as it is shipped: folded where that is known to compute the same.

    A mixture stays as it is, and so does what was folded before.
    """
    if isinstance(network, CompactNetwork) and not network.folded:
        return fold(network)
    if isinstance(network, BaselineNetwork):
        return fold_norms(network)
    return network


@torch.no_grad()
def fold_norms(network: BaselineNetwork) -> Any:
    """A copy for inference with each batch norm moved into the convolution it reads."""
    folded = copy.deepcopy(network).eval()
    _fold_backbone(folded, folded.graph.input_wh)
    return folded


@torch.no_grad()
def fold(network: CompactNetwork) -> CompactNetwork:
    """A copy that computes the same in evaluation mode with convolutions alone.

    Uses that ReLU and pooling commute with positive factors: a cell's input is divided by the
    weight of its same-scale source, a node by that of its first skip, and whoever reads them
    takes the factor into its convolution. The copy is for inference, not for training.
    """
    folded = copy.deepcopy(network).eval()
    backbone = folded.backbone
    if isinstance(backbone, FabricBackbone):
        _fold_backbone(backbone.stem, folded.graph.input_wh)
        _fuse_reduction(backbone.reduce)
    else:
        _fold_backbone(backbone, folded.graph.input_wh)
    for part in folded.graph.parts:
        for reduce in folded.get_submodule(f"parts.{part.name}.reduce").children():
            _fuse_reduction(reduce)
    places = folded.fabric_places()
    weights: dict[str, list[CellWeights]] = {}
    for part in folded.graph.fabrics:
        weights[part.name] = []
        for graph, own in zip(part.cells, network.cell_weights(part), strict=True):
            cell = folded.get_submodule(f"{places[part.name]}.cells.{cell_name(graph)}")
            assert isinstance(cell, Cell)
            weights[part.name].append(_fold_cell(cell, own))
    folded.set_cell_weights(weights)
    folded.folded = True
    return folded


def _fuse_reduction(reduce: nn.Module) -> None:
    if isinstance(reduce, nn.Sequential):
        _fuse_pairs(reduce)


def _fold_cell(cell: Cell, weights: CellWeights) -> CellWeights:
    if not cell.graph.edges:
        return weights
    pairs = list(zip(cell.graph.sources, map(float, weights.sources), strict=True))
    same = sum(weight for source, weight in pairs if source.kind == "same")
    factor = same if same > 0 else 1.0
    source_weights: list[Tensor | float] = []
    merged = False
    for source, weight in pairs:
        if source.kind == "same":
            # Border copies read the same map: the first stands for their sum.
            source_weights.append(0.0 if merged else 1.0)
            merged = True
            continue
        module = cell.sources[str(source.slot)]
        assert isinstance(module, FromFiner | FromCoarser)
        assert isinstance(module.norm, nn.BatchNorm2d)
        module.conv = _scaled(fuse_conv_bn_eval(module.conv, module.norm), after=weight / factor)
        module.norm = nn.Identity()
        source_weights.append(1.0)
    factors = {0: factor}
    for node in cell.nodes:
        factors[node] = _node_factor(cell, weights, node, factors)
    for edge, row in zip(cell.graph.edges, weights.choices, strict=True):
        choices = cell.edges[edge_name(edge)]
        assert isinstance(choices, nn.ModuleDict)
        before = factors.get(edge.start, 1.0)
        for choice, weight in zip(edge.choices, map(float, row), strict=True):
            after = weight / factors[edge.end]
            choices[choice.operation] = _fold_operation(
                choices[choice.operation], before=before, after=after, width=cell.graph.width
            )
    width = cell.graph.width
    for i, node in enumerate(cell.nodes):
        cell.keep.weight[:, i * width : (i + 1) * width] *= factors[node]
    if isinstance(cell.norm, nn.BatchNorm2d):
        cell.keep = fuse_conv_bn_eval(cell.keep, cell.norm)
        cell.norm = nn.Identity()
    return CellWeights(
        sources=source_weights, choices=[[1.0] * len(edge.choices) for edge in cell.graph.edges]
    )


def _node_factor(cell: Cell, weights: CellWeights, node: int, factors: dict[int, float]) -> float:
    """The weight of the node's first skip: dividing by it makes that skip free."""
    for edge, row in zip(cell.graph.edges, weights.choices, strict=True):
        for choice, weight in zip(edge.choices, row, strict=True):
            if edge.end == node and choice.operation == "skip" and float(weight) > 0:
                return float(weight) * factors.get(edge.start, 1.0)
    return 1.0


def _fold_operation(module: nn.Module, *, before: float, after: float, width: int) -> nn.Module:
    """``after * module(before * x)`` as convolutions; both factors are positive."""
    if isinstance(module, nn.Identity):
        if abs(before * after - 1.0) < 1e-12:
            return module
        return _per_channel(torch.full((width,), before * after), None)
    if isinstance(module, nn.Conv2d):
        return _scaled(module, before=before, after=after)
    if isinstance(module, nn.Sequential):
        pool, norm = module
        assert isinstance(norm, nn.BatchNorm2d)
        return nn.Sequential(pool, _affine_of_norm(norm, before=before, after=after))
    layers = module.get_submodule("operation")
    assert isinstance(layers, nn.Sequential)
    _fuse_pairs(layers)
    convolutions = {i: layer for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)}
    for place in {min(convolutions), max(convolutions)}:
        layers[place] = _scaled(
            convolutions[place],
            before=before if place == min(convolutions) else 1.0,
            after=after if place == max(convolutions) else 1.0,
        )
    return module


def _fuse_pairs(layers: nn.Sequential) -> None:
    """Fuse each batch norm of a sequence into the convolution before it."""
    for i in range(1, len(layers)):
        before, norm = layers[i - 1], layers[i]
        if isinstance(before, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[i - 1] = fuse_conv_bn_eval(before, norm)
            layers[i] = nn.Identity()


def _scaled(conv: nn.Conv2d, *, before: float = 1.0, after: float = 1.0) -> nn.Conv2d:
    conv = copy.deepcopy(conv)
    conv.weight *= before * after
    if conv.bias is not None:
        conv.bias *= after
    return conv


def _affine_of_norm(norm: nn.BatchNorm2d, *, before: float, after: float) -> nn.Conv2d:
    assert norm.running_var is not None and norm.running_mean is not None
    spread = (norm.running_var + norm.eps).rsqrt()
    weight = before * after * spread
    return _per_channel(weight, -after * norm.running_mean * spread)


def _per_channel(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    width = len(weight)
    conv = nn.Conv2d(width, width, 1, groups=width, bias=bias is not None).to(weight)
    conv.weight.copy_(weight.view(-1, 1, 1, 1))
    if bias is not None and conv.bias is not None:
        conv.bias.copy_(bias)
    return conv


def _fold_backbone(backbone: nn.Module, input_wh: tuple[int, int]) -> None:
    """Fuse each batch norm that reads a convolution's output into that convolution.

    Which one it reads is seen by running the network on images, so any timm model will do.
    """
    written: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []

    def wrote(name: str):
        return lambda module, inputs, output: written.__setitem__(id(output), (name, output))

    def read(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = written.get(id(inputs[0]))
            if found is not None:
                pairs.append((found[0], name))

        return hook

    handles = []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            handles.append(module.register_forward_hook(wrote(name)))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(read(name)))
    parameter = next(backbone.parameters())
    width, height = input_wh
    try:
        backbone(torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    for conv_name, norm_name in pairs:
        conv, norm = backbone.get_submodule(conv_name), backbone.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        assert isinstance(norm, nn.BatchNorm2d)
        transposed = isinstance(conv, nn.ConvTranspose2d)
        backbone.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm, transpose=transposed))
        # timm's norms carry the activation that follows them.
        rest = [getattr(norm, piece) for piece in ("drop", "act") if hasattr(norm, piece)]
        backbone.set_submodule(norm_name, nn.Sequential(*rest))
