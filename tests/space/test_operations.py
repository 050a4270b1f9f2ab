"""Candidates compute what their names say, and their gradients survive bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from posefabric.space.operations import (
    OPERATIONS,
    DepthwiseConv2d,
    Float32OnCpu,
    build_operation,
    keep_depthwise_exact,
)
from posefabric.structures import PosefabricError

# Shapes in use: channels, side, batch. The dilated candidate was wrong at a batch of 32.
SHAPES = [(32, 32, 4), (64, 16, 4), (128, 8, 4)]
DEFAULT = ("skip", "sep_conv_3x3", "dil_conv_3x3")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module, seed: int = 1) -> nn.Module:
    """Weights and statistics that a misplaced layer would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=generator).to(tensor)
                tensor.copy_(1 + 0.5 * torch.tanh(value) if "var" in name else value)
    return module


def normed(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    shape = (1, -1, 1, 1)
    x = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return x if norm.weight is None else x * norm.weight.view(shape) + norm.bias.view(shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_candidate_keeps_the_shape(name: str) -> None:
    assert build_operation(name, 6)(noise(2, 6, 5, 7)).shape == (2, 6, 5, 7)


@pytest.mark.parametrize(
    ("name", "kernel", "dilation", "repeats"),
    [
        ("sep_conv_3x3", 3, 1, 2),
        ("sep_conv_5x5", 5, 1, 2),
        ("dil_conv_3x3", 3, 2, 1),
        ("dil_conv_5x5", 5, 2, 1),
    ],
)
def test_separable_candidates(name: str, kernel: int, dilation: int, repeats: int) -> None:
    """Depthwise, pointwise, batch norm without affine, ReLU, in the released code's order."""
    module = randomised(build_operation(name, 4).double()).eval()
    state = module.state_dict()
    x = noise(2, 4, 9, 9).double()
    expected = x
    for i in range(repeats):
        depthwise, pointwise = (state[f"operation.{4 * i + j}.weight"] for j in (0, 1))
        assert depthwise.shape == (4, 1, kernel, kernel) and pointwise.shape == (4, 4, 1, 1)
        padding = dilation * (kernel // 2)
        expected = functional.conv2d(
            expected, depthwise, padding=padding, dilation=dilation, groups=4
        )
        expected = functional.conv2d(expected, pointwise)
        norm = module.get_submodule(f"operation.{4 * i + 2}")
        assert isinstance(norm, nn.BatchNorm2d) and not norm.affine
        expected = normed(expected, norm).clamp(min=0)
    assert sum(p.numel() for p in module.parameters()) == repeats * (4 * kernel**2 + 16)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


def test_pools_are_those_of_their_window_then_normalised() -> None:
    x = noise(2, 3, 4, 5).double()
    for name in ("avg_pool_3x3", "max_pool_3x3"):
        module = randomised(build_operation(name, 3).double()).eval()
        pooled = torch.empty_like(x)
        for row in range(4):
            for column in range(5):
                window = x[
                    :, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2
                ].flatten(2)
                pooled[:, :, row, column] = window.mean(2) if name[0] == "a" else window.amax(2)
        assert isinstance(module, nn.Sequential) and not module[1].affine
        torch.testing.assert_close(module(x), normed(pooled, module[1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "places"), [("basic", (0, 3)), ("bottle", (0, 2, 4))])
def test_plain_convolutions_and_their_norms(name: str, places: tuple[int, ...]) -> None:
    module = randomised(build_operation(f"{name}_conv_3x3", 3).double()).eval()
    x = noise(2, 3, 6, 6).double()
    expected = x
    for place in places:
        weight = module.state_dict()[f"operation.{place}.weight"]
        expected = functional.conv2d(expected, weight, padding=1)
        norm = module.get_submodule(f"operation.{place + 1}")
        assert isinstance(norm, nn.BatchNorm2d) and norm.affine
        expected = normed(expected, norm)
        if name == "basic" and place == 0:
            expected = expected.clamp(min=0)
    expected = expected if name == "basic" else expected.clamp(min=0)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)
    assert not [n for n in module.state_dict() if n.endswith("operation.0.bias")]


def test_zero_skip_and_the_plain_convolution() -> None:
    x = noise(1, 3, 4, 4)
    assert torch.equal(build_operation("zero", 3)(x), torch.zeros_like(x))
    assert build_operation("skip", 3)(x) is x
    conv = build_operation("conv_3x3", 3)
    torch.testing.assert_close(
        conv(x), functional.conv2d(x, conv.weight, conv.bias, padding=1), rtol=0, atol=1e-6
    )


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PosefabricError, match=r"'sep_conv_4x4'.*sep_conv_3x3"):
        build_operation("sep_conv_4x4", 8)


def gradients(module: nn.Module, x: Tensor, towards: Tensor, *, low: bool) -> list[Tensor]:
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = module(x)
    (out.float() * towards).sum().backward()
    assert x.grad is not None
    found = [x.grad.clone()]
    for parameter in module.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    return found


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error in length over the input's and every weight's gradient."""
    errors = [
        float((a - b).norm() / b.norm()) if torch.isfinite(a).all() else float("inf")
        for a, b in zip(found, expected, strict=True)
    ]
    return max(errors)


CASES = [(name, *shape) for name in DEFAULT for shape in SHAPES]
CASES += [(name, *SHAPES[1]) for name in OPERATIONS if name not in (*DEFAULT, "zero")]
CASES += [(name, 32, 32, 32) for name in ("dil_conv_3x3", "dil_conv_5x5")]


@pytest.mark.parametrize(("name", "channels", "side", "batch"), CASES)
def test_bf16_gradients_are_those_of_float32(
    name: str, channels: int, side: int, batch: int
) -> None:
    """Every candidate at the shapes in use, channels_last, as a training step runs it."""
    torch.manual_seed(0)
    module = build_operation(name, channels).to(memory_format=torch.channels_last).train()
    x, towards = noise(batch, channels, side, side), noise(batch, channels, side, side, seed=1)
    expected = gradients(module, x, towards, low=False)
    # ReLUs that switch at zero leave a tenth; a wrong gradient is many orders off.
    assert worst(gradients(module, x, towards, low=True), expected) < 0.15


@pytest.mark.parametrize("height", [4, 7, 8])
@pytest.mark.parametrize("kernel", [3, 5])
def test_training_computes_dilation_from_every_other_pixel(kernel: int, height: int) -> None:
    """The same outputs and gradients as the convolution that evaluation runs, odd sides too."""
    conv = DepthwiseConv2d(3, kernel=kernel, dilation=2).double()
    outputs, gradients = [], []
    for training in (False, True):
        x = noise(2, 3, height, 9).double().requires_grad_()
        out = conv.train(training)(x)
        out.backward(noise(2, 3, height, 9, seed=1).double())
        outputs.append(out.detach())
        gradients.append((x.grad, conv.weight.grad.clone()))
        conv.zero_grad()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def plain_dilated(channels: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels, bias=False)


def test_float32_on_cpu_cures_the_dilated_gradient() -> None:
    """What the mixin is for: torch 2.13's CPU build gives a wrong gradient without it."""
    x, towards = noise(32, 32, 32, 32), noise(32, 32, 32, 32, seed=1)
    bare = plain_dilated(32).to(memory_format=torch.channels_last)
    expected = gradients(bare, x, towards, low=False)
    cured = DepthwiseConv2d(32, kernel=3, dilation=2).to(memory_format=torch.channels_last)
    cured.load_state_dict(bare.state_dict())
    assert worst(gradients(cured, x, towards, low=True), expected) < 0.01
    if worst(gradients(bare, x, towards, low=True), expected) < 0.05:
        pytest.skip("this torch build computes the bf16 dilated gradient right by itself")


def test_float32_on_cpu_gives_the_autocast_type_and_is_idle_without_it() -> None:
    conv = DepthwiseConv2d(4, kernel=3)
    x = noise(1, 4, 5, 5)
    exact = functional.conv2d(x, conv.weight, padding=1, groups=4)
    assert torch.equal(conv(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        low = conv(x.bfloat16())
    assert low.dtype == torch.bfloat16
    inner = functional.conv2d(x.bfloat16().float(), conv.weight, padding=1, groups=4)
    assert torch.equal(low, inner.bfloat16())


class Padded(nn.Conv2d):
    """Somebody else's convolution with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, (1, 1, 1, 1)))


def test_keep_depthwise_exact_changes_depthwise_convolutions_only() -> None:
    network = nn.Sequential(
        Padded(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2, padding=1)
    )
    x = noise(1, 4, 6, 6)
    before = network(x)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    keep_depthwise_exact(network)
    keep_depthwise_exact(network)
    assert [isinstance(layer, Float32OnCpu) for layer in network] == [True, False, False]
    assert isinstance(network[0], Padded) and type(network[0]).__mro__.count(Float32OnCpu) == 1
    assert torch.equal(network(x), before)
    assert torch.equal(copy.deepcopy(network)(x), before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])
