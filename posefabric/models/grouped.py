"""The fast path: the plain network's own modules, computed in fewer passes over memory.

:func:`fast_path` gives modules a subclass whose training step on a CPU runs on the kernels of
``kernels.cpp``. Names, weights and results stay; without gradients, in evaluation, on other
devices and in fp16 the plain forward runs, but for a frozen stem's within a training step. What is
grouped is what shares its maps: the norm, the ReLU, the product with alpha or beta and the sum over
all candidates of an edge, or over all sources of a cell, are one computation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from posefabric.models.chains import activation_of, beside, chain, is_norm, open_end
from posefabric.models.fast_convolutions import (
    Fast,
    FastConv,
    FastDepthwise,
    FastPointwise,
    fits,
    is_known_depthwise,
    is_pointwise,
    window_of,
)
from posefabric.models.fused import takes, takes_norm, weighted_sum
from posefabric.models.fused_depthwise import fan_out
from posefabric.models.kernels import load_kernels
from posefabric.models.posenfs_backbones import Bottleneck, ResNet
from posefabric.models.recomputing import recomputing
from posefabric.models.term_calls import RELU, Term
from posefabric.space.cell import Cell, FromCoarser, FromFiner, Weight, edge_name, is_zero

_log = logging.getLogger(__name__)


def fast_path(network: nn.Module) -> nn.Module:
    """Switch a network, in place, to the fast path; :func:`plain_path` switches back.

    Warns where the kernels cannot be compiled: then the plain path stays.
    """
    kernels = load_kernels()
    if kernels.library is None:
        _log.warning("model.path=fast: %s; model.path=plain is used", kernels.reason)
        return network
    for module in network.modules():
        fast = _fast_kind(module)
        if fast is not None and not isinstance(module, Fast):
            kind = type(module)
            module.__class__ = type(kind.__name__, (fast, kind), {"plain": kind})
    return network


def plain_path(network: nn.Module) -> nn.Module:
    """Undo :func:`fast_path`."""
    for module in network.modules():
        if isinstance(module, Fast):
            module.__class__ = module.plain
    return network


def is_fast(network: nn.Module) -> bool:
    """Whether any of its modules is on the fast path."""
    return any(isinstance(module, Fast) for module in network.modules())


class FastNorm(Fast):
    """A batch norm, with its activation where it has one (timm)."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if not takes(x) or not takes_norm(module, x):
            layer: Any = super()
            return layer.forward(x)
        act = activation_of(getattr(module, "act", None))
        assert act is not None
        return weighted_sum([Term(x, norm=module, act=act)])


class FastChain(Fast):
    """Layers in a row; a norm and the ReLU behind it are one computation."""

    def forward(self, input: Tensor) -> Tensor:
        module: Any = self
        return chain(list(module), input)


class FastResNet(Fast):
    """A ResNet whose first norm and ReLU are one computation, done again for the maximum."""

    def entry(self, images: Tensor) -> Tensor:
        network: Any = self
        x = network.conv1(images)
        x = _normed_relu(network.bn1, x) if takes(x) else functional.relu(network.bn1(x))
        return recomputing(lambda x: functional.max_pool2d(x, 3, stride=2, padding=1), x)


class FastBottleneck(Fast):
    """ResNet's bottleneck: norm and ReLU, and the two norms of its sum, are one computation."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if not takes(x):
            layer: Any = super()
            return layer.forward(x)
        x, inner = beside(block.conv1, x)
        inner = _normed_relu(block.bn1, inner)
        inner = _normed_relu(block.bn2, block.conv2(inner))
        last = open_end([block.conv3, block.bn3], inner)
        residual = Term(x) if block.downsample is None else open_end(list(block.downsample), x)
        return weighted_sum([last, residual], relu=True)


class FastInverted(Fast):
    """timm's inverted residual: its last norm and the shortcut are one computation."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if not takes(x):
            layer: Any = super()
            return layer.forward(x)
        x, inner = beside(block.conv_pw, x)
        last = open_end([block.bn1, block.conv_dw, block.bn2, block.conv_pwl, block.bn3], inner)
        return weighted_sum([last, Term(x)] if block.has_skip else [last])


class FastCell(Fast):
    """A fabric's cell: every sum over sources or candidates is one computation."""

    def enter(self, inputs: Mapping[int, Tensor], source_weights: Sequence[Weight]) -> Tensor:
        cell: Any = self
        if not cell.training or not all(takes(inputs[s.scale]) for s in cell.graph.sources):
            layer: Any = super()
            return layer.enter(inputs, source_weights)
        terms = [
            _source_term(cell.sources[str(source.slot)], inputs[source.scale], weight)
            for source, weight in zip(cell.graph.sources, source_weights, strict=True)
            if not is_zero(weight)
        ]
        return weighted_sum(terms, relu=True)

    def compute(self, entry: Tensor, choice_weights: Sequence[Sequence[Weight]]) -> Tensor:
        cell: Any = self
        if not cell.training or not takes(entry):
            layer: Any = super()
            return layer.compute(entry, choice_weights)
        hidden = {0: entry}
        arriving: dict[int, list[Term]] = {}
        for edge, weights in zip(cell.graph.edges, choice_weights, strict=True):
            # Edges come in the order of their ends: all that ends in this start is known.
            if edge.start not in hidden:
                hidden[edge.start] = _node(arriving.get(edge.start, []), entry)
            choices = cell.edges[edge_name(edge)]
            open_ones = {
                choice.operation: weight
                for choice, weight in zip(edge.choices, weights, strict=True)
                if choice.operation != "zero" and not is_zero(weight)
            }
            terms = _candidate_terms([choices[name] for name in open_ones], hidden[edge.start])
            for term, weight in zip(terms, open_ones.values(), strict=True):
                term.weight = weight
                arriving.setdefault(edge.end, []).append(term)
        nodes = [
            hidden[n] if n in hidden else _node(arriving.get(n, []), entry) for n in cell.nodes
        ]
        joined = nodes[0] if len(nodes) == 1 else torch.cat(nodes, dim=1)
        return chain([cell.keep, cell.norm], joined)


def _normed(norm: Any, x: Tensor, act: int) -> Tensor:
    return weighted_sum([Term(x, norm=norm, act=act)])


def _normed_relu(norm: Any, x: Tensor) -> Tensor:
    return _normed(norm, x, RELU) if takes_norm(norm, x) else functional.relu(norm(x))


def _node(terms: list[Term], like: Tensor) -> Tensor:
    """A node that nothing reaches is zero."""
    return weighted_sum(terms) if terms else torch.zeros_like(like)


def _candidate_terms(operations: Sequence[nn.Module], x: Tensor) -> list[Term]:
    """Each operation of x; depthwise convolutions that read it are one computation."""
    rows: list[list[nn.Module]] = [_layers_of(operation) for operation in operations]
    firsts: list[Any] = [
        row[0] if row and isinstance(row[0], FastDepthwise) else None for row in rows
    ]
    convs = [conv for conv in firsts if conv is not None and fits(conv, x)]
    found: dict[int, Tensor] = {}
    if convs and len(rows) > 1:
        x, *maps = fan_out(x, [c.weight for c in convs], [window_of(c, x) for c in convs])
        found = {id(conv): own for conv, own in zip(convs, maps, strict=True)}
    return [
        open_end(row[1:], found[id(conv)]) if id(conv) in found else open_end(row, x)
        for row, conv in zip(rows, firsts, strict=True)
    ]


def _layers_of(operation: nn.Module) -> list[nn.Module]:
    """A candidate's layers in a row."""
    layers: Any = getattr(operation, "operation", operation)
    return list(layers) if isinstance(layers, nn.Sequential) else [operation]


def _source_term(source: nn.Module, x: Tensor, weight: Weight) -> Term:
    if isinstance(source, FromFiner):
        term = open_end([source.conv, source.norm], x)
        term.weight = weight
        return term
    if isinstance(source, FromCoarser):
        # The product commutes with the interpolation and is four times smaller before it.
        term = open_end([source.conv, source.norm], x)
        term.weight = weight
        small = weighted_sum([term])
        return Term(
            functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=True)
        )
    return Term(source(x), weight)


def _fast_kind(module: nn.Module) -> type | None:
    if isinstance(module, Cell):
        return FastCell
    if isinstance(module, Bottleneck):
        return FastBottleneck
    if isinstance(module, ResNet):
        return FastResNet
    if _is_plain_inverted(module):
        return FastInverted
    if type(module) is nn.Sequential:
        return FastChain
    if is_norm(module):
        drop = getattr(module, "drop", None)
        known = drop is None or isinstance(drop, nn.Identity)
        return (
            FastNorm if known and activation_of(getattr(module, "act", None)) is not None else None
        )
    if isinstance(module, nn.Conv2d):
        if is_known_depthwise(module):
            return FastDepthwise
        return FastPointwise if is_pointwise(module) else FastConv
    return None


def _is_plain_inverted(block: Any) -> bool:
    """timm's block with nothing between its convolutions but norms."""
    kind = type(block)
    if kind.__name__ != "InvertedResidual" or not kind.__module__.startswith("timm."):
        return False
    between = (block.aa, block.se, block.drop_path)
    return block.conv_s2d is None and all(isinstance(each, nn.Identity) for each in between)
