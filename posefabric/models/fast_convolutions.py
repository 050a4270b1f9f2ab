"""Convolutions on the fast path: depthwise ones on the kernels, 1x1 ones as products."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from posefabric.models.fused import is_frozen, takes
from posefabric.models.fused_depthwise import Window, depthwise
from posefabric.models.fused_products import pointwise
from posefabric.models.kernels import computed_in, has_tiles
from posefabric.models.recomputing import recomputing
from posefabric.models.timm_import import import_timm


class Fast:
    """Marks a module on the fast path; ``plain`` is the class it had."""

    plain: type


class FastConv(Fast):
    """A convolution that does not keep a normalised input which can be had again."""

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = super()
        return recomputing(layer.forward, input)

    def without_bias(self, input: Tensor) -> Tensor:
        """Of torch's own convolution: the same without its bias."""
        module: Any = self
        return recomputing(lambda x: module._conv_forward(x, module.weight, None), input)


class FastPointwise(FastConv):
    """A 1x1 convolution of every pixel, as a matrix product where that pays."""

    def forward(self, input: Tensor) -> Tensor:
        bias = cast(Any, self).bias
        return self._product(input, bias) if self._pays(input) else super().forward(input)

    def without_bias(self, input: Tensor) -> Tensor:
        return self._product(input, None) if self._pays(input) else super().without_bias(input)

    def _pays(self, input: Tensor) -> bool:
        return fits(self, input) and _pays_as_product(self, input)

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        weight = cast(Any, self).weight
        return recomputing(lambda x: pointwise(x, weight, bias), input)


class FastDepthwise(Fast):
    """A depthwise convolution without bias."""

    def forward(self, input: Tensor) -> Tensor:
        module: Any = self
        if not fits(module, input):
            layer: Any = super()
            return layer.forward(input)
        window = window_of(module, input)
        return recomputing(lambda x: depthwise(x, module.weight, window), input)


def fits(conv: Any, x: Tensor) -> bool:
    return (
        (conv.training or is_frozen(conv, x))
        and x.ndim == 4
        and x.shape[1] == conv.in_channels
        and computed_in(x.dtype) == conv.weight.dtype
        and takes(x)
    )


def is_pointwise(conv: nn.Conv2d) -> bool:
    one = all(set(v) == {1} for v in (conv.kernel_size, conv.stride))
    return one and conv.groups == 1 and not isinstance(conv.padding, str) and not any(conv.padding)


def is_known_depthwise(conv: nn.Conv2d) -> bool:
    square = all(len(set(v)) == 1 for v in (conv.kernel_size, conv.stride, conv.dilation))
    return (
        conv.groups == conv.in_channels == conv.out_channels > 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and square
    )


def window_of(conv: Any, x: Tensor) -> Window:
    kernel, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    import_timm()
    from timm.layers.conv2d_same import Conv2dSame

    if isinstance(conv, Conv2dSame):
        top, bottom = _same(x.shape[-2], kernel, stride, dilation)
        left, right = _same(x.shape[-1], kernel, stride, dilation)
    else:
        (top, left), (bottom, right) = conv.padding, conv.padding
    return Window(kernel, stride, dilation, (top, bottom, left, right))


def _pays_as_product(conv: Any, x: Tensor) -> bool:
    """Wide convolutions of large maps are faster as PyTorch has them (docs/performance.md).

    So are, in bfloat16 without tiles, all but those of the smallest maps.
    """
    pixels = x.numel() // x.shape[1]
    if x.dtype == torch.bfloat16:
        return pixels <= 512 or has_tiles()
    return max(conv.in_channels, conv.out_channels) <= 128 or pixels <= 4096


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's padding: as much as ceil(size / stride) outputs need, the odd one behind."""
    needed = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return needed // 2, needed - needed // 2
