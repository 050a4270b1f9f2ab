"""Depthwise convolutions of channels_last maps on the CPU kernels, with the norm before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posefabric.models.kernels import address, channels_last, empty_map, kernel
from posefabric.models.recomputing import Recipe, give_recipe, recipe_of
from posefabric.models.term_calls import NONE, Kept, Norms, Term, add_terms, term_gradients


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
    recipe = recipe_of(x)
    x = channels_last(x)
    result: Tensor = _Depthwise.apply(x, weight, window)  # type: ignore[assignment]
    _say_how_to_recompute(result, recipe or x.detach(), weight.detach(), window)
    return result


def normed_depthwise(term: Term, weight: Tensor, window: Window) -> Tensor:
    """``depthwise`` of a term without weight, and without the map between the two.

    The norm must be such that ``takes_norm``.
    """
    term.x = channels_last(term.x)
    result: Tensor = _NormedDepthwise.apply(  # type: ignore[assignment]
        term, window, weight, *term.tensors()
    )
    node: Any = result.grad_fn
    if node is not None:
        _say_how_to_recompute(result, term.x.detach(), weight.detach(), window, node.kept)
    return result


def fan_out(x: Tensor, weights: Sequence[Tensor], windows: Sequence[Window]) -> list[Tensor]:
    """x, and x by each of the depthwise weights; the gradients of all meet in one map."""
    x = channels_last(x)
    direct, *found = _FanOut.apply(x, list(windows), *weights)  # type: ignore[misc]
    for result, weight, window in zip(found, weights, windows, strict=True):
        _say_how_to_recompute(result, x.detach(), weight.detach(), window)
    return [direct, *found]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, window: Window) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(x, weight)
        return convolved(x, weight, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient, window = channels_last(gradient), ctx.window
        wants_x, wants_weight, _ = ctx.needs_input_grad
        return (
            towards_input(gradient, weight, window, like=x) if wants_x else None,
            towards_weight(x, gradient, weight, window) if wants_weight else None,
            None,
        )


class _NormedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, term: Term, window: Window, weight: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.window = window
        ctx.kept = add_terms([term], tensors, Norms.adder, None)
        ctx.save_for_backward(weight, *tensors)
        return convolved(term.x, weight, window, ctx.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight, *tensors = ctx.saved_tensors
        gradient, window, kept = channels_last(gradient), ctx.window, ctx.kept
        _, _, wants_weight, *wanted = ctx.needs_input_grad
        x = tensors[0]
        dweight = towards_weight(x, gradient, weight, window, kept) if wants_weight else None
        if not any(wanted):
            return None, None, dweight, *[None] * len(wanted)
        inner = towards_input(gradient, weight, window, like=x)
        return None, None, dweight, *term_gradients(kept, tensors, wanted, inner, None)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: list[Window], *weights: Tensor) -> Any:
        ctx.windows = windows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        return x, *(convolved(x, w, own) for w, own in zip(weights, windows, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direct: Tensor | None, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        found = None if direct is None else channels_last(direct)
        dweights: list[Tensor | None] = []
        for i, (gradient, weight, window) in enumerate(
            zip(gradients, weights, ctx.windows, strict=True)
        ):
            dweights.append(None)
            if gradient is None:
                continue
            gradient = channels_last(gradient)
            if ctx.needs_input_grad[0]:
                found = towards_input(gradient, weight, window, like=x, plus=found)
            if ctx.needs_input_grad[2 + i]:
                dweights[i] = towards_weight(x, gradient, weight, window)
        return found, None, *dweights


def convolved(x: Tensor, weight: Tensor, window: Window, before: Kept | None = None) -> Tensor:
    """Of x, or of what the norm and activation before the convolution make of it."""
    out = empty_map(x, (*x.shape[:2], *window.out_hw(*x.shape[2:])))
    _run(x, weight, out, window, before=before)
    return out


def _say_how_to_recompute(
    result: Tensor,
    source: Tensor | Recipe,
    weight: Tensor,
    window: Window,
    before: Kept | None = None,
) -> None:
    def again() -> Tensor:
        x = source if isinstance(source, Tensor) else source()
        return convolved(x, weight, window, before)

    give_recipe(result, again)


def towards_input(
    gradient: Tensor, weight: Tensor, window: Window, *, like: Tensor, plus: Tensor | None = None
) -> Tensor:
    """The gradient of a convolution's input, and ``plus``, a map of the same shape."""
    out = empty_map(like, like.shape)
    _run(gradient, weight, out, window, plus=plus, transposed=True)
    return out


def towards_weight(
    x: Tensor, gradient: Tensor, weight: Tensor, window: Window, before: Kept | None = None
) -> Tensor:
    found = torch.empty_like(weight, memory_format=torch.contiguous_format)
    kernel("depthwise_weight", x.dtype)(
        x.data_ptr(),
        *_norm_of(before),
        *map(address, (gradient, found)),
        *_sizes(x, gradient),
        *_numbers(window),
    )
    return found


def _run(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    window: Window,
    *,
    before: Kept | None = None,
    plus: Tensor | None = None,
    transposed: bool = False,
) -> None:
    kernel("depthwise", x.dtype)(
        x.data_ptr(),
        *_norm_of(before),
        *map(address, (weight.contiguous(), plus, out)),
        *_sizes(x, out),
        *_numbers(window),
        transposed,
    )


def _norm_of(before: Kept | None) -> tuple[int | None, int]:
    return (None, NONE) if before is None else (before.places()[0], before.acts[0])


def _sizes(x: Tensor, out: Tensor) -> tuple[int, ...]:
    """Batch, height and width of both, channels."""
    return x.shape[0], *x.shape[2:], *out.shape[2:], x.shape[1]


def _numbers(window: Window) -> tuple[int, int, int, int, int]:
    return window.kernel, window.stride, window.dilation, window.padding[0], window.padding[2]
