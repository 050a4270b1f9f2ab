"""The candidate operations of a fabric, by name.

Layers and their order follow the paper's released code (PAPER section 1): convolutions have no
bias, batch norms inside candidates have no affine parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from posefabric.structures import PosefabricError


class Float32OnCpu:
    """Mixed into a convolution: under bf16 autocast on a CPU it runs in float32.

    There the weight gradient of a dilated depthwise convolution is wrong for some shapes, and
    that of any depthwise convolution on a small map many times slower than in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = super()
        if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return layer.forward(input)
        with torch.autocast("cpu", enabled=False):
            return layer.forward(input.float()).to(torch.get_autocast_dtype("cpu"))


class DepthwiseConv2d(Float32OnCpu, nn.Conv2d):
    """A depthwise convolution without bias that keeps the spatial size.

    While a CPU trains, dilation 2 is computed as an ordinary convolution of the four images of
    every other pixel: the same sums, six times faster forward and backward.
    """

    def __init__(self, channels: int, *, kernel: int, dilation: int = 1) -> None:
        super().__init__(
            channels,
            channels,
            kernel,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=channels,
            bias=False,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        trains = self.training and torch.is_grad_enabled()
        if self.dilation != (2, 2) or not trains or input.device.type != "cpu":
            return super()._conv_forward(input, weight, bias)
        height, width = input.shape[-2:]
        even = functional.pad(input, (0, width % 2, 0, height % 2))
        reach = weight.shape[-1] // 2
        images = functional.conv2d(
            _every_other(even), weight, bias, padding=reach, groups=self.groups
        )
        return _interleave(images)[..., :height, :width]


def _every_other(x: Tensor) -> Tensor:
    """(B, C, H, W) to (4 B, C, H/2, W/2): even and odd rows and columns, channels_last."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels)
    pixels = pixels.permute(2, 4, 0, 1, 3, 5)
    return pixels.reshape(4 * batch, height // 2, width // 2, channels).permute(0, 3, 1, 2)


def _interleave(x: Tensor) -> Tensor:
    """The inverse of :func:`_every_other`."""
    count, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(2, 2, count // 4, height, width, channels)
    pixels = pixels.permute(2, 3, 0, 4, 1, 5)
    return pixels.reshape(count // 4, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def keep_depthwise_exact(network: nn.Module) -> None:
    """Give every depthwise convolution of somebody else's network :class:`Float32OnCpu`."""
    classes: dict[type, type] = {}
    for module in network.modules():
        kind = type(module)
        is_depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        if is_depthwise and not isinstance(module, Float32OnCpu):
            if kind not in classes:
                classes[kind] = type(f"Float32{kind.__name__}", (Float32OnCpu, kind), {})
            module.__class__ = classes[kind]


def separable_layers(width: int, *, kernel: int, dilation: int = 1) -> list[nn.Module]:
    """Depthwise, pointwise, batch norm, ReLU."""
    return [
        DepthwiseConv2d(width, kernel=kernel, dilation=dilation),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width, affine=False),
        nn.ReLU(inplace=True),
    ]


class Zero(nn.Module):
    """Contributes nothing; it is in the candidate set so that an edge can vanish."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Stacked(nn.Module):
    """A candidate made of layers in a row."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.operation = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


def _norm_conv(width: int) -> list[nn.Module]:
    return [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]


def _pool(pool: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(pool, nn.BatchNorm2d(width, affine=False))


OPERATIONS: dict[str, Callable[[int], nn.Module]] = {
    "zero": lambda width: Zero(),
    "skip": lambda width: nn.Identity(),
    "sep_conv_3x3": lambda width: Stacked(
        separable_layers(width, kernel=3) + separable_layers(width, kernel=3)
    ),
    "sep_conv_5x5": lambda width: Stacked(
        separable_layers(width, kernel=5) + separable_layers(width, kernel=5)
    ),
    "dil_conv_3x3": lambda width: Stacked(separable_layers(width, kernel=3, dilation=2)),
    "dil_conv_5x5": lambda width: Stacked(separable_layers(width, kernel=5, dilation=2)),
    "avg_pool_3x3": lambda width: _pool(
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), width
    ),
    "max_pool_3x3": lambda width: _pool(nn.MaxPool2d(3, stride=1, padding=1), width),
    "basic_conv_3x3": lambda width: Stacked([*_norm_conv(width), nn.ReLU(), *_norm_conv(width)]),
    "bottle_conv_3x3": lambda width: Stacked(
        [*_norm_conv(width), *_norm_conv(width), *_norm_conv(width), nn.ReLU()]
    ),
    "conv_3x3": lambda width: nn.Conv2d(width, width, 3, padding=1),
}


def build_operation(name: str, width: int) -> nn.Module:
    """The candidate ``name`` on ``width`` channels: (B, width, H, W) in and out."""
    try:
        return OPERATIONS[name](width)
    except KeyError:
        raise PosefabricError(
            f"unknown operation {name!r}; model.operations takes {', '.join(OPERATIONS)}"
        ) from None
