"""The kernels against PyTorch's own layers, and maps that are computed again."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import noise
from torch import Tensor, nn
from torch.nn import functional

from posefabric.distributed import Adder
from posefabric.models.chains import chain
from posefabric.models.fused import is_frozen, takes_norm, weighted_sum
from posefabric.models.fused_depthwise import Window, depthwise
from posefabric.models.grouped import fast_path
from posefabric.models.kernels import load_kernels
from posefabric.models.term_calls import NONE, RELU, RELU6, Term, norms_over_all
from posefabric.space.operations import DepthwiseConv2d
from posefabric.structures import PosefabricError

pytestmark = pytest.mark.skipif(
    load_kernels().library is None, reason=f"no kernels: {load_kernels().reason}"
)


@pytest.mark.parametrize("channels", [3, 8, 37])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding", "hw"),
    [
        (3, 1, 1, (1, 1, 1, 1), (5, 7)),
        (5, 2, 1, (1, 2, 1, 2), (8, 9)),
        (3, 1, 2, (2, 2, 2, 2), (4, 4)),
        (5, 1, 1, (2, 2, 2, 2), (4, 4)),
        (3, 2, 1, (0, 1, 0, 1), (6, 6)),
    ],
)
def test_depthwise_is_torchs_convolution(
    channels: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: tuple[int, int, int, int],
    hw: tuple[int, int],
) -> None:
    """Vectors of channels and what is left of them, borders on all sides, both strides."""
    x = noise(5, channels, *hw).requires_grad_()
    weight = noise(channels, 1, kernel, kernel, seed=1).requires_grad_()
    top, bottom, left, right = padding
    expected = functional.conv2d(
        functional.pad(x, (left, right, top, bottom)),
        weight,
        stride=stride,
        dilation=dilation,
        groups=channels,
    )
    towards = noise(*expected.shape, seed=2)
    found = depthwise(x, weight, Window(kernel, stride, dilation, padding))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), towards),
        torch.autograd.grad(expected, (x, weight), towards),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("channels", [5, 24])
def test_a_sum_of_every_kind_of_term(channels: int) -> None:
    """With and without norm, each activation, weights as numbers and as tensors, a final ReLU."""
    norms = [nn.BatchNorm2d(channels, affine=affine).double() for affine in (True, False, True)]
    for norm in (norms[0], norms[2]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, 1, 3)
    copies = copy.deepcopy(norms)
    maps = [noise(3, channels, 6, 5, seed=i).mul(3).add(2).requires_grad_() for i in range(4)]
    weights = [torch.tensor(v).double().requires_grad_() for v in (0.3, -0.7)]

    def plain() -> Tensor:
        total = weights[0] * functional.relu(copies[0](maps[0])) + weights[1] * maps[1]
        return functional.relu(
            total + 0.5 * copies[1](maps[2]) + functional.relu6(copies[2](maps[3]))
        )

    terms = [
        Term(maps[0], weights[0], norms[0], RELU),
        Term(maps[1], weights[1]),
        Term(maps[2], 0.5, norms[1]),
        Term(maps[3], 1.0, norms[2], RELU6),
    ]
    expected, found = plain(), weighted_sum(terms, relu=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    towards = noise(*expected.shape, seed=9)
    wanted = [*maps, *weights, copies[0].weight, copies[0].bias, copies[2].weight, copies[2].bias]
    ours = [*maps, *weights, norms[0].weight, norms[0].bias, norms[2].weight, norms[2].bias]
    for a, b in zip(
        torch.autograd.grad(found, ours, towards),
        torch.autograd.grad(expected, wanted, towards),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for norm, other in zip(norms, copies, strict=True):
        for name, value in other.named_buffers():
            torch.testing.assert_close(norm.get_buffer(name), value, rtol=0, atol=1e-12)


def test_norms_of_two_processes_that_have_the_same() -> None:
    """Their sums are twice each one's; torch has both batches at once."""
    norms = [nn.BatchNorm2d(5, affine=affine).double() for affine in (True, False)]
    nn.init.uniform_(norms[0].weight, 0.5, 2)
    copies = copy.deepcopy(norms)
    x, y, z = (noise(3, 5, 4, 3, seed=i).add(i).requires_grad_() for i in range(3))
    towards = noise(3, 5, 4, 3, seed=4)
    calls: list[int] = []

    def add_up(sums: Tensor) -> Tensor:
        calls.append(len(sums))
        return 2 * sums

    with norms_over_all(Adder.calling(add_up)):
        terms = [Term(x, 0.5, norms[0], RELU), Term(y, norm=norms[1]), Term(z, 2.0)]
        found = weighted_sum(terms)
        found.backward(towards)
    # Two norms of five channels in one operation, and how many pixels; then the same backward.
    assert calls == [2 * 2 * 5 + 1, 2 * 2 * 5]
    ours = [x.grad, y.grad, z.grad, norms[0].weight.grad, norms[0].bias.grad]
    twice = [torch.cat([v.detach()] * 2).requires_grad_() for v in (x, y, z)]
    expected = 0.5 * functional.relu(copies[0](twice[0])) + copies[1](twice[1]) + 2.0 * twice[2]
    expected.backward(torch.cat([towards] * 2))
    theirs = [v.grad[:3] for v in twice]  # type: ignore[index]
    theirs += [copies[0].weight.grad / 2, copies[0].bias.grad / 2]  # type: ignore[operator]
    torch.testing.assert_close(found, expected[:3], rtol=0, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for norm, other in zip(norms, copies, strict=True):
        for name, value in other.named_buffers():
            torch.testing.assert_close(norm.get_buffer(name), value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("act", [NONE, RELU, RELU6])
def test_a_frozen_norm_takes_its_statistics_as_they_are(act: int, affine: bool) -> None:
    """Of x + bias, beside a norm that learns; no other process is asked, one pixel is enough."""
    norm, learning = (nn.BatchNorm2d(5, affine=affine).double() for _ in range(2))
    for name in ("weight", "bias") if affine else ():
        nn.init.uniform_(norm.get_parameter(name), -2, 2)
    nn.init.uniform_(norm.get_buffer("running_mean"), -1, 1)
    nn.init.uniform_(norm.get_buffer("running_var"), 0.2, 3)
    norm.eval().requires_grad_(False)
    before = copy.deepcopy(norm.state_dict())
    x, bias = 3 * noise(3, 5, 4, 3), noise(5, seed=1)
    z = noise(3, 5, 4, 3, seed=2).requires_grad_()
    copied = copy.deepcopy(learning)
    assert takes_norm(norm, x) and is_frozen(norm, x)
    found = weighted_sum([Term(x, 0.5, norm, act, bias), Term(z, norm=learning)])
    activate = {NONE: lambda v: v, RELU: functional.relu, RELU6: functional.relu6}[act]
    expected = 0.5 * activate(norm(x + bias.view(1, 5, 1, 1))) + copied(z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    towards = noise(3, 5, 4, 3, seed=3)
    ours, theirs = (torch.autograd.grad(sum_, z, towards)[0] for sum_ in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    asked: list[Tensor] = []
    with norms_over_all(Adder.calling(lambda sums: asked.append(sums) or sums)):
        weighted_sum([Term(x[:1, :, :1, :1], norm=norm)])
    assert not asked
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    # What passes a gradient on, or learns, is not frozen.
    assert not takes_norm(norm, z)
    assert not takes_norm(norm.requires_grad_(affine), x) or not affine


def test_a_bias_that_learns_before_a_frozen_norm_has_its_gradient() -> None:
    """A norm by the batch takes a bias away again; one by running statistics does not."""
    layers = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)).double()
    layers[1].eval()
    layers.requires_grad_(False)
    layers[0].bias.requires_grad_()
    x, towards = noise(2, 4, 3, 3), noise(2, 5, 3, 3, seed=1)
    expected = torch.autograd.grad(layers(x), layers[0].bias, towards)[0]
    assert expected.abs().min() > 0
    found = chain(list(fast_path(layers)), x)  # type: ignore[call-overload]
    torch.testing.assert_close(torch.autograd.grad(found, layers[0].bias, towards)[0], expected)


def test_one_value_a_channel_in_all_processes_is_told() -> None:
    with (
        norms_over_all(Adder.calling(lambda sums: sums)),
        pytest.raises(PosefabricError, match="one value a ch"),
    ):
        weighted_sum([Term(noise(1, 4, 1, 1).requires_grad_(), norm=nn.BatchNorm2d(4).double())])


def test_kernels_take_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch brings an OpenMP of its own, which knows nothing of theirs."""
    library, before = load_kernels().library, torch.get_num_threads()
    assert library is not None
    try:
        for threads in (3, 2):
            # What torch would say, had it another one: here both may be the same.
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            weighted_sum([Term(noise(1, 4, 2, 2))])
            assert library.threads() == threads
    finally:
        library.use_threads(before)


def test_norms_far_from_zero_and_what_is_not_a_number() -> None:
    """A mean of a million deviations in float32; NaN and infinity are not hidden by a ReLU."""
    x = noise(4, 9, 8, 8).float() * 1e-2 + 1e4
    exact = nn.BatchNorm2d(9, affine=False).double()(x.double())
    norm, other = (nn.BatchNorm2d(9, affine=False) for _ in range(2))
    found = weighted_sum([Term(x, norm=norm)])
    assert float((found - exact).abs().max()) <= float((other(x) - exact).abs().max()) * 1.5 + 0.05
    far = noise(4, 9, 8, 8) * 1e-2 + 1e4
    norm, other = (nn.BatchNorm2d(9, affine=False).double() for _ in range(2))
    torch.testing.assert_close(weighted_sum([Term(far, norm=norm)]), other(far), rtol=0, atol=1e-7)
    norm = nn.BatchNorm2d(9, affine=False)
    for bad in (torch.nan, torch.inf):
        x[1, 3, 2, 2] = bad
        out = weighted_sum([Term(x, norm=norm, act=RELU)], relu=True)
        assert out[:, 3].isnan().all() and out[:, 4].isfinite().all()


def test_what_can_be_had_again_is_not_kept() -> None:
    """A convolution behind a norm and its ReLU keeps the norm's recipe, not its output."""
    network = fast_path(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    x = noise(2, 8, 6, 6).float().requires_grad_()
    inner = chain(list(network)[:2], x)
    assert inner.recipe().equal(inner)  # type: ignore[attr-defined]
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        network[2](inner)
    assert not any(tensor.data_ptr() == inner.data_ptr() for tensor in packed)
    inner.detach().add_(1)
    changed = network[2](inner)
    (gradient,) = torch.autograd.grad(changed.sum(), network[2].weight)
    torch.testing.assert_close(gradient[0, :, 0, 0], inner.detach().sum((0, 2, 3)))


def test_a_chain_of_recipes_keeps_what_it_starts_from() -> None:
    """Norm, depthwise, pointwise: the product needs its input again, and that one the norm."""
    layers = nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU(), DepthwiseConv2d(4, kernel=3), nn.Conv2d(4, 4, 1, bias=False)
    )
    kept: list[Tensor] = []
    x = noise(2, 4, 6, 6).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    network = fast_path(layers.train())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        network(x)
    maps = {
        tensor.data_ptr() for tensor in kept if tensor.ndim == 4 and tensor.numel() == x.numel()
    }
    assert maps == {x.data_ptr()}
