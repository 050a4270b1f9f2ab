"""Weighted sums of normalised maps on the CPU kernels, and maps that are computed again.

Of ``act(norm(x))`` only x is kept for the backward pass; the rest is computed again. Gradients
are not differentiable once more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posefabric.models.kernels import SUFFIX, channels_last, computed_in, load_kernels
from posefabric.models.recomputing import give_recipe
from posefabric.models.term_calls import (
    NONE,
    Norms,
    Term,
    add_terms,
    term_again,
    term_gradients,
)
from posefabric.structures import PosefabricError


def takes(x: Tensor) -> bool:
    """Whether the kernels can take part in a training step on ``x``: else PyTorch computes.

    Under autocast it is maps in bfloat16 that they take, elsewhere those in float32 and float64.
    """
    autocast = torch.is_autocast_enabled("cpu")
    return (
        x.device.type == "cpu"
        and x.dtype in SUFFIX
        and (x.dtype == torch.bfloat16) == autocast
        and x.ndim == 4
        and x.numel() > 0
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and load_kernels().library is not None
    )


def takes_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether ``norm`` normalises by the batch, and says how to keep statistics, or is frozen.

    Processes whose norms see all their batches give the same answer.
    """
    return (
        isinstance(norm, nn.BatchNorm2d)
        and norm.momentum is not None
        and norm.running_mean is not None
        and norm.running_mean.dtype == computed_in(x.dtype)
        and norm.num_features == x.shape[1]
        and (
            is_frozen(norm, x)
            if not norm.training
            else Norms.adder is not None or x.numel() // x.shape[1] > 1
        )
    )


def is_frozen(layer: nn.Module, x: Tensor) -> bool:
    """A layer in evaluation mode, within a training step, that no gradient passes."""
    learns = x.requires_grad or any(p.requires_grad for p in layer.parameters(recurse=False))
    return not layer.training and not learns


def weighted_sum(terms: Sequence[Term], *, relu: bool = False) -> Tensor:
    """The sum of the terms, through a ReLU where asked: one pass forward, nothing in between.

    Norms must be such that :func:`takes_norm`; they move their running statistics, unless they
    are frozen. Raises
    PosefabricError for maps of several shapes.
    """
    shape = terms[0].x.shape
    if any(term.x.shape != shape for term in terms):
        shapes = ", ".join(str(tuple(term.x.shape)) for term in terms)
        raise PosefabricError(f"maps of a sum: expected one shape, got {shapes}")
    kinds = {term.x.dtype for term in terms}
    if len(kinds) > 1:
        # As the plain sum of maps in bfloat16 and float32.
        widest = functools.reduce(torch.promote_types, kinds)
        terms = [dataclasses.replace(term, x=term.x.to(widest)) for term in terms]
    for term in terms:
        term.x = channels_last(term.x)
    tensors = [tensor for term in terms for tensor in term.tensors()]
    result: Tensor = _WeightedSum.apply(list(terms), relu, *tensors)  # type: ignore[assignment]
    only = terms[0]
    if len(terms) == 1 and only.act != NONE and only.norm is not None and not relu:
        _say_how_to_recompute(result)
    return result


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: list[Term], relu: bool, *tensors: Tensor | None) -> Tensor:
        first: Any = tensors[0]
        out = torch.empty_like(first, memory_format=torch.channels_last)
        ctx.kept = add_terms(terms, tensors, Norms.adder, out, relu=relu)
        ctx.save_for_backward(*tensors, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        *tensors, out = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        return None, None, *term_gradients(ctx.kept, tensors, wanted, channels_last(gradient), out)


def _say_how_to_recompute(result: Tensor) -> None:
    node: Any = result.grad_fn
    if node is not None and result.dtype != torch.bfloat16:
        x, kept = node.saved_tensors[0].detach(), node.kept
        give_recipe(result, lambda: term_again(x, kept))
