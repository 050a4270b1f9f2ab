"""Batch norms over the batch of all processes, on any device, exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from posefabric.distributed import adder, summed
from posefabric.models.term_calls import norms_over_all, one_value

_TORCHS = functional.batch_norm


@contextlib.contextmanager
def synchronised_norms(*, kernels: bool = True) -> Iterator[None]:
    """Inside, a training batch norm normalises by the statistics of all ranks' batches.

    :func:`torch.nn.functional.batch_norm` is another function meanwhile, so that no module is
    exchanged and recomputation is synchronised too, and the CPU kernels are told, where the
    network has any (``kernels``, alike on all ranks). (A mode that
    intercepts every function of torch takes a fifth of a step; torch's own SyncBatchNorm is for
    GPUs alone.) Norms in evaluation mode are as always.
    """
    before, functional.batch_norm = functional.batch_norm, _batch_norm
    try:
        with norms_over_all(adder()) if kernels else contextlib.nullcontext():
            yield
    finally:
        functional.batch_norm = before


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return _TORCHS(input, running_mean, running_var, weight, bias, False, momentum, eps)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if weight is None:
        weight = torch.ones(input.shape[1], dtype=dtype, device=input.device)
    if bias is None:
        bias = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
    output, mean, var, count = _Norm.apply(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            # As torch does: the statistics kept have the unbiased variance.
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var), momentum)
    return output


class _Norm(torch.autograd.Function):
    """Batch norm whose sums, forwards and backwards, run over all ranks.

    Local passes are torch's own kernels: one that finds the statistics, one that normalises by
    given ones. Sums are added in float64, where squares of means lose nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = x.numel() // x.shape[1]
        var, mean = _statistics(x)
        here = mean.double(), var.double()
        count = here[0].new_full((1,), float(own))
        total, first, second = summed([count, own * here[0], own * (here[1] + here[0] ** 2)])
        if total <= 1:
            raise one_value(x.shape)
        mean = first / total
        var = (second / total - mean**2).clamp(min=0)
        kept = weight.dtype
        mean, var = mean.to(kept), var.to(kept)
        output = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, total)
        return output, mean, var, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        grad = grads[0]
        # Only the sums: with the input's gradient this kernel takes eight times as long on a CPU.
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None
        along, constant = summed([grad_weight.double(), grad_bias.double()])
        # dx = w / s (dy - mean(dy) - (x - mean) / s mean(dy (x - mean) / s)): linear in dy and x.
        scale = (var.double() + ctx.eps).rsqrt()
        direct = weight.double() * scale
        slope = -direct * scale * along / total
        offset = -direct * constant / total - slope * mean.double()
        shape = [1, -1, *[1] * (x.ndim - 2)]
        direct, slope, offset = (v.to(weight.dtype).view(shape) for v in (direct, slope, offset))
        grad_x = torch.addcmul(offset, x.to(slope), slope).addcmul_(grad.to(direct), direct)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance (biased) and mean of each channel, in float32 or better."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    count = x.numel() // x.shape[1]
    mean = wide.sum(axes) / count
    # Two plain passes: a fifth of the time of torch.var_mean on a CPU, and as stable.
    apart = wide - mean.view(1, -1, *[1] * (x.ndim - 2))
    return apart.square_().sum(axes) / count, mean
