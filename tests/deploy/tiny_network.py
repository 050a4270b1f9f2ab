"""A four-keypoint skeleton and a network small enough to export in a moment."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from posefabric.config import Config
from posefabric.data.batch import Normalisation
from posefabric.skeletons import Skeleton

NAMES = ("a", "b", "c", "d")
FOUR = Skeleton(
    name="four",
    keypoints=NAMES,
    flip_pairs=((0, 2),),
    limbs=((0, 1), (1, 2), (2, 3)),
    sigmas=np.array([0.05, 0.06, 0.07, 0.08]),
    sigmas_source="made up",
    groupings={1: {"all": (0, 1, 2, 3)}},
)
FOUR_YAML = "name: four\nkeypoints: [a, b, c, d]\nflip_pairs: [[a, c]]\nlimbs: [[a, b], [b, c]]\n"


class TinyNetwork(nn.Module):
    """Two convolutions to a quarter of the input; peaked score maps whatever the picture."""

    normalisation = Normalisation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.down = nn.Conv2d(3, 8, 8, stride=4, padding=2)
        self.out = nn.Conv2d(8, 4, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        return 6 * self.out(torch.tanh(self.down(images)))

    def score_maps(self, outputs: Tensor) -> Tensor:
        return outputs.flatten(2).softmax(-1).view_as(outputs) / 0.05


def tiny_config(preset: str = "hrnet", input_wh: tuple[int, int] = (64, 96)) -> Config:
    return Config.model_validate({"data": {"preset": preset, "input_wh": input_wh}})


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: smooth noise, whose score maps have peaks unlike white noise's."""
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
