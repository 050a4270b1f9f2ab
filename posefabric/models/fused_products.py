"""1x1 convolutions of channels_last maps on a CPU: a product over pixels, on tiles if any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posefabric.models.kernels import address, channels_last, empty_map, has_tiles, kernel


class Meeting:
    """Where gradients of a map add up that graphs read which go backward one after the other.

    A leaf with one as its ``meeting`` has what :func:`pointwise` finds in ``total``, added up on
    the way, and what others find in ``grad`` as always.
    """

    total: Tensor | None = None


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W) by weight (D, C, 1, 1): a matrix product over pixels, in x's precision."""
    meeting = getattr(x, "meeting", None)
    return _Pointwise.apply(channels_last(x), weight, bias, meeting)  # type: ignore[return-value]


def pointwise_beside(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x and ``pointwise`` of it; the gradients of both meet in one map."""
    return _PointwiseBeside.apply(channels_last(x), weight, bias)  # type: ignore[return-value]


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, meeting: Meeting | None = None
    ) -> Tensor:
        ctx.meeting = meeting
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        meeting: Meeting | None = ctx.meeting
        plus = None if meeting is None else meeting.total
        wanted = ctx.needs_input_grad[:3]
        dx, *others = product_gradients(x, weight, channels_last(gradient), wanted, plus)
        if meeting is None:
            return dx, *others, None
        meeting.total = dx
        return None, *others, None


class _PointwiseBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x, _Pointwise.forward(ctx, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, direct: Tensor | None, gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return direct, None, None
        x, weight = ctx.saved_tensors
        plus = None if direct is None else channels_last(direct)
        return product_gradients(x, weight, channels_last(gradient), ctx.needs_input_grad, plus)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``pointwise`` without its gradients; x is channels_last."""
    # Not a view of a product: whoever comes next may write into it.
    out = empty_map(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
    if _on_tiles(x):
        kernel("pointwise", x.dtype)(
            *map(address, (x, weight.contiguous(), bias, None, out)),
            *_matrix(x, weight),
            False,
        )
        return out
    matrix = weight.flatten(1).t().to(x.dtype)
    if bias is None:
        torch.mm(_pixels(x), matrix, out=_pixels(out))
    else:
        torch.addmm(bias.to(x.dtype), _pixels(x), matrix, out=_pixels(out))
    return out


def product_gradients(
    x: Tensor, weight: Tensor, gradient: Tensor, wanted: Sequence[bool], plus: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, which ``plus`` is added to, of the weight and of the bias."""
    wants_x, wants_weight, wants_bias = wanted
    dx = dweight = None
    if _on_tiles(x):
        if wants_x:
            dx = empty_map(x, x.shape)
            kernel("pointwise", x.dtype)(
                *map(address, (gradient, weight.contiguous(), None, plus, dx)),
                *_matrix(x, weight),
                True,
            )
        if wants_weight:
            dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            kernel("pointwise_weight", x.dtype)(
                *map(address, (x, gradient, dweight)), *_matrix(x, weight)
            )
    else:
        slopes = _pixels(gradient)
        if wants_x:
            dx = _image(slopes @ weight.flatten(1).to(x.dtype), x)
            dx = dx if plus is None else dx.add_(plus)
        if wants_weight:
            dweight = (slopes.t() @ _pixels(x)).view(weight.shape).to(weight.dtype)
    dbias = _pixels(gradient).sum(0, dtype=weight.dtype) if wants_bias else None
    return dx, dweight, dbias


def _on_tiles(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and has_tiles()


def _matrix(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Pixels, channels in and channels out."""
    return x.numel() // x.shape[1], weight.shape[1], weight.shape[0]


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W), channels_last, to (B H W, C) without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    batch, _, height, width = like.shape
    return pixels.view(batch, height, width, -1).permute(0, 3, 1, 2)
