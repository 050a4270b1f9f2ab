"""From a part's representation to heatmaps, and from raw outputs to scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posefabric.space.architecture import Head


class PartHead(nn.Module):
    """ReLU and a 1x1 convolution: (B, width, h, w) to (B, K_p, h, w) raw outputs.

    With the vector head a pixel holds ``dim`` values a keypoint and the raw output is their
    squared length; under mean squared error it is squashed to |v|^2 / (1 + |v|^2)
    (PAPER section 2), under cross-entropy it stays a logit.
    """

    def __init__(self, width: int, num_keypoints: int, head: Head) -> None:
        super().__init__()
        self.head = head
        self.num_keypoints = num_keypoints
        dim = head.dim if head.kind == "vector" else 1
        # A squared length has no gradient at 0, so vectors start away from it.
        spread = 0.05 if head.kind == "vector" else 0.001
        self.final_layer = nn.Sequential(nn.ReLU(), nn.Conv2d(width, num_keypoints * dim, 1))
        nn.init.normal_(self.final_layer[1].weight, std=spread)  # type: ignore[arg-type]
        nn.init.zeros_(self.final_layer[1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.head.kind == "heatmap":
            return _single(self.final_layer(x))
        relu, convolution = self.final_layer
        x = _single_convolution(convolution, relu(x))
        batch, _, height, width = x.shape
        length = x.view(batch, self.num_keypoints, -1, height, width).square().sum(2)
        return length if self.head.scores == "softmax" else length / (1 + length)


class VolumeHead(nn.Module):
    """The released code's "3D" vector head: (B, width, h, w) to (B, K_p, h, w) raw outputs.

    A 1x1 convolution to width x dim channels and ReLU, seen as (width, dim, h, w); a 1x1x1
    convolution to K_p, so that all slices share it; then the squared length over dim as in
    :class:`PartHead`.
    """

    def __init__(self, width: int, num_keypoints: int, head: Head) -> None:
        super().__init__()
        self.head = head
        self.final_layer = nn.Sequential(nn.Conv2d(width, width * head.dim, 1), nn.ReLU())
        # 1x1x1 over (dim, h, w) is 1x1 over (dim h, w); memory formats know four axes.
        self.final_layer_3d = nn.Conv2d(width, num_keypoints, 1)
        nn.init.normal_(self.final_layer_3d.weight, std=0.05)
        assert self.final_layer_3d.bias is not None
        nn.init.zeros_(self.final_layer_3d.bias)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.head.dim
        convolution, relu = self.final_layer
        volume = relu(_single_convolution(convolution, x))
        volume = volume.unflatten(1, (-1, dim)).flatten(2, 3)
        vectors = _single_convolution(self.final_layer_3d, volume).unflatten(2, (dim, -1))
        length = vectors.square().sum(2)
        return length if self.head.scores == "softmax" else length / (1 + length)


def build_head(width: int, num_keypoints: int, head: Head) -> nn.Module:
    """The head of one part: (B, width, h, w) to (B, K_p, h, w) raw outputs."""
    kind = VolumeHead if head.kind == "vector3d" else PartHead
    return kind(width, num_keypoints, head)


def _single(x: Tensor) -> Tensor:
    """Logits and squares leave half precision: their differences are what counts."""
    return x if x.dtype == torch.float64 else x.float()


def _single_convolution(convolution: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution outside half precision: what leaves its range has no squared length."""
    weight: Tensor = convolution.weight  # type: ignore[assignment]
    with torch.autocast(x.device.type, enabled=False):
        return _single(convolution(x.to(weight.dtype)))


def score_maps(outputs: Tensor, head: Head) -> Tensor:
    """Raw outputs (B, K, h, w) to scores: probability over the target's peak, or as they are.

    Not clipped at 1, because the flip test averages probabilities; the decoder clips.
    """
    if head.scores == "identity":
        return outputs
    probabilities = outputs.flatten(2).softmax(dim=2).view_as(outputs)
    return probabilities / head.peak
