"""The released fabric a second way: from its tensors' names with plain functions, no modules.

Written from ../shared/reference/README.md and PAPER.md alone; it shares nothing with posefabric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]
Spec = Mapping[str, Any]


def cells_in(spec: Spec, layer: int) -> int:
    return min(layer + 2, 4, spec["cell_config"]["depth"] - layer)


def one_shot(spec: Spec) -> bool:
    return bool(spec["cell_config"]["one-shot-search"])


# Names and shapes of a state.


def norm_shapes(name: str, width: int, *, affine: bool = True) -> Shapes:
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{kind}": (width,) for kind in kinds[0 if affine else 2 :]}


def biased_conv(name: str, *size: int) -> Shapes:
    return {f"{name}.weight": size, f"{name}.bias": size[:1]}


def operation_shapes(operation: str, name: str, c: int) -> Shapes:
    inner = f"{name}.operation"
    if operation in ("Zero", "skip_connect"):
        return {}
    if operation.endswith(("pool_3x3",)):
        return norm_shapes(f"{name}.1", c, affine=False)
    if operation == "conv_3x3":
        return biased_conv(name, c, c, 3, 3)
    if operation in ("Basic_Conv_3x3", "Bottle_Conv_3x3"):
        places = (0, 3) if operation.startswith("Basic") else (0, 2, 4)
        shapes: Shapes = {}
        for place in places:
            shapes[f"{inner}.{place}.weight"] = (c, c, 3, 3)
            shapes |= norm_shapes(f"{inner}.{place + 1}", c)
        return shapes
    k = int(operation[-1])
    shapes = {}
    for place in (0, 4) if operation.startswith("Sep") else (0,):
        shapes[f"{inner}.{place}.weight"] = (c, 1, k, k)
        shapes[f"{inner}.{place + 1}.weight"] = (c, c, 1, 1)
        shapes |= norm_shapes(f"{inner}.{place + 2}", c, affine=False)
    return shapes


def source_scales(spec: Spec, layer: int, scale: int) -> list[int]:
    """The scales that same, finer and coarser come from, copies included."""
    before = cells_in(spec, layer - 1)
    same = scale if scale < before else scale - 1
    return [same, scale - 1 if scale else same, scale + 1 if scale + 1 < before else same]


def fabric_shapes(spec: Spec, channels: Sequence[int]) -> Shapes:
    """Every tensor beside the backbone's, for backbone levels of ``channels``."""
    config = spec["cell_config"]
    widths = [size * config["factor"] for size in config["size_types"]]
    hidden, inputs = config["hidden_states_num"], config["input_nodes_num"]
    places = [
        (layer, scale)
        for layer in range(config["cut_layers_num"], config["depth"])
        for scale in range(cells_in(spec, layer))
    ]
    rows = sum(inputs + node for node in range(hidden))
    shapes: Shapes = {}
    for index, (part, keypoints) in enumerate(spec["parts"].items()):
        alpha = (rows, len(config["operators"]))
        shapes[f"{part}.alphas"] = alpha if one_shot(spec) else (len(places), *alpha)
        shapes[f"{part}.betas"] = (len(places), 3)
        shapes[f"{part}.stem.0.weight"] = (64, 3, 3, 3)
        shapes |= norm_shapes(f"{part}.stem.1", 64)
        for layer, scale in places:
            cell, c = f"{part}.cell_{layer}_{scale}", widths[scale]
            for edge in range(hidden * (hidden + 1) // 2):
                for place, operation in enumerate(config["operators"]):
                    name = f"{cell}.cell_arch.{edge}.ops.{place}"
                    shapes |= operation_shapes(operation, name, c)
            for slot, source in enumerate(source_scales(spec, layer, scale)):
                name = f"{cell}.propress_list.{slot}"
                if source == scale - 1:
                    shapes |= biased_conv(f"{name}.operation.0", c, widths[source], 3, 3)
                    shapes |= norm_shapes(f"{name}.operation.1", c)
                elif source == scale + 1:
                    shapes |= biased_conv(f"{name}.conv_1x1", c, widths[source], 1, 1)
                    shapes |= norm_shapes(f"{name}.bn", c)
            shapes |= biased_conv(f"{cell}.channel_keep", c, c * hidden, 1, 1)
        dim = config["vector_dim"]
        if config["vector_in_pixel"] and config["convolution_mode"] == "3D":
            shapes |= biased_conv(f"{part}.final_layer.0", widths[0] * dim, widths[0], 1, 1)
            shapes |= biased_conv(f"{part}.final_layer_3d", len(keypoints), widths[0], 1, 1, 1)
        else:
            count = len(keypoints) * (dim if config["vector_in_pixel"] else 1)
            shapes |= biased_conv(f"{part}.final_layer.1", count, widths[0], 1, 1)
        if channels[0] != widths[0]:
            for scale, width in enumerate(channels):
                shapes |= biased_conv(f"reduce.{index}.{scale}", widths[scale], width, 1, 1)
    return shapes


# Values.


class Reader:
    """Applies a state's tensors by name."""

    def __init__(self, state: Mapping[str, Tensor], training: bool) -> None:
        self.state = state
        self.training = training

    def conv(self, x: Tensor, name: str, **options: int) -> Tensor:
        bias = self.state.get(f"{name}.bias")
        return functional.conv2d(x, self.state[f"{name}.weight"], bias, **options)

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean = self.state[f"{name}.running_mean"]
            variance = self.state[f"{name}.running_var"]
        x = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
        if f"{name}.weight" in self.state:
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            x = x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        return x

    def operation(self, x: Tensor, operation: str, name: str) -> Tensor:
        if operation == "Zero":
            return 0 * x
        if operation == "skip_connect":
            return x
        if operation == "conv_3x3":
            return self.conv(x, name, padding=1)
        if operation == "max_pool_3x3":
            return self.norm(functional.max_pool2d(x, 3, 1, 1), f"{name}.1")
        if operation == "avg_pool_3x3":
            total = functional.avg_pool2d(x, 3, 1, 1)
            counted = functional.avg_pool2d(torch.ones_like(x), 3, 1, 1)
            return self.norm(total / counted, f"{name}.1")
        return self._layers(x, operation, f"{name}.operation")

    def _layers(self, x: Tensor, operation: str, name: str) -> Tensor:
        if operation == "Basic_Conv_3x3":
            x = self.norm(self.conv(x, f"{name}.0", padding=1), f"{name}.1").clamp(min=0)
            return self.norm(self.conv(x, f"{name}.3", padding=1), f"{name}.4")
        if operation == "Bottle_Conv_3x3":
            for place in (0, 2, 4):
                x = self.norm(self.conv(x, f"{name}.{place}", padding=1), f"{name}.{place + 1}")
            return x.clamp(min=0)
        half = int(operation[-1]) // 2
        if operation.startswith("Atr"):
            depthwise = dict(padding=2 * half, dilation=2, groups=x.shape[1])
            places = (0,)
        else:
            depthwise = dict(padding=half, groups=x.shape[1])
            places = (0, 4)
        for place in places:
            x = self.conv(x, f"{name}.{place}", **depthwise)
            x = self.conv(x, f"{name}.{place + 1}")
            x = self.norm(x, f"{name}.{place + 2}").clamp(min=0)
        return x

    def source(self, x: Tensor, name: str, width: int) -> Tensor:
        if x.shape[1] == width:
            return x
        if x.shape[1] < width:
            x = self.conv(x, f"{name}.operation.0", stride=2, padding=1)
            return self.norm(x, f"{name}.operation.1")
        x = self.norm(self.conv(x, f"{name}.conv_1x1"), f"{name}.bn")
        return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    def cell(
        self, sources: list[Tensor], name: str, spec: Spec, alpha: Tensor, beta: Tensor
    ) -> Tensor:
        operators, hidden = spec["cell_config"]["operators"], [torch.empty(0)]
        width = len(self.state[f"{name}.channel_keep.bias"])
        brought = [
            self.source(x, f"{name}.propress_list.{slot}", width) for slot, x in enumerate(sources)
        ]
        shares = torch.exp(beta) / torch.exp(beta).sum()
        hidden[0] = (3 * sum(share * x for share, x in zip(shares, brought, strict=True))).clamp(0)
        edges: Iterator[int] = iter(range(len(alpha)))
        for _ in range(spec["cell_config"]["hidden_states_num"]):
            total = torch.zeros_like(hidden[0])
            for x in list(hidden):
                edge = next(edges)
                mix = torch.exp(alpha[edge]) / torch.exp(alpha[edge]).sum()
                for place, operation in enumerate(operators):
                    value = self.operation(x, operation, f"{name}.cell_arch.{edge}.ops.{place}")
                    total = total + len(operators) * mix[place] * value
            hidden.append(total)
        return self.conv(torch.cat(hidden[1:], 1), f"{name}.channel_keep")

    def head(self, x: Tensor, part: str, spec: Spec) -> Tensor:
        config = spec["cell_config"]
        if not config["vector_in_pixel"]:
            return self.conv(x.clamp(min=0), f"{part}.final_layer.1")
        dim, (batch, width, height, columns) = config["vector_dim"], x.shape
        if config["convolution_mode"] == "3D":
            x = self.conv(x, f"{part}.final_layer.0").clamp(min=0)
            volume = x.reshape(batch, width, dim, height, columns)
            weight = self.state[f"{part}.final_layer_3d.weight"].flatten(1)
            vectors = torch.einsum("kc,bcdhw->bkdhw", weight, volume)
            vectors = vectors + self.state[f"{part}.final_layer_3d.bias"].view(-1, 1, 1, 1)
        else:
            x = self.conv(x.clamp(min=0), f"{part}.final_layer.1")
            vectors = x.reshape(batch, -1, dim, height, columns)
        squared = (vectors**2).sum(2)
        return squared / (1 + squared)


def fabric_by_hand(
    spec: Spec, state: Mapping[str, Tensor], pyramid: Sequence[Tensor], *, training: bool
) -> Tensor:
    """Pyramid levels, finest first, to heatmaps (B, K, h, w)."""
    reader, config = Reader(state, training), spec["cell_config"]
    count = {"coco": 17, "mpii": 16}[spec["dataset"]]
    batch, _, height, width = pyramid[0].shape
    heatmaps = pyramid[0].new_zeros(batch, count, height, width)
    for index, (part, keypoints) in enumerate(spec["parts"].items()):
        alphas, betas = state[f"{part}.alphas"], state[f"{part}.betas"]
        previous = []
        for scale, x in enumerate(pyramid):
            name = f"reduce.{index}.{scale}"
            previous.append(reader.conv(x, name) if f"{name}.weight" in state else x)
        row = 0
        for layer in range(config["cut_layers_num"], config["depth"]):
            current = []
            for scale in range(cells_in(spec, layer)):
                sources = [previous[s] for s in source_scales(spec, layer, scale)]
                name = f"{part}.cell_{layer}_{scale}"
                alpha = alphas if one_shot(spec) else alphas[row]
                current.append(reader.cell(sources, name, spec, alpha, betas[row]))
                row += 1
            previous = current
        maps = reader.head(previous[0], part, spec)
        for place, keypoint in enumerate(keypoints):
            heatmaps[:, keypoint] = heatmaps[:, keypoint] + maps[:, place]
    return heatmaps
