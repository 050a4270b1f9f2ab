"""The kernels' convolutions as operations that torch.compile puts into its graphs."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from posefabric.models.fast_convolutions import is_known_depthwise, is_pointwise, window_of
from posefabric.models.fused_depthwise import Window, convolved, towards_input, towards_weight
from posefabric.models.fused_products import product, product_gradients
from posefabric.models.kernels import channels_last, has_tiles


def trace_convolutions(cell: nn.Module) -> None:
    """Have a cell's 1x1 and depthwise convolutions be those operations, in place.

    Only where the processor has tiles, and in bfloat16: elsewhere torch's own are as fast.
    """
    for module in cell.modules() if has_tiles() else ():
        if not isinstance(module, nn.Conv2d):
            continue
        if is_pointwise(module):
            _become(module, _Pointwise)
        elif is_known_depthwise(module):
            own, other = (window_of(module, torch.empty(1, 1, size, size)) for size in (7, 8))
            if own != other:
                continue  # its padding follows the map
            numbers = [own.kernel, own.stride, own.dilation, *own.padding]
            object.__setattr__(module, "numbers", numbers)
            _become(module, _Depthwise)


def _become(module: nn.Module, kind: type) -> None:
    before = type(module)
    module.__class__ = type(before.__name__, (kind, before), {})
    object.__setattr__(module, "operations", _operations())


class _Traced:
    operations: Any

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            layer: Any = super()
            return layer.forward(input)
        return self.of_maps(input.to(torch.bfloat16))

    def of_maps(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Pointwise(_Traced):
    def of_maps(self, x: Tensor) -> Tensor:
        conv: Any = self
        return self.operations.pointwise(x, conv.weight, conv.bias)


class _Depthwise(_Traced):
    numbers: list[int]

    def of_maps(self, x: Tensor) -> Tensor:
        conv: Any = self
        return self.operations.depthwise(x, conv.weight, self.numbers)


def _window(numbers: list[int]) -> Window:
    kernel, stride, dilation, top, bottom, left, right = numbers
    return Window(kernel, stride, dilation, (top, bottom, left, right))


@functools.cache
def _operations() -> SimpleNamespace:
    """Registered with torch at the first call."""

    @torch.library.custom_op("posefabric::pointwise", mutates_args=())
    def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(channels_last(x), weight, bias)

    @torch.library.custom_op("posefabric::pointwise_gradients", mutates_args=())
    def pointwise_gradients(
        x: Tensor, weight: Tensor, gradient: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = True, True, has_bias
        dx, dweight, dbias = product_gradients(
            channels_last(x), weight, channels_last(gradient), wanted, None
        )
        assert dx is not None and dweight is not None
        return dx, dweight, weight.new_empty(0) if dbias is None else dbias

    @torch.library.custom_op("posefabric::depthwise", mutates_args=())
    def depthwise(x: Tensor, weight: Tensor, window: list[int]) -> Tensor:
        return convolved(channels_last(x), weight, _window(window))

    @torch.library.custom_op("posefabric::depthwise_gradients", mutates_args=())
    def depthwise_gradients(
        x: Tensor, weight: Tensor, gradient: Tensor, window: list[int]
    ) -> tuple[Tensor, Tensor]:
        x, gradient, own = channels_last(x), channels_last(gradient), _window(window)
        dx = towards_input(gradient, weight, own, like=x)
        return dx, towards_weight(x, gradient, weight, own)

    def maps(x: Tensor, channels: int, height: int, width: int) -> Tensor:
        size = (x.shape[0], channels, height, width)
        return x.new_empty(size).to(memory_format=torch.channels_last)

    @pointwise.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return maps(x, weight.shape[0], *x.shape[2:])

    @pointwise_gradients.register_fake
    def _(
        x: Tensor, weight: Tensor, gradient: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dbias = weight.new_empty(weight.shape[0] if has_bias else 0)
        return maps(x, *x.shape[1:]), torch.empty_like(weight).contiguous(), dbias

    @depthwise.register_fake
    def _(x: Tensor, weight: Tensor, window: list[int]) -> Tensor:
        return maps(x, x.shape[1], *_window(window).out_hw(*x.shape[2:]))

    @depthwise_gradients.register_fake
    def _(x: Tensor, weight: Tensor, gradient: Tensor, window: list[int]) -> tuple[Tensor, Tensor]:
        return maps(x, *x.shape[1:]), torch.empty_like(weight).contiguous()

    def keep_pointwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)

    def pointwise_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = pointwise_gradients(*ctx.saved_tensors, gradient, ctx.has_bias)
        return dx, dweight, dbias if ctx.has_bias else None

    def keep_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.window = inputs
        ctx.save_for_backward(x, weight)

    def depthwise_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *depthwise_gradients(*ctx.saved_tensors, gradient, ctx.window), None

    pointwise.register_autograd(pointwise_back, setup_context=keep_pointwise)
    depthwise.register_autograd(depthwise_back, setup_context=keep_depthwise)
    return SimpleNamespace(pointwise=pointwise, depthwise=depthwise)
