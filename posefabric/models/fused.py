"""Weighted sums of normalised maps on the CPU kernels, and maps that are computed again.

Of ``act(norm(x))`` only x is kept for the backward pass; the rest is computed again. Gradients
are not differentiable once more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posefabric.models.native import load_kernels
from posefabric.structures import PosefabricError

NONE, RELU, RELU6 = 0, 1, 2
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def takes(x: Tensor) -> bool:
    """Whether the kernels can take part in a training step on ``x``: else PyTorch computes."""
    return (
        x.device.type == "cpu"
        and x.dtype in SUFFIX
        and x.ndim == 4
        and x.numel() > 0
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and load_kernels().library is not None
    )


def takes_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether ``norm`` normalises by this batch, alone, and says how to keep statistics."""
    return (
        isinstance(norm, nn.BatchNorm2d)
        and norm.training
        and norm.momentum is not None
        and norm.running_mean is not None
        and norm.running_mean.dtype == x.dtype
        and norm.num_features == x.shape[1]
        and x.numel() // x.shape[1] > 1
        and not _has_other_ranks()
    )


def _has_other_ranks() -> bool:
    """Several processes normalise by all their batches, which these kernels do not see."""
    parallel = torch.distributed
    return parallel.is_available() and parallel.is_initialized() and parallel.get_world_size() > 1


@dataclass
class Term:
    """``weight * act(norm(x))``; x is (B, C, H, W), ``weight`` a scalar."""

    x: Tensor
    weight: Tensor | float = 1.0
    norm: nn.BatchNorm2d | None = None
    act: int = NONE


@dataclass
class _Kept:
    """Of one term, what is not a tensor of the graph."""

    weight: float
    act: int
    stats: Tensor | None


def weighted_sum(terms: Sequence[Term], *, relu: bool = False) -> Tensor:
    """The sum of the terms, through a ReLU where asked: one pass forward, nothing in between.

    Norms must be such that :func:`takes_norm`; they move their running statistics. Raises
    PosefabricError for maps of several shapes.
    """
    shape = terms[0].x.shape
    if any(term.x.shape != shape for term in terms):
        shapes = ", ".join(str(tuple(term.x.shape)) for term in terms)
        raise PosefabricError(f"maps of a sum: expected one shape, got {shapes}")
    tensors: list[Tensor | None] = []
    for term in terms:
        scalar = term.weight if isinstance(term.weight, Tensor) else None
        affine = (None, None) if term.norm is None else (term.norm.weight, term.norm.bias)
        tensors += [channels_last(term.x), scalar, *affine]
    result: Tensor = _WeightedSum.apply(list(terms), relu, *tensors)  # type: ignore[assignment]
    only = terms[0]
    if len(terms) == 1 and only.act != NONE and only.norm is not None and not relu:
        _say_how_to_recompute(result)
    return result


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: list[Term], relu: bool, *tensors: Tensor | None) -> Tensor:
        maps = [tensors[4 * i] for i in range(len(terms))]
        kept = []
        for term, x, gamma, beta in zip(terms, maps, tensors[2::4], tensors[3::4], strict=True):
            assert x is not None
            stats = None if term.norm is None else _statistics(x, term.norm, gamma, beta)
            number = torch.as_tensor(term.weight).detach().item()
            kept.append(_Kept(number, term.act, stats))
        out = _mix(maps, kept, relu)  # type: ignore[arg-type]
        ctx.kept, ctx.relu = kept, relu
        ctx.save_for_backward(*tensors, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        *tensors, out = ctx.saved_tensors
        gradient = channels_last(gradient)
        found: list[Tensor | None] = []
        for i, kept in enumerate(ctx.kept):
            x, scalar, gamma, beta = tensors[4 * i : 4 * i + 4]
            wanted = ctx.needs_input_grad[2 + 4 * i : 6 + 4 * i]
            dx = torch.empty_like(x, memory_format=torch.channels_last) if wanted[0] else None
            dgamma = torch.empty_like(gamma) if gamma is not None and wanted[2] else None
            dbeta = torch.empty_like(beta) if beta is not None and wanted[3] else None
            slope = kernel("mix_backward", x.dtype)(
                *map(address, (x, gradient, out, kept.stats, gamma, beta)),
                kept.act,
                kept.weight,
                *rows_of(x),
                bool(wanted[1]),
                *map(address, (dx, dgamma, dbeta)),
            )
            dscalar = x.new_tensor(slope).view_as(scalar) if wanted[1] else None
            found += [dx, dscalar, dgamma, dbeta]
        return (None, None, *found)


def _statistics(x: Tensor, norm: nn.BatchNorm2d, gamma: Tensor | None, beta: Tensor | None):
    """Rows of C: mean, 1 / deviation, factor, summand. Moves the norm's running statistics."""
    stats = x.new_empty(4, x.shape[1])
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    kernel("statistics", x.dtype)(
        address(x),
        *rows_of(x),
        *map(address, (gamma, beta, norm.running_mean, norm.running_var)),
        norm.momentum,
        norm.eps,
        address(stats),
    )
    return stats


def _mix(maps: Sequence[Tensor], kept: Sequence[_Kept], relu: bool) -> Tensor:
    count = len(maps)
    out = torch.empty_like(maps[0], memory_format=torch.channels_last)
    factors = [None if k.stats is None else k.stats.data_ptr() + _row_bytes(k.stats) for k in kept]
    kernel("mix", out.dtype)(
        count,
        (ctypes.c_void_p * count)(*[x.data_ptr() for x in maps]),
        (ctypes.c_void_p * count)(*factors),
        (ctypes.c_longlong * count)(*[k.act for k in kept]),
        (ctypes.c_double * count)(*[k.weight for k in kept]),
        *rows_of(out),
        relu,
        address(out),
    )
    return out


def _row_bytes(stats: Tensor) -> int:
    """Where the factors begin: behind the means and the deviations."""
    return 2 * stats.shape[1] * stats.element_size()


@dataclass
class Recipe:
    """How to have a map again that was not kept."""

    again: Callable[[], Tensor]
    version: int

    def __call__(self) -> Tensor:
        return self.again()


def _say_how_to_recompute(result: Tensor) -> None:
    node: Any = result.grad_fn
    if node is not None:
        x = node.saved_tensors[0].detach()
        kept = node.kept[0]
        give_recipe(result, lambda: _mix([x], [kept], False))


def give_recipe(result: Tensor, again: Callable[[], Tensor]) -> None:
    """Say how to compute ``result`` again, to the layers that would keep it."""
    result.recipe = Recipe(again, result._version)  # type: ignore[attr-defined]


def recipe_of(x: Tensor) -> Recipe | None:
    """None where there is none, or where somebody has written into x since."""
    recipe: Recipe | None = getattr(x, "recipe", None)
    return None if recipe is None or recipe.version != x._version else recipe


def recomputing(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)`` that does not keep x for the backward pass where x tells its recipe."""
    recipe = recipe_of(x)
    if recipe is None:
        return layer(x)
    place, shape = x.data_ptr(), x.shape

    def pack(kept: Tensor) -> Tensor | Recipe:
        return recipe if kept.data_ptr() == place and kept.shape == shape else kept

    def unpack(kept: Tensor | Recipe) -> Tensor:
        return kept() if isinstance(kept, Recipe) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(x)


def kernel(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    return getattr(load_kernels().library, f"{name}_{SUFFIX[dtype]}")


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows_of(x: Tensor) -> tuple[int, int]:
    """Pixels of the batch, and channels."""
    return x.numel() // x.shape[1], x.shape[1]


def channels_last(x: Tensor) -> Tensor:
    """Channels last in memory, without gaps."""
    return x.contiguous(memory_format=torch.channels_last)
