"""Convolutions of channels_last maps on a CPU: depthwise on the kernels, 1x1 as a product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posefabric.models.kernels import address, channels_last, kernel
from posefabric.models.recomputing import give_recipe, recipe_of


@dataclass(frozen=True)
class Window:
    """A depthwise convolution's geometry; ``padding`` is top, bottom, left, right, in pixels."""

    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int, int, int]

    def out_hw(self, height: int, width: int) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        reach = self.dilation * (self.kernel - 1)
        return (
            (height + top + bottom - reach - 1) // self.stride + 1,
            (width + left + right - reach - 1) // self.stride + 1,
        )


def depthwise(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """x (B, C, H, W) by weight (C, 1, k, k), as ``conv2d`` with as many groups as channels.

    It is cheap enough to be computed again for a convolution that reads it.
    """
    recipe, kept = recipe_of(x), weight.detach()
    x = channels_last(x)
    result: Tensor = _Depthwise.apply(x, weight, window)  # type: ignore[assignment]
    if recipe is None:
        source = x.detach()
        give_recipe(result, lambda: _convolved(source, kept, window))
    else:
        give_recipe(result, lambda: _convolved(recipe(), kept, window))
    return result


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, window: Window) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient, window = channels_last(gradient), ctx.window
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _empty(x, x.shape)
            _run(gradient, weight, dx, window, transposed=True)
        if ctx.needs_input_grad[1]:
            rows = weight.new_empty(window.kernel**2, x.shape[1])
            kernel("depthwise_weight", x.dtype)(
                *map(address, (x, gradient, rows)),
                *_sizes(x, gradient),
                *_numbers(window),
            )
            dweight = rows.t().reshape(weight.shape)
        return dx, dweight, None


def _convolved(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    out = _empty(x, (*x.shape[:2], *window.out_hw(*x.shape[2:])))
    _run(x, weight, out, window, transposed=False)
    return out


def _run(x: Tensor, weight: Tensor, out: Tensor, window: Window, *, transposed: bool) -> None:
    rows = weight.flatten(1).t().contiguous()
    kernel("depthwise", x.dtype)(
        *map(address, (x, rows, out)), *_sizes(x, out), *_numbers(window), transposed
    )


def _sizes(x: Tensor, out: Tensor) -> tuple[int, ...]:
    """Batch, height and width of both, channels."""
    return x.shape[0], *x.shape[2:], *out.shape[2:], x.shape[1]


def _numbers(window: Window) -> tuple[int, int, int, int, int]:
    return window.kernel, window.stride, window.dilation, window.padding[0], window.padding[2]


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    size = torch.Size(shape)
    return torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W) by weight (D, C, 1, 1): a matrix product over pixels, in x's precision."""
    return _Pointwise.apply(channels_last(x), weight, bias)  # type: ignore[return-value]


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        matrix = weight.flatten(1).t().to(x.dtype)
        # Not a view of the product: whoever comes next may write into it.
        out = _empty(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
        if bias is None:
            torch.mm(_pixels(x), matrix, out=_pixels(out))
        else:
            torch.addmm(bias.to(x.dtype), _pixels(x), matrix, out=_pixels(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes = _pixels(channels_last(gradient))
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _image(slopes @ weight.flatten(1).to(x.dtype), x)
        if ctx.needs_input_grad[1]:
            dweight = (slopes.t() @ _pixels(x)).view(weight.shape).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = slopes.sum(0, dtype=weight.dtype)
        return dx, dweight, dbias


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W), channels_last, to (B H W, C) without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    batch, _, height, width = like.shape
    return pixels.view(batch, height, width, -1).permute(0, 3, 1, 2)
