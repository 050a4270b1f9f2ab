"""An exported file against the network it was made from, on the same crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from posefabric.structures import PosefabricError

BATCHES = (1, 3, 8)
TOLERANCE = 1e-3  # of score maps, relative to the largest score

Run = Callable[[np.ndarray], Sequence[np.ndarray]]  # crops to outputs


def check_crops(crops: np.ndarray | None, input_wh: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Enough crops for every batch size, and where they are from; None: seeded noise.

    Raises PosefabricError for crops of another shape.
    """
    width, height = input_wh
    if crops is None:
        noise = np.random.default_rng(0).integers(0, 256, (max(BATCHES), height, width, 3))
        return noise.astype(np.uint8), f"{max(BATCHES)} crops of seeded noise"
    crops = np.asarray(crops)
    if crops.dtype != np.uint8 or crops.shape[1:] != (height, width, 3) or not len(crops):
        raise PosefabricError(
            f"crops of shape {crops.shape} and type {crops.dtype}: expected (N, {height}, {width}, "
            "3) uint8 RGB, as crop_person cuts them, at least one"
        )
    # The largest batch needs that many; the smallest example two, or torch takes it for fixed.
    repeats = -(-max(BATCHES) // len(crops))
    return np.concatenate([crops] * repeats), f"{len(crops)} crops given"


def resized(crops: np.ndarray, input_wh: tuple[int, int]) -> np.ndarray:
    """Crops (N, H, W, 3) brought to another size, for a network whose input is free."""
    return np.stack([cv2.resize(crop, input_wh, interpolation=cv2.INTER_AREA) for crop in crops])


@torch.no_grad()
def run_torch(module: nn.Module, crops: np.ndarray) -> list[np.ndarray]:
    """The outputs of an ExportedNetwork, in batches."""
    parts = [module(piece) for piece in torch.from_numpy(crops).split(max(BATCHES))]
    return [torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True)]


def differences(
    run: Run, crops: np.ndarray, expected: Sequence[np.ndarray], outputs: Sequence[str]
) -> dict[str, float]:
    """The largest differences between a runtime, in batches of 1, 3 and 8, and torch.

    Args:
        expected: of torch, by run_torch.
        outputs: names of what ``run`` and ``expected`` hold: heatmaps; keypoints, scores.

    Returns largest_score (for scale), score_maps_difference, mean_score_maps_difference (over
    the persons, of each person's largest) and, decoded, keypoints_difference_px,
    scores_difference and keypoints_apart (the share of keypoints more than 1 px apart: flat
    maps have ties).
    """
    worst = dict.fromkeys(outputs, 0.0)
    apart: list[np.ndarray] = []
    means: list[np.ndarray] = []
    for size in BATCHES:
        for start in range(0, len(crops), size):
            found = run(crops[start : start + size])
            for name, ours, theirs in zip(outputs, found, expected, strict=True):
                distance = np.abs(ours - theirs[start : start + size])
                # max() would pass over NaN.
                worst[name] = float(np.maximum(worst[name], distance.max()))
                if name == "keypoints":
                    apart.append((distance.max(axis=-1) > 1.0).ravel())
                if name == "heatmaps":
                    means.append(distance.reshape(len(distance), -1).max(axis=1))
    result = {
        "largest_score": float(np.abs(expected[0]).max()),
        "score_maps_difference": worst["heatmaps"],
        "mean_score_maps_difference": float(np.concatenate(means).mean()),
    }
    if apart:
        result["keypoints_difference_px"] = worst["keypoints"]
        result["scores_difference"] = worst["scores"]
        result["keypoints_apart"] = float(np.concatenate(apart).mean())
    return result


def require_same(found: dict[str, Any], *, what: str) -> None:
    """PosefabricError when score maps differ by more than 1e-3 of the largest score."""
    worst, allowed = found["score_maps_difference"], TOLERANCE * found["largest_score"]
    if not worst <= allowed:
        raise PosefabricError(
            f"{what} and torch {torch.__version__} differ by {worst:.2g} in score maps, expected "
            f"at most {allowed:.2g}; try another opset or other versions"
        )
