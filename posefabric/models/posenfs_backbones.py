"""The three backbones of the released PoseNFS checkpoints, under the names of their states.

Not timm's: there the levels, or the names of the tensors, are others. `model.backbone` takes
them as `posenfs_resnet50`, `posenfs_mobilenet_v2` and `hrnet_w32_stage3`. Each network gives its
first ``levels`` of the strides 4, 8, 16, 32, finest first, and tells their ``channels``. What
of a checkpoint it does not use begins with one of ``unused``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.nn import functional

from posefabric.space.operations import keep_depthwise_exact
from posefabric.structures import PosefabricError

RESNET_PLANES = (64, 128, 256, 512)
RESNET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
RESNET_50_BLOCKS = RESNET_BLOCKS[50]
# Expansion, channels, blocks and stride of each group of blocks (Sandler et al., 2018).
MOBILENET_GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
)
MOBILENET_LEVELS = (3, 6, 13, 16)
HRNET_WIDTHS = (32, 64, 128, 256)


class PosenfsBackbone(nn.Module):
    """Images (B, 3, H, W) to a list of (B, channels[s], H/4/2**s, W/4/2**s)."""

    channels: tuple[int, ...]
    unused: tuple[str, ...]
    # The layers up to stride 4, where these are not all that the first level depends on.
    stem: tuple[str, ...] = ()


def _conv(width_in: int, width_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=False)


def _conv_norm(
    width_in: int, width_out: int, kernel: int, stride: int = 1, *, relu: bool = False
) -> nn.Sequential:
    layers: list[nn.Module] = [
        _conv(width_in, width_out, kernel, stride),
        nn.BatchNorm2d(width_out),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the planes, and the residual."""

    def __init__(self, width_in: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        width_out = 4 * planes
        self.conv1 = _conv(width_in, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, width_out, 1)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width_out:
            self.downsample = _conv_norm(width_in, width_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return functional.relu(self.bn3(self.conv3(x)) + residual)


def _bottlenecks(width_in: int, planes: int, count: int, stride: int = 1) -> nn.Sequential:
    rest = [Bottleneck(4 * planes, planes) for _ in range(count - 1)]
    return nn.Sequential(Bottleneck(width_in, planes, stride), *rest)


class ResNet(PosenfsBackbone):
    """A ResNet of bottlenecks, ``blocks`` to a stage."""

    def __init__(self, *, levels: int, blocks: Sequence[int] = RESNET_50_BLOCKS) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        width = 64
        self._stages: list[str] = []
        for level in range(levels):
            planes = RESNET_PLANES[level]
            stage = _bottlenecks(width, planes, blocks[level], stride=1 if level == 0 else 2)
            self._stages.append(f"layer{level + 1}")
            self.add_module(self._stages[-1], stage)
            width = 4 * planes
        self.channels = tuple(4 * planes for planes in RESNET_PLANES[:levels])
        self.unused = ("fc.", *(f"layer{level + 1}." for level in range(levels, 4)))

    def entry(self, images: Tensor) -> Tensor:
        """To stride 4, before the bottlenecks."""
        x = functional.relu(self.bn1(self.conv1(images)))
        return functional.max_pool2d(x, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.entry(images)
        pyramid = []
        for stage in self._stages:
            x = self.get_submodule(stage)(x)
            pyramid.append(x)
        return pyramid


class InvertedResidual(nn.Module):
    """1x1 to the expanded width (unless that is the same), depthwise 3x3, 1x1 without ReLU."""

    def __init__(self, width_in: int, width_out: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width_in * expansion
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        expand: list[nn.Module] = []
        if expansion != 1:
            expand = [_conv(width_in, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6()]
        self.conv = nn.Sequential(
            *expand,
            depthwise,
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            _conv(hidden, width_out, 1),
            nn.BatchNorm2d(width_out),
        )
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(PosenfsBackbone):
    """MobileNetV2 of width 1 without its last block, which the released code never runs."""

    def __init__(self, *, levels: int) -> None:
        super().__init__()
        width = 32
        stem = nn.Sequential(_conv(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU6())
        blocks: list[nn.Module] = [stem]
        for expansion, width_out, count, stride in MOBILENET_GROUPS:
            for index in range(count):
                own_stride = stride if index == 0 else 1
                blocks.append(
                    InvertedResidual(width, width_out, stride=own_stride, expansion=expansion)
                )
                width = width_out
        last = MOBILENET_LEVELS[levels - 1]
        self.features = nn.ModuleList(blocks[: last + 1])
        self.channels = (24, 32, 96, 160)[:levels]
        self.unused = (*(f"features.{i}." for i in range(last + 1, 19)), "conv.", "classifier.")
        keep_depthwise_exact(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, pyramid = images, []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in MOBILENET_LEVELS:
                pyramid.append(x)
        return pyramid


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _conv(width, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + x)


class HighResolutionModule(nn.Module):
    """Four blocks at each resolution, then every resolution as a sum over all.

    ``outputs``: give only so many of the finest; none: all.
    """

    def __init__(self, widths: Sequence[int], *, outputs: int | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width) for _ in range(4))) for width in widths
        )
        places = range(len(widths))
        self.fuse_layers = nn.ModuleDict(
            {
                str(to): nn.ModuleDict(
                    {str(start): _fuse(widths, start, to) for start in places if start != to}
                )
                for to in places[:outputs]
            }
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for to, own in enumerate(maps[: len(self.fuse_layers)]):
            layers = self.fuse_layers[str(to)]
            assert isinstance(layers, nn.ModuleDict)
            terms = [own if j == to else layers[str(j)](x) for j, x in enumerate(maps)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            fused.append(functional.relu(total))
        return fused


def _fuse(widths: Sequence[int], start: int, to: int) -> nn.Module:
    """From resolution ``start`` to ``to``: 1x1 and nearest upsampling, or strided 3x3s."""
    if start > to:
        convolution, norm = _conv_norm(widths[start], widths[to], 1)
        return nn.Sequential(convolution, norm, nn.Upsample(scale_factor=2 ** (start - to)))
    steps = []
    for step in range(start + 1, to + 1):
        width_out = widths[to] if step == to else widths[start]
        steps.append(_conv_norm(widths[start], width_out, 3, 2, relu=step != to))
    return nn.Sequential(*steps)


def _next_resolution(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(_conv_norm(width_in, width_out, 3, 2, relu=True))


class HRNet(PosenfsBackbone):
    """HRNet-W32 up to stage 3; the fourth level is what transition 3 makes of the third."""

    stem = ("conv1", "bn1", "conv2", "bn2", "layer1")

    def __init__(self, *, levels: int, widths: Sequence[int] = HRNET_WIDTHS) -> None:
        super().__init__()
        self.conv1 = _conv(3, 64, 3, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = _conv(64, 64, 3, 2)
        self.bn2 = nn.BatchNorm2d(64)
        self.layer1 = _bottlenecks(64, 64, 4)
        self.transition1 = nn.ModuleDict(
            {
                "0": _conv_norm(256, widths[0], 3, relu=True),
                "1": _next_resolution(256, widths[1]),
            }
        )
        self.stage2 = nn.Sequential(HighResolutionModule(widths[:2]))
        self.transition2 = nn.ModuleDict({"2": _next_resolution(widths[1], widths[2])})
        self.stage3 = nn.Sequential(*(HighResolutionModule(widths[:3]) for _ in range(4)))
        self.transition3 = nn.ModuleDict()
        if levels == 4:
            self.transition3["3"] = _next_resolution(widths[2], widths[3])
        self.channels = tuple(widths[:levels])
        self.unused = ("stage4.", "final_layer.", *(() if levels == 4 else ("transition3.",)))

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.pyramid(images)[: len(self.channels)]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """The resolutions after transition 3, or three of them where that is left out."""
        x = functional.relu(self.bn1(self.conv1(images)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        maps = self.stage2([transition(x) for transition in self.transition1.values()])
        maps = self.stage3([*maps, self.transition2["2"](maps[-1])])
        return maps + [transition(maps[-1]) for transition in self.transition3.values()]


def build_posenfs_backbone(name: str, names: Collection[str], *, levels: int) -> PosenfsBackbone:
    """The backbone a released configuration calls ``name``, with ``levels`` of its levels.

    ``names`` are the state's; they tell how many blocks a ResNet has, which "resnet" does not.
    Raises PosefabricError for a backbone other than ResNet, MobileNetV2 and HRNet-W32.
    """
    plain = name.lower().replace("_", "").replace("-", "")
    if plain.startswith("resnet"):
        return ResNet(levels=levels, blocks=_resnet_blocks(names))
    if plain == "mobilenetv2":
        return MobileNetV2(levels=levels)
    if plain in ("hrnet", "hrnetw32"):
        return HRNet(levels=levels)
    raise PosefabricError(
        f"specification: backbone={name!r}: expected resnet, resnet50, mobilenet_v2, hrnet or "
        f"hrnet_w32; other backbones of the released code are not read"
    )


def _resnet_blocks(names: Collection[str]) -> tuple[int, ...]:
    blocks: list[int] = list(RESNET_50_BLOCKS)
    for level in range(4):
        pattern = re.compile(rf"backbone\.layer{level + 1}\.(\d+)\.")
        found = [int(match[1]) for match in map(pattern.match, names) if match]
        if found:
            blocks[level] = max(found) + 1
    return tuple(blocks)
