"""The fast path: the plain network's own modules, computed in fewer passes over memory.

:func:`fast_path` gives modules a subclass whose training step on a CPU runs on the kernels of
``fused.py``. Names, weights and results stay; without gradients, in evaluation, on other devices
and in fp16 the plain forward runs. What is grouped is what shares its maps: the norm,
the ReLU, the product with alpha or beta and the sum over all candidates of an edge, or over all
sources of a cell, are one computation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from posefabric.models.fused import takes, takes_norm, weighted_sum
from posefabric.models.fused_convolutions import (
    Window,
    depthwise,
    fan_out,
    normed_depthwise,
    pointwise,
    pointwise_beside,
)
from posefabric.models.kernels import computed_in, has_tiles, load_kernels
from posefabric.models.posenfs_backbones import Bottleneck, ResNet
from posefabric.models.recomputing import recomputing
from posefabric.models.term_calls import NONE, RELU, RELU6, Term
from posefabric.models.timm_import import import_timm
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


class Fast:
    """Marks a module on the fast path; ``plain`` is the class it had."""

    plain: type


class FastNorm(Fast):
    """A batch norm, with its activation where it has one (timm)."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if not takes(x) or not takes_norm(module, x):
            layer: Any = super()
            return layer.forward(x)
        act = _activation(getattr(module, "act", None))
        assert act is not None
        return weighted_sum([Term(x, norm=module, act=act)])


class FastConv(Fast):
    """A convolution that does not keep a normalised input which can be had again."""

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = super()
        return recomputing(layer.forward, input)

    def without_bias(self, input: Tensor) -> Tensor:
        """Of torch's own convolution: the same without its bias."""
        module: Any = self
        return recomputing(lambda x: module._conv_forward(x, module.weight, None), input)


class FastPointwise(FastConv):
    """A 1x1 convolution of every pixel, as a matrix product where that pays."""

    def forward(self, input: Tensor) -> Tensor:
        bias = cast(Any, self).bias
        return self._product(input, bias) if self._pays(input) else super().forward(input)

    def without_bias(self, input: Tensor) -> Tensor:
        return self._product(input, None) if self._pays(input) else super().without_bias(input)

    def _pays(self, input: Tensor) -> bool:
        return _fits(self, input) and _pays_as_product(self, input)

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        weight = cast(Any, self).weight
        return recomputing(lambda x: pointwise(x, weight, bias), input)


class FastDepthwise(Fast):
    """A depthwise convolution without bias."""

    def forward(self, input: Tensor) -> Tensor:
        module: Any = self
        if not _fits(module, input):
            layer: Any = super()
            return layer.forward(input)
        window = _window(module, input)
        return recomputing(lambda x: depthwise(x, module.weight, window), input)


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
        x, inner = _beside(block.conv1, x)
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
        x, inner = _beside(block.conv_pw, x)
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


def chain(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``layers`` one after the other, each norm with the ReLU behind it.

    What is a depthwise convolution behind that is computed with it too, and the bias of a
    convolution before it is left out.
    """
    return _chain(layers, x)[0]


def _chain(
    layers: Sequence[nn.Module], x: Tensor, *, then: nn.Module | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same before a norm ``then``, and the bias that the last convolution was without."""
    bias: Tensor | None = None
    i = 0
    while i < len(layers):
        layer: Any = layers[i]
        act, end = _norm_at(layers, i)
        if act is not None and takes(x) and takes_norm(layer, x):
            conv: Any = layers[end] if end < len(layers) else None
            term = Term(x, norm=layer, act=act, bias=bias)
            if isinstance(conv, FastDepthwise) and _fits(conv, x):
                weight = cast(Any, conv).weight
                x = normed_depthwise(term, weight, _window(conv, x))
                end += 1
            else:
                x = weighted_sum([term])
            i, bias = end, None
            continue
        following = layers[i + 1] if i + 1 < len(layers) else then
        if _is_biased(layer) and following is not None and _is_norm(following) and takes(x):
            x, bias = layer.without_bias(x), layer.bias
        else:
            x, bias = layer(_plus(x, bias)), None
        i += 1
    return x, bias


def open_end(layers: Sequence[nn.Module], x: Tensor) -> Term:
    """``layers`` but for a last norm, and a ReLU behind it, which the term says."""
    for place in range(max(0, len(layers) - 2), len(layers)):
        act, end = _norm_at(layers, place)
        if act is not None and end == len(layers):
            norm: Any = layers[place]
            before, bias = _chain(layers[:place], x, then=norm)
            if takes_norm(norm, before):
                return Term(before, norm=norm, act=act, bias=bias)
            return Term(chain(layers[place:], _plus(before, bias)))
    return Term(chain(layers, x))


def _beside(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and the convolution of it; on tiles the gradients of both meet in one map."""
    if isinstance(conv, FastPointwise) and has_tiles() and x.dtype == torch.bfloat16:
        module: Any = conv
        if _fits(conv, x):
            return pointwise_beside(x, module.weight, module.bias)
    return x, conv(x)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.view(1, -1, 1, 1).to(x.dtype)


def _is_biased(layer: nn.Module) -> bool:
    known = isinstance(layer, FastConv) and layer.plain is nn.Conv2d
    return known and cast(Any, layer).bias is not None


def _norm_at(layers: Sequence[nn.Module], i: int) -> tuple[int | None, int]:
    """The activation of a norm in place i, its own or the one behind it, and what comes next.

    None where there is no norm, or one whose activation the kernels do not know.
    """
    if not _is_norm(layers[i]):
        return None, i
    own = _activation(getattr(layers[i], "act", None))
    if own != NONE or i + 1 == len(layers):
        return own, i + 1
    behind = _activation(layers[i + 1])
    return (NONE, i + 1) if behind is None else (behind, i + 2)


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
    convs = [conv for conv in firsts if conv is not None and _fits(conv, x)]
    found: dict[int, Tensor] = {}
    if convs and len(rows) > 1:
        x, *maps = fan_out(x, [c.weight for c in convs], [_window(c, x) for c in convs])
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
    if _is_norm(module):
        drop = getattr(module, "drop", None)
        known = drop is None or isinstance(drop, nn.Identity)
        return FastNorm if known and _activation(getattr(module, "act", None)) is not None else None
    if isinstance(module, nn.Conv2d):
        if _is_known_depthwise(module):
            return FastDepthwise
        return FastPointwise if _is_pointwise(module) else FastConv
    return None


def _is_plain_inverted(block: Any) -> bool:
    """timm's block with nothing between its convolutions but norms."""
    kind = type(block)
    if kind.__name__ != "InvertedResidual" or not kind.__module__.startswith("timm."):
        return False
    between = (block.aa, block.se, block.drop_path)
    return block.conv_s2d is None and all(isinstance(each, nn.Identity) for each in between)


def _is_norm(module: nn.Module) -> bool:
    """torch's batch norm or timm's with an activation, and no other subclass."""
    names = {kind.__name__ for kind in type(module).__mro__[:2]}
    return isinstance(module, nn.BatchNorm2d) and bool(names & {"BatchNorm2d", "BatchNormAct2d"})


def _activation(module: nn.Module | None) -> int | None:
    """The kernels' number of an activation, none of a module that is none they know."""
    if module is None or isinstance(module, nn.Identity):
        return NONE
    if isinstance(module, nn.ReLU6):
        return RELU6
    return RELU if isinstance(module, nn.ReLU) else None


def _fits(conv: Any, x: Tensor) -> bool:
    return (
        conv.training
        and x.ndim == 4
        and x.shape[1] == conv.in_channels
        and computed_in(x.dtype) == conv.weight.dtype
        and takes(x)
    )


def _is_pointwise(conv: nn.Conv2d) -> bool:
    one = all(set(v) == {1} for v in (conv.kernel_size, conv.stride))
    return one and conv.groups == 1 and not isinstance(conv.padding, str) and not any(conv.padding)


def _pays_as_product(conv: Any, x: Tensor) -> bool:
    """Wide convolutions of large maps are faster as PyTorch has them (docs/performance.md).

    So are, in bfloat16 without tiles, all but those of the smallest maps.
    """
    pixels = x.numel() // x.shape[1]
    if x.dtype == torch.bfloat16:
        return pixels <= 512 or has_tiles()
    return max(conv.in_channels, conv.out_channels) <= 128 or pixels <= 4096


def _is_known_depthwise(conv: nn.Conv2d) -> bool:
    square = all(len(set(v)) == 1 for v in (conv.kernel_size, conv.stride, conv.dilation))
    return (
        conv.groups == conv.in_channels == conv.out_channels > 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and square
    )


def _window(conv: Any, x: Tensor) -> Window:
    kernel, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    import_timm()
    from timm.layers.conv2d_same import Conv2dSame

    if isinstance(conv, Conv2dSame):
        top, bottom = _same(x.shape[-2], kernel, stride, dilation)
        left, right = _same(x.shape[-1], kernel, stride, dilation)
    else:
        (top, left), (bottom, right) = conv.padding, conv.padding
    return Window(kernel, stride, dilation, (top, bottom, left, right))


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's padding: as much as ceil(size / stride) outputs need, the odd one behind."""
    needed = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return needed // 2, needed - needed // 2
