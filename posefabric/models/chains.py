"""Layers in a row on the fast path: what stands beside a norm is computed with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from posefabric.models.fast_convolutions import (
    FastConv,
    FastDepthwise,
    FastPointwise,
    fits,
    window_of,
)
from posefabric.models.fused import takes, takes_norm, weighted_sum
from posefabric.models.fused_depthwise import normed_depthwise
from posefabric.models.fused_products import pointwise_beside
from posefabric.models.kernels import has_tiles
from posefabric.models.term_calls import NONE, RELU, RELU6, Term


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
            if isinstance(conv, FastDepthwise) and fits(conv, x):
                weight = cast(Any, conv).weight
                x = normed_depthwise(term, weight, window_of(conv, x))
                end += 1
            else:
                x = weighted_sum([term])
            i, bias = end, None
            continue
        following = layers[i + 1] if i + 1 < len(layers) else then
        if _is_biased(layer) and following is not None and _takes_bias(following, layer, x):
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


def beside(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and the convolution of it; on tiles the gradients of both meet in one map."""
    if isinstance(conv, FastPointwise) and has_tiles() and x.dtype == torch.bfloat16:
        module: Any = conv
        if fits(conv, x):
            return pointwise_beside(x, module.weight, module.bias)
    return x, conv(x)


def is_norm(module: nn.Module) -> bool:
    """torch's batch norm or timm's with an activation, and no other subclass."""
    names = {kind.__name__ for kind in type(module).__mro__[:2]}
    return isinstance(module, nn.BatchNorm2d) and bool(names & {"BatchNorm2d", "BatchNormAct2d"})


def activation_of(module: nn.Module | None) -> int | None:
    """The kernels' number of an activation, none of a module that is none they know."""
    if module is None or isinstance(module, nn.Identity):
        return NONE
    if isinstance(module, nn.ReLU6):
        return RELU6
    return RELU if isinstance(module, nn.ReLU) else None


def _norm_at(layers: Sequence[nn.Module], i: int) -> tuple[int | None, int]:
    """The activation of a norm in place i, its own or the one behind it, and what comes next.

    None where there is no norm, or one whose activation the kernels do not know.
    """
    if not is_norm(layers[i]):
        return None, i
    own = activation_of(getattr(layers[i], "act", None))
    if own != NONE or i + 1 == len(layers):
        return own, i + 1
    behind = activation_of(layers[i + 1])
    return (NONE, i + 1) if behind is None else (behind, i + 2)


def _takes_bias(norm: nn.Module, layer: Any, x: Tensor) -> bool:
    """Whether a norm takes away the bias before it, or at least none that learns."""
    unmoved = norm.training or not layer.bias.requires_grad
    return is_norm(norm) and unmoved and takes(x)


def _is_biased(layer: nn.Module) -> bool:
    known = isinstance(layer, FastConv) and layer.plain is nn.Conv2d
    return known and cast(Any, layer).bias is not None


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.view(1, -1, 1, 1).to(x.dtype)
