"""The kernels on maps in bfloat16: computed with in float32, rounded once at the end."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from typing import Any

import pytest
import torch
from networks import EVERY, make_supernet, noise
from torch import Tensor, nn
from torch.nn import functional

from posefabric.distributed import Adder
from posefabric.models.fused import takes, weighted_sum
from posefabric.models.fused_depthwise import Window, depthwise
from posefabric.models.fused_products import pointwise
from posefabric.models.grouped import fast_path
from posefabric.models.kernels import load_kernels
from posefabric.models.posenfs_backbones import Bottleneck
from posefabric.models.term_calls import RELU, RELU6, Term, norms_over_all
from posefabric.space.operations import build_operation

pytestmark = pytest.mark.skipif(
    load_kernels().library is None, reason=f"no kernels: {load_kernels().reason}"
)
# Half the distance between neighbours, and what float32 leaves of sums.
ONE_ROUNDING = dict(rtol=2.0**-8, atol=1e-5)


def low(*shape: int, seed: int = 0) -> Tensor:
    maps = noise(*shape, seed=seed).bfloat16()
    return maps.contiguous(memory_format=torch.channels_last).requires_grad_()


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("channels", [3, 8, 37, 96])
@pytest.mark.parametrize(
    ("window", "hw"),
    [
        (Window(3, 1, 1, (1, 1, 1, 1)), (19, 7)),
        (Window(3, 1, 2, (2, 2, 2, 2)), (4, 5)),
        (Window(5, 1, 1, (2, 2, 2, 2)), (9, 8)),
        (Window(5, 2, 1, (1, 2, 1, 2)), (20, 9)),
        (Window(3, 2, 1, (0, 1, 0, 1)), (6, 6)),
        (Window(7, 1, 1, (3, 3, 3, 3)), (8, 8)),
    ],
)
def test_depthwise(channels: int, window: Window, hw: tuple[int, int]) -> None:
    """Several strips of rows, rows that have all taps and such that have not."""
    x, weight = low(3, channels, *hw), noise(channels, 1, window.kernel, window.kernel, seed=1)
    weight = weight.float().requires_grad_()
    top, bottom, left, right = window.padding
    same = exact(x, weight)
    expected = functional.conv2d(
        functional.pad(same[0], (left, right, top, bottom)),
        same[1],
        stride=window.stride,
        dilation=window.dilation,
        groups=channels,
    )
    found = depthwise(x, weight, window)
    towards = low(*expected.shape, seed=2).detach()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, **ONE_ROUNDING)
    dx, dweight = torch.autograd.grad(found, (x, weight), towards)
    wanted = torch.autograd.grad(expected, same, towards.double())
    torch.testing.assert_close(dx.double(), wanted[0], **ONE_ROUNDING)
    assert dweight.dtype == torch.float32
    torch.testing.assert_close(dweight.double(), wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [5, 24, 48])
def test_a_sum_of_every_kind_of_term(channels: int) -> None:
    norms = [nn.BatchNorm2d(channels) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, 1, 3)
    copies = [copy.deepcopy(norm).double() for norm in norms]
    maps = [low(3, channels, 6, 5, seed=i) for i in range(4)]
    weight = torch.tensor(0.3).requires_grad_()
    found = weighted_sum(
        [
            Term(maps[0], weight, norms[0], RELU),
            Term(maps[1], 0.5),
            Term(maps[2], 1.0, norms[1], RELU6),
            Term(maps[3]),
        ],
        relu=True,
    )
    *same, scalar = exact(*maps, weight)
    first, second = functional.relu(copies[0](same[0])), functional.relu6(copies[1](same[2]))
    expected = functional.relu(scalar * first + 0.5 * same[1] + second + same[3])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, **ONE_ROUNDING)
    towards = low(*expected.shape, seed=9).detach()
    ours = [*maps, weight, norms[0].weight, norms[0].bias, norms[1].weight, norms[1].bias]
    theirs = [*same, scalar, copies[0].weight, copies[0].bias, copies[1].weight, copies[1].bias]
    for a, b in zip(
        torch.autograd.grad(found, ours, towards),
        torch.autograd.grad(expected, theirs, towards.double()),
        strict=True,
    ):
        # The sum's ReLU may see a rounded zero otherwise, at a few values.
        assert float((a.double() - b).norm() / b.norm()) < 4e-3
    for norm, other in zip(norms, copies, strict=True):
        assert norm.running_var is not None and other.running_var is not None
        torch.testing.assert_close(norm.running_var.double(), other.running_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("channels", [1, 8, 16, 33])
def test_it_rounds_as_torch_does(channels: int) -> None:
    """To the nearest, ties to even; what is not a number, or infinite, stays so."""
    x = low(2, channels, 9, 5).detach()
    ties = torch.tensor([1 + 2.0**-7, 1 + 3 * 2.0**-7, float("nan"), float("inf"), -0.0])
    x[:, 0, 0] = ties.bfloat16()
    for weight in (1.0, 1 + 2.0**-8, 1 / 3):
        for terms in (1, 2):
            found = weighted_sum([Term(x, weight)] * terms)
            expected = (terms * (x.float() * torch.tensor(weight).float())).bfloat16()
            assert torch.equal(bits(found), bits(expected))


def bits(x: Tensor) -> Tensor:
    """Of bfloat16, without the sign, which a number that is none may lose."""
    x = torch.where(x.isnan(), torch.tensor(float("nan")).bfloat16(), x)
    return x.view(torch.int16) & 0x7FFF


def test_a_product_over_pixels() -> None:
    x, weight, bias = low(2, 24, 5, 4), noise(16, 24, 1, 1, seed=1).float(), noise(16, seed=2)
    weight, bias = weight.bfloat16().float(), bias.bfloat16().float()
    weight.requires_grad_(), bias.requires_grad_()
    found = pointwise(x, weight, bias)
    same = exact(x, weight, bias)
    expected = functional.conv2d(*same)
    towards = low(*expected.shape, seed=3).detach()
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-7, atol=1e-2)
    for a, b, kind in zip(
        torch.autograd.grad(found, (x, weight, bias), towards),
        torch.autograd.grad(expected, same, towards.double()),
        (torch.bfloat16, torch.float32, torch.float32),
        strict=True,
    ):
        assert a.dtype == kind and float((a.double() - b).norm() / b.norm()) < 4e-3


def test_maps_of_two_precisions_are_added_as_torch_adds_them() -> None:
    x, y = low(1, 8, 3, 3), noise(1, 8, 3, 3, seed=1).float().requires_grad_()
    found = weighted_sum([Term(x, 0.5), Term(y)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 0.5 * x.float() + y)
    found.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and y.grad is not None


def test_norms_of_two_processes_that_have_the_same() -> None:
    """Their sums are twice each one's, of twice as many values."""
    found = []
    for times in (1, 2):
        norm, x = nn.BatchNorm2d(24), low(3, 24, 5, 4)
        with contextlib.ExitStack() as stack:
            if times == 2:
                stack.enter_context(norms_over_all(Adder.calling(lambda sums: 2 * sums)))
            out = weighted_sum([Term(x, norm=norm, act=RELU)])
            out.backward(low(*out.shape, seed=3).detach())
        found.append([out, x.grad, norm.weight.grad, norm.running_mean])
    for one, both in zip(*found, strict=True):
        assert one is not None and both is not None
        torch.testing.assert_close(one.float(), both.float(), rtol=2.0**-7, atol=1e-5)


def test_bfloat16_is_taken_under_autocast_and_float32_outside() -> None:
    x = low(1, 8, 3, 3)
    assert not takes(x) and takes(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert takes(x) and not takes(x.float())
    with torch.autocast("cpu", torch.float16):
        assert not takes(x.half())


def test_maps_in_bfloat16_are_kept() -> None:
    norm = nn.BatchNorm2d(8)
    kept = weighted_sum([Term(low(2, 8, 3, 3), norm=norm, act=RELU)])
    again = weighted_sum([Term(low(2, 8, 3, 3).float(), norm=norm, act=RELU)])
    assert not hasattr(kept, "recipe") and hasattr(again, "recipe")


def slopes(module: nn.Module, x: Tensor, *, precision: torch.dtype) -> list[Tensor]:
    """Output and gradients, under autocast for bfloat16."""
    x = x.to(torch.float64 if precision == torch.float64 else torch.float32)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        # As in a network, where a convolution comes before.
        inside = x.bfloat16() if precision == torch.bfloat16 else x
        out: Any = module(inside)
    towards = noise(*out.shape, seed=1)
    (out.double() * towards).sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def errors(module: nn.Module, x: Tensor) -> tuple[list[float], list[float]]:
    """Of output and gradients in bfloat16 on the plain and on the fast path."""
    exactly = slopes(copy.deepcopy(module).double(), x, precision=torch.float64)
    low = [
        slopes(each.to(memory_format=torch.channels_last), x, precision=torch.bfloat16)
        for each in (copy.deepcopy(module), fast_path(copy.deepcopy(module)))
    ]
    plain, fast = (
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exactly, strict=True)]
        for found in low
    )
    return plain, fast


@pytest.mark.parametrize("operation", [o for o in EVERY if o != "zero"])
def test_gradients_of_every_candidate(operation: str) -> None:
    """At the shapes in use, against float64: no worse than the plain path in bfloat16."""
    for channels, side in [(32, 32), (64, 16), (40, 8), (256, 4)]:
        if channels > 64 and operation in ("basic_conv_3x3", "bottle_conv_3x3"):
            continue  # dense and slow
        torch.manual_seed(0)
        plain, fast = errors(
            build_operation(operation, channels).train(), noise(2, channels, side, side)
        )
        assert max(fast) < max(0.02, 1.3 * max(plain)), (channels, plain, fast)


def test_a_bottleneck() -> None:
    torch.manual_seed(0)
    plain, fast = errors(Bottleneck(64, 16, stride=1).train(), noise(2, 64, 8, 8))
    assert max(fast) < 1.3 * max(plain)


def test_a_mixture_runs_on_the_kernels_and_is_no_further_off() -> None:
    network = make_supernet(operations=EVERY, channel_factor=2).float().train()
    plain, fast = errors(network, noise(4, 3, 64, 64))
    middle = len(plain) // 2
    assert sorted(fast)[middle] < 1.2 * sorted(plain)[middle] and fast[0] < 1.2 * plain[0]
    images = noise(2, 3, 64, 64).float().contiguous(memory_format=torch.channels_last)
    whole = fast_path(copy.deepcopy(network))
    wanted = nodes(whole(images))
    with torch.autocast("cpu", torch.bfloat16):
        found = nodes(whole(images))
    for kind in ("_WeightedSumBackward", "_DepthwiseBackward", "NativeBatchNormBackward0"):
        assert found[kind] == wanted[kind], kind
    assert found["_WeightedSumBackward"] > 0 < found["_DepthwiseBackward"]


def nodes(result: Tensor) -> Counter[str]:
    """How many of each kind its graph has."""
    seen: set[Any] = set()
    todo = [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return Counter(node.name() for node in seen)
