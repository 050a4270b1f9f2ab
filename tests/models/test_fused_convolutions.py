"""Convolutions that compute a norm before them, or share their input, against PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import noise
from torch import Tensor, nn
from torch.nn import functional

from posefabric.distributed import Adder
from posefabric.models.fused_depthwise import Window, depthwise, fan_out, normed_depthwise
from posefabric.models.fused_products import pointwise, pointwise_beside
from posefabric.models.kernels import has_tiles, load_kernels
from posefabric.models.term_calls import NONE, RELU, RELU6, Term, norms_over_all

pytestmark = pytest.mark.skipif(
    load_kernels().library is None, reason=f"no kernels: {load_kernels().reason}"
)
ACTS = {NONE: nn.Identity(), RELU: nn.ReLU(), RELU6: nn.ReLU6()}
# What is left by one rounding to bfloat16, relative to the whole map or gradient.
BOUND = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-3}


def maps(*shape: int, kind: torch.dtype, seed: int = 0) -> Tensor:
    found = noise(*shape, seed=seed).to(kind)
    return found.contiguous(memory_format=torch.channels_last).requires_grad_()


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_near(found: Tensor, expected: Tensor, kind: torch.dtype) -> None:
    error = float((found.detach().double() - expected.detach()).norm())
    assert error <= BOUND[kind] * max(1.0, float(expected.detach().norm()))


@pytest.mark.parametrize("kind", list(BOUND))
@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize(
    ("channels", "window", "hw"),
    [
        (5, Window(3, 1, 1, (1, 1, 1, 1)), (6, 7)),
        (40, Window(3, 1, 2, (2, 2, 2, 2)), (17, 5)),
        (72, Window(5, 2, 1, (1, 2, 1, 2)), (9, 8)),
    ],
)
def test_a_norm_before_a_depthwise_convolution(
    kind: torch.dtype, act: int, channels: int, window: Window, hw: tuple[int, int]
) -> None:
    """Values, all gradients and statistics; the padding is of what the norm gives, not of x.

    The bias of the convolution before takes part in nothing but the running mean.
    """
    computed = torch.float32 if kind == torch.bfloat16 else kind
    x = maps(3, channels, *hw, kind=kind)
    norm = nn.BatchNorm2d(channels).to(computed)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, 1, 3)
    bias = noise(channels, seed=5).to(computed).requires_grad_()
    weight = noise(channels, 1, window.kernel, window.kernel, seed=1).to(computed).requires_grad_()
    other = copy.deepcopy(norm).double()
    same, own_bias, own_weight = exact(x, bias, weight)
    top, bottom, left, right = window.padding
    inner = ACTS[act](other(same + own_bias.view(1, -1, 1, 1)))
    expected = functional.conv2d(
        functional.pad(inner, (left, right, top, bottom)),
        own_weight,
        stride=window.stride,
        dilation=window.dilation,
        groups=channels,
    )
    found = normed_depthwise(Term(x, norm=norm, act=act, bias=bias), weight, window)
    assert found.dtype == kind
    assert_near(found, expected, kind)
    towards = maps(*expected.shape, kind=kind, seed=2).detach()
    ours = torch.autograd.grad(found, (x, norm.weight, norm.bias, weight, bias), towards)
    theirs = torch.autograd.grad(
        expected, (same, other.weight, other.bias, own_weight, own_bias), towards.double()
    )
    for a, b in zip(ours, theirs, strict=True):
        # The two sums of the norm's backward pass read a map that is rounded between.
        assert float((a.double() - b).norm()) <= 2 * BOUND[kind] * max(1.0, float(b.norm()))
    assert ours[4].abs().max() == 0
    assert norm.running_mean is not None and other.running_mean is not None
    assert_near(norm.running_mean, other.running_mean, kind)
    assert norm.num_batches_tracked == other.num_batches_tracked


def test_such_a_norm_over_two_processes() -> None:
    x, weight = maps(2, 6, 5, 4, kind=torch.float64), noise(6, 1, 3, 3, seed=1).requires_grad_()
    norms = [nn.BatchNorm2d(6).double() for _ in range(2)]
    window = Window(3, 1, 1, (1, 1, 1, 1))
    towards = noise(2, 6, 5, 4, seed=2)
    found = []
    for times, norm in enumerate(norms, 1):
        with norms_over_all(Adder.calling(lambda sums, times=times: times * sums)):
            out = normed_depthwise(Term(x, norm=norm, act=RELU), weight, window)
            gradients = torch.autograd.grad(out, (x, weight, norm.weight, norm.bias), towards)
        found.append([out, *gradients, norm.running_mean])
    for one, both in zip(*found, strict=True):
        torch.testing.assert_close(one, both, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", list(BOUND))
@pytest.mark.parametrize("used", [(0, 1, 2), (1, 2), (0, 2), (0,)])
def test_gradients_of_a_fan_meet(kind: torch.dtype, used: tuple[int, ...]) -> None:
    """Also of branches that nothing comes back from."""
    computed = torch.float32 if kind == torch.bfloat16 else kind
    x = maps(3, 24, 9, 6, kind=kind)
    weights = [noise(24, 1, 3, 3, seed=i).to(computed).requires_grad_() for i in (1, 2)]
    windows = [Window(3, 1, 1, (1, 1, 1, 1)), Window(3, 1, 2, (2, 2, 2, 2))]
    same, *own = exact(x, *weights)
    expected = [same] + [
        functional.conv2d(same, w, padding=v.dilation, dilation=v.dilation, groups=24)
        for w, v in zip(own, windows, strict=True)
    ]
    found = fan_out(x, weights, windows)
    towards = [maps(3, 24, 9, 6, kind=kind, seed=7 + i).detach() for i in range(3)]
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, kind)
    torch.autograd.backward([found[i] for i in used], [towards[i] for i in used])
    torch.autograd.backward([expected[i] for i in used], [towards[i].double() for i in used])
    assert x.grad is not None and same.grad is not None
    # The sum grows in the map, rounded once for each that comes.
    assert float((x.grad.double() - same.grad).norm()) <= 2 * BOUND[kind] * float(same.grad.norm())
    for i, (a, b) in enumerate(zip(weights, own, strict=True), 1):
        assert (a.grad is not None) == (b.grad is not None) == (i in used)
        if a.grad is not None and b.grad is not None:
            assert_near(a.grad, b.grad, kind)


def test_a_fan_says_how_to_compute_its_maps_again() -> None:
    x, weight = maps(2, 8, 5, 5, kind=torch.float32), noise(8, 1, 3, 3).float()
    window = Window(3, 1, 1, (1, 1, 1, 1))
    for out in (fan_out(x, [weight], [window])[1], depthwise(x, weight, window)):
        assert torch.equal(out.recipe(), out)  # type: ignore[attr-defined]
    norm = nn.BatchNorm2d(8)
    behind = normed_depthwise(Term(x, norm=norm, act=RELU), weight, window)
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    assert torch.equal(behind.recipe(), behind)  # type: ignore[attr-defined]
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [(32, 32), (64, 32), (9, 70), (40, 16), (1, 1), (160, 96)])
@pytest.mark.parametrize("hw", [(8, 8), (3, 5), (1, 1), (37, 29)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_over_pixels(channels: tuple[int, int], hw: tuple[int, int], biased: bool) -> None:
    """In bfloat16: whole blocks of 32, their remains, several pieces of pixels, a path beside."""
    size_in, size_out = channels
    x = maps(2, size_in, *hw, kind=torch.bfloat16)
    weight = noise(size_out, size_in, 1, 1, seed=1).bfloat16().float().requires_grad_()
    bias = noise(size_out, seed=2).bfloat16().float().requires_grad_() if biased else None
    same, own = exact(x, weight)
    own_bias = None if bias is None else bias.detach().double().requires_grad_()
    expected = functional.conv2d(same, own, own_bias)
    direct, found = pointwise_beside(x, weight, bias)
    assert torch.equal(direct, x)
    assert_near(found, expected, torch.bfloat16)
    assert torch.equal(found, pointwise(x, weight, bias))
    towards = maps(*expected.shape, kind=torch.bfloat16, seed=3).detach()
    beside = maps(*x.shape, kind=torch.bfloat16, seed=4).detach()
    wanted = [same, own] if own_bias is None else [same, own, own_bias]
    ours: list[Tensor] = [x, weight] if bias is None else [x, weight, bias]
    gradients = torch.autograd.grad([found, direct], ours, [towards, beside])
    theirs = torch.autograd.grad([expected, same * 1], wanted, [towards.double(), beside.double()])
    kinds = [torch.bfloat16, torch.float32, torch.float32]
    for a, b, kind in zip(gradients, theirs, kinds, strict=False):
        assert a.dtype == kind
        # Without tiles what is a product is rounded, whatever it becomes.
        assert_near(a, b, kind if has_tiles() else torch.bfloat16)


@pytest.mark.skipif(not has_tiles(), reason="no tiles: the products are torch's")
def test_products_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    x, weight = maps(3, 70, 19, 17, kind=torch.bfloat16), noise(40, 70, 1, 1).float()
    weight.requires_grad_()
    towards = maps(3, 40, 19, 17, kind=torch.bfloat16, seed=1).detach()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = pointwise(x, weight, None)
            found.append([out, *torch.autograd.grad(out, (x, weight), towards)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_value_that_is_none_stays_in_its_pixel() -> None:
    x = maps(1, 24, 6, 6, kind=torch.bfloat16).detach()
    x[0, 3, 2, 2] = torch.nan
    found = pointwise(x, noise(40, 24, 1, 1).float(), None)
    assert found[..., 2, 2].isnan().all() and found.isnan().sum() == 40
