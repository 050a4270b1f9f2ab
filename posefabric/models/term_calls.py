"""Calls of the kernels that compute a sum of terms and its gradients: one for all terms."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posefabric.distributed.adder import Adder
from posefabric.models.kernels import address, computed_in, kernel, rows_of
from posefabric.structures import PosefabricError

# The layout of Term and Slope in weighted_sum.h.
_TERM = struct.Struct("@8P2q3d")
_SLOPE = struct.Struct("@7P2qd")
NONE, RELU, RELU6 = 0, 1, 2


class Norms:
    """What adds up the batches of all processes for norms that see all of them."""

    adder: Adder | None = None


@contextlib.contextmanager
def norms_over_all(adder: Adder) -> Iterator[None]:
    """Inside, norms see the batches of all processes, which call it as often, forward and back."""
    before, Norms.adder = Norms.adder, adder
    try:
        yield
    finally:
        Norms.adder = before


def one_value(shape: torch.Size) -> PosefabricError:
    return PosefabricError(
        f"a batch norm sees one value a channel ({tuple(shape)}, all processes together); use a "
        f"larger batch_size or input_wh"
    )


@dataclass(slots=True)
class Term:
    """``weight * act(norm(x + bias))``; x is (B, C, H, W), ``weight`` a scalar.

    ``bias`` (C,) is that of the convolution before the norm, which takes it away again: it only
    moves the running mean, and its gradient is zero. A norm in evaluation mode is frozen: it takes
    its running statistics as they are, and learns nothing.
    """

    x: Tensor
    weight: Tensor | float = 1.0
    norm: nn.BatchNorm2d | None = None
    act: int = NONE
    bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """x, weight, gamma, beta and bias, where they are tensors."""
        scalar = self.weight if isinstance(self.weight, Tensor) else None
        norm = self.norm
        if norm is None:
            return self.x, scalar, None, None, None
        return self.x, scalar, norm.weight, norm.bias, self.bias


@dataclass(slots=True)
class Kept:
    """Of a sum, what its backward pass needs besides the graph's tensors.

    Attributes:
        stats: (norms, 4, C): mean, 1 / deviation, factor and summand of every norm.
        values: how many values a channel the norms have seen, in all processes.
    """

    weights: list[float]
    acts: list[int]
    normed: list[bool]
    stats: Tensor | None
    values: float
    adder: Adder | None

    def places(self) -> list[int | None]:
        """Each term's address of its four rows."""
        if self.stats is None:
            return [None] * len(self.normed)
        step = 4 * self.stats.shape[2] * self.stats.element_size()
        places = itertools.count(self.stats.data_ptr(), step)
        return [next(places) if normed else None for normed in self.normed]


def add_terms(
    terms: Sequence[Term],
    tensors: Sequence[Tensor | None],
    adder: Adder | None,
    out: Tensor | None,
    *,
    relu: bool = False,
) -> Kept:
    """Fill ``out``, of the maps' shape, with the sum; none: only the norms' statistics.

    Moves the running statistics of norms that are not frozen. ``tensors`` are those of every
    term. Raises PosefabricError where norms see one value a channel, or what the adder met.
    """
    first = tensors[0]
    assert first is not None
    rows, channels = rows_of(first)
    normed = [term.norm is not None for term in terms]
    count = sum(normed)
    kept = Kept(
        weights=[w.item() if isinstance(w := t.weight, Tensor) else float(w) for t in terms],
        acts=[term.act for term in terms],
        normed=normed,
        stats=torch.empty(count, 4, channels, dtype=computed_in(first.dtype)) if count else None,
        values=float(rows),
        adder=adder if count else None,
    )
    packed = b"".join(
        _TERM.pack(*_addresses(term, tensors[5 * i : 5 * i + 5], place), *_numbers(term, weight))
        for i, (term, place, weight) in enumerate(
            zip(terms, kept.places(), kept.weights, strict=True)
        )
    )
    run = kernel("weighted_sum", first.dtype)
    over_all = _over_all(kept.adder)
    kept.values = run(len(terms), packed, rows, channels, False, *over_all, relu, address(out))
    if kept.values < 0:
        raise _problem(kept)
    if kept.values <= 1 and any(t.norm is not None and t.norm.training for t in terms):
        raise one_value(first.shape)
    return kept


def term_again(x: Tensor, kept: Kept) -> Tensor:
    """The sum of one normalised term that was computed before."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    own = x.data_ptr(), 0, 0, 0, 0, 0, 0, kept.places()[0] or 0
    packed = _TERM.pack(*own, kept.acts[0], False, kept.weights[0], 0.0, 0.0)
    run = kernel("weighted_sum", x.dtype)
    run(1, packed, *rows_of(x), True, None, None, False, out.data_ptr())
    return out


def term_gradients(
    kept: Kept,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    gradient: Tensor,
    out: Tensor | None,
) -> list[Tensor | None]:
    """Those of every term's tensors, where ``wanted`` says so.

    ``gradient`` is the sum's, channels_last; ``out`` the sum, where it went through a ReLU.
    """
    count, (rows, channels) = len(kept.weights), rows_of(gradient)
    empty = torch.empty_like
    # What the ReLU lets through, once for all terms.
    passed = empty(gradient) if out is not None and count > 1 else None
    before_relu = gradient if out is None else passed
    found: list[Tensor | None] = []
    packed = []
    for i, (place, act, weight) in enumerate(
        zip(kept.places(), kept.acts, kept.weights, strict=True)
    ):
        x, scalar, gamma, beta, bias = tensors[5 * i : 5 * i + 5]
        wants_x, wants_weight, wants_gamma, wants_beta, wants_bias = wanted[5 * i : 5 * i + 5]
        assert x is not None
        same = place is None and weight == 1.0 and before_relu is not None
        dx = None
        if wants_x:
            dx = before_relu if same else empty(x, memory_format=torch.channels_last)
        dgamma = empty(gamma) if gamma is not None and wants_gamma else None
        dbeta = empty(beta) if beta is not None and wants_beta else None
        wants_weight = wants_weight and scalar is not None
        packed.append(
            _SLOPE.pack(
                x.data_ptr(),
                *(address(t) or 0 for t in (gamma, beta)),
                place or 0,
                *(address(t) or 0 for t in (dgamma, dbeta, None if same else dx)),
                act,
                wants_weight,
                weight,
            )
        )
        none = torch.zeros_like(bias) if bias is not None and wants_bias else None
        found += [dx, scalar if wants_weight else None, dgamma, dbeta, none]
    totals = torch.empty(count, 2 * channels + 1, dtype=torch.float64)
    run = kernel("weighted_sum_back", gradient.dtype)
    maps = [address(t) for t in (gradient, out, passed)]

    numbers = totals.data_ptr(), kept.values, *_over_all(kept.adder)
    if run(count, b"".join(packed), rows, channels, *maps, *numbers):
        raise _problem(kept)
    for i in range(count):
        scalar = found[5 * i + 1]
        if scalar is not None:
            found[5 * i + 1] = totals[i, -1].to(scalar.dtype)
    return found


def _over_all(adder: Adder | None) -> tuple[int | None, int | None]:
    return (None, None) if adder is None else (adder.function, adder.context)


def _problem(kept: Kept) -> BaseException:
    assert kept.adder is not None
    return kept.adder.problem()


def _addresses(term: Term, tensors: Sequence[Tensor | None], stats: int | None) -> tuple[int, ...]:
    x, _, gamma, beta, bias = tensors
    norm = term.norm
    if norm is None:
        return address(x) or 0, 0, 0, 0, 0, 0, 0, 0
    own = (x, gamma, beta, bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return *(address(t) or 0 for t in own), stats or 0


def _numbers(term: Term, weight: float) -> tuple[int, bool, float, float, float]:
    norm = term.norm
    if norm is None:
        return term.act, False, weight, 0.0, 0.0
    return term.act, not norm.training, weight, norm.momentum or 0.0, norm.eps
