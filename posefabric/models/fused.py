"""Weighted sums of normalised maps on the CPU kernels, and maps that are computed again.

Of ``act(norm(x))`` only x is kept for the backward pass; the rest is computed again. Gradients
are not differentiable once more.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posefabric.models.kernels import (
    SUFFIX,
    address,
    channels_last,
    computed_in,
    kernel,
    load_kernels,
    rows_of,
)
from posefabric.models.recomputing import give_recipe
from posefabric.structures import PosefabricError

NONE, RELU, RELU6 = 0, 1, 2


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


class _Norms:
    """What adds up the batches of all processes for norms that see all of them."""

    add_up: Callable[[Tensor], Tensor] | None = None


@contextlib.contextmanager
def norms_over_all(add_up: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, norms see the batches of all processes.

    ``add_up`` takes float64 (n,) and returns the sum over the processes, all of which call it
    as often, forward and backward.
    """
    before, _Norms.add_up = _Norms.add_up, add_up
    try:
        yield
    finally:
        _Norms.add_up = before


def takes_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether ``norm`` normalises by the batch, and says how to keep statistics.

    Processes whose norms see all their batches give the same answer.
    """
    return (
        isinstance(norm, nn.BatchNorm2d)
        and norm.training
        and norm.momentum is not None
        and norm.running_mean is not None
        and norm.running_mean.dtype == computed_in(x.dtype)
        and norm.num_features == x.shape[1]
        and (_Norms.add_up is not None or x.numel() // x.shape[1] > 1)
    )


def one_value(shape: torch.Size) -> PosefabricError:
    return PosefabricError(
        f"a batch norm sees one value a channel ({tuple(shape)}, all processes together); use a "
        f"larger batch_size or input_wh"
    )


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
    stats: Tensor | None = None


def weighted_sum(terms: Sequence[Term], *, relu: bool = False) -> Tensor:
    """The sum of the terms, through a ReLU where asked: one pass forward, nothing in between.

    Norms must be such that :func:`takes_norm`; they move their running statistics. Raises
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
        maps: Any = tensors[::4]
        numbers = [torch.as_tensor(term.weight).detach().item() for term in terms]
        kept = [_Kept(number, term.act) for number, term in zip(numbers, terms, strict=True)]
        ctx.add_up = _Norms.add_up
        ctx.values = _normalise(maps, terms, kept, ctx.add_up)
        out = _mix(maps, kept, relu)
        ctx.kept, ctx.relu = kept, relu
        ctx.save_for_backward(*tensors, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        *tensors, out = ctx.saved_tensors
        gradient = channels_last(gradient)
        if out is not None and len(ctx.kept) > 1:
            # Once for all terms.
            gradient, out = _through_relu(gradient, out), None
        steps = _Backward(gradient, out, ctx.values)
        terms = [
            _KeptTerm(
                kept, *tensors[4 * i : 4 * i + 4], *ctx.needs_input_grad[2 + 4 * i : 6 + 4 * i]
            )
            for i, kept in enumerate(ctx.kept)
        ]
        totals = torch.zeros(len(terms), 2 * gradient.shape[1], dtype=torch.float64)
        slopes, dxs = [], []
        for term, total in zip(terms, totals, strict=True):
            slopes.append(steps.sums(term, total))
            if ctx.add_up is None:
                # At once, while the map is in the cache.
                dxs.append(steps.input(term, total))
        if ctx.add_up is not None:
            shared = [term.kept.stats is not None and term.wants_x for term in terms]
            if any(shared):
                totals[shared] = ctx.add_up(totals[shared].flatten()).view(-1, totals.shape[1])
            dxs = [steps.input(term, total) for term, total in zip(terms, totals, strict=True)]
        found = [each for dx, own in zip(dxs, slopes, strict=True) for each in (dx, *own)]
        return (None, None, *found)


@dataclass
class _KeptTerm:
    """Of one term, what the backward pass has and what it is asked for."""

    kept: _Kept
    x: Tensor
    scalar: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    wants_x: bool
    wants_scalar: bool
    wants_gamma: bool
    wants_beta: bool


@dataclass
class _Backward:
    """The two halves of a term's backward pass.

    Attributes:
        gradient: of the sum.
        out: the sum, where it has a ReLU.
        values: how many values a channel the norms have seen.
    """

    gradient: Tensor
    out: Tensor | None
    values: float

    def sums(self, term: _KeptTerm, total: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of weight, gamma and beta; into ``total`` (2 C,) what the map's needs."""
        dgamma, dbeta = (
            torch.empty_like(each) if each is not None and wanted else None
            for each, wanted in ((term.gamma, term.wants_gamma), (term.beta, term.wants_beta))
        )
        if term.kept.stats is None and not term.wants_scalar:
            return None, None, None
        slope = kernel("term_sums", term.x.dtype)(
            *self._slopes(term),
            *map(address, (term.gamma, term.beta)),
            term.kept.weight,
            *map(address, (total, dgamma, dbeta)),
        )
        if term.scalar is None or not term.wants_scalar:
            return None, dgamma, dbeta
        return term.scalar.new_full(term.scalar.shape, slope), dgamma, dbeta

    def input(self, term: _KeptTerm, total: Tensor) -> Tensor | None:
        """The map's gradient, by the sums over all values of its norm."""
        if not term.wants_x:
            return None
        if term.kept.stats is None and term.kept.weight == 1.0 and self.out is None:
            return self.gradient
        dx = torch.empty_like(term.x, memory_format=torch.channels_last)
        kernel("term_input", term.x.dtype)(
            *self._slopes(term),
            address(term.gamma),
            term.kept.weight,
            address(total),
            self.values,
            address(dx),
        )
        return dx

    def _slopes(self, term: _KeptTerm) -> tuple[Any, ...]:
        maps = (term.x, self.gradient, self.out, term.kept.stats)
        return *map(address, maps), term.kept.act, *rows_of(term.x)


def _through_relu(gradient: Tensor, out: Tensor) -> Tensor:
    """The gradient where the ReLU's output is not zero."""
    passed = torch.empty_like(gradient, memory_format=torch.channels_last)
    kernel("term_input", gradient.dtype)(
        address(gradient),
        address(gradient),
        address(out),
        None,
        NONE,
        *rows_of(gradient),
        None,
        1.0,
        None,
        1.0,
        address(passed),
    )
    return passed


def _normalise(
    maps: Sequence[Tensor],
    terms: Sequence[Term],
    kept: Sequence[_Kept],
    add_up: Callable[[Tensor], Tensor] | None,
) -> float:
    """Put the statistics of the norms into ``kept`` and move the running ones.

    Returns how many values a channel they are of.
    """
    rows, channels = rows_of(maps[0])
    normed = [
        (x, term.norm, into)
        for x, term, into in zip(maps, terms, kept, strict=True)
        if term.norm is not None
    ]
    if not normed:
        return rows
    sums = torch.empty(len(normed) * 2 * channels + 1, dtype=torch.float64)
    places = range(sums.data_ptr(), address(sums[-1:]) or 0, 16 * channels)
    for (x, _, _), place in zip(normed, places, strict=True):
        kernel("moments", x.dtype)(address(x), rows, channels, add_up is not None, place)
    values = float(rows)
    if add_up is not None:
        # One operation for all norms of the sum.
        sums[-1] = rows
        sums = add_up(sums)
        values = float(sums[-1])
        places = range(sums.data_ptr(), address(sums[-1:]) or 0, 16 * channels)
    if values <= 1:
        raise one_value(maps[0].shape)
    for (x, norm, into), place in zip(normed, places, strict=True):
        origin = address(x) if add_up is None else None
        into.stats = x.new_empty(4, channels, dtype=computed_in(x.dtype))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        kernel("norm_factors", x.dtype)(
            place,
            origin,
            values,
            channels,
            *map(address, (norm.weight, norm.bias, norm.running_mean, norm.running_var)),
            norm.momentum,
            norm.eps,
            address(into.stats),
        )
    return values


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


def _say_how_to_recompute(result: Tensor) -> None:
    node: Any = result.grad_fn
    if node is not None:
        x = node.saved_tensors[0].detach()
        kept = node.kept[0]
        give_recipe(result, lambda: _mix([x], [kept], False))
