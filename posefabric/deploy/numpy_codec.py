"""Decoding of score maps in numpy: what data.codec does with torch, where torch is not wanted."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from posefabric.data.crop import Preset

# The same numbers as in data.codec, which cannot be imported without torch.
_POSENFS_SHIFT = 0.5
_DARK_KERNEL = 11
_DARK_SIGMA = 2.0


@dataclass(frozen=True)
class NumpyCodec:
    """Decodes score maps (B, K, h, w) of the presets hrnet, udp and posenfs (CONVENTIONS).

    Attributes:
        preset: hrnet, udp or posenfs.
        stride: input pixels a heatmap pixel, along x and y.
    """

    preset: Preset
    stride: tuple[float, float]

    def decode(self, heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keypoints (B, K, 2) in input pixels and scores (B, K), the maxima, both float32."""
        maps = np.asarray(heatmaps, dtype=np.float32)
        rows, columns = maps.shape[2:]
        flat = maps.reshape(*maps.shape[:2], -1)
        index = flat.argmax(axis=-1)
        scores = np.take_along_axis(flat, index[..., None], axis=-1)[..., 0]
        y, x = np.divmod(index, columns)
        interior = (x > 0) & (x < columns - 1) & (y > 0) & (y < rows - 1)
        anchor_x, anchor_y = np.clip(x, 1, columns - 2), np.clip(y, 1, rows - 2)
        if self.preset == "udp":
            step = _dark_step(maps, anchor_x, anchor_y)
        else:
            around = _neighbourhood(maps, anchor_x, anchor_y)
            across = around[..., 1, 2] - around[..., 1, 0]
            down = around[..., 2, 1] - around[..., 0, 1]
            step = 0.25 * np.sign(np.stack([across, down], axis=-1))
        cells = np.stack([x, y], axis=-1) + np.where(interior[..., None], step, 0.0)
        keypoints = cells * np.asarray(self.stride)
        if self.preset == "posenfs":
            keypoints = keypoints + _POSENFS_SHIFT
        missing = -1.0 if self.preset == "udp" else 0.0
        found = np.where((scores > 0)[..., None], keypoints, missing)
        return found.astype(np.float32), scores

    def flip_back(self, heatmaps_of_flipped: np.ndarray, flip_index: np.ndarray) -> np.ndarray:
        """The maps (B, K, h, w) of mirrored inputs in line with the plain ones."""
        maps = heatmaps_of_flipped[:, flip_index, :, ::-1]
        if self.preset == "hrnet":
            maps = np.concatenate([maps[..., :1], maps[..., :-1]], axis=-1)
        return maps


def _neighbourhood(maps: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(B, K, 3, 3) values, rows first, about the cells x, y (B, K)."""
    batch, count = np.ogrid[: maps.shape[0], : maps.shape[1]]
    offset = np.arange(-1, 2)
    return maps[
        batch[..., None, None],
        count[..., None, None],
        y[..., None, None] + offset[:, None],
        x[..., None, None] + offset,
    ]


def _dark_step(maps: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One Newton step (B, K, 2) on the blurred log-map, as in DARK (Zhang et al., CVPR 2020)."""
    peak = np.maximum(maps.max(axis=(-2, -1), keepdims=True), np.float32(1e-30))
    scaled = maps / peak
    blurred = np.empty_like(scaled)
    for place in np.ndindex(*maps.shape[:2]):
        blurred[place] = cv2.GaussianBlur(
            scaled[place],
            (_DARK_KERNEL, _DARK_KERNEL),
            _DARK_SIGMA,
            borderType=cv2.BORDER_CONSTANT,
        )
    around = _neighbourhood(blurred, x, y).astype(np.float64)
    log = np.log(np.maximum(around, 1e-10))
    middle = log[..., 1, 1]
    dx = (log[..., 1, 2] - log[..., 1, 0]) / 2
    dy = (log[..., 2, 1] - log[..., 0, 1]) / 2
    dxx = log[..., 1, 2] - 2 * middle + log[..., 1, 0]
    dyy = log[..., 2, 1] - 2 * middle + log[..., 0, 1]
    dxy = (log[..., 2, 2] + log[..., 0, 0] - log[..., 2, 0] - log[..., 0, 2]) / 4
    determinant = dxx * dyy - dxy * dxy
    sound = (dxx < 0) & (determinant > 1e-9)
    safe = np.where(sound, determinant, 1.0)
    step = np.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], axis=-1) / safe[..., None]
    return np.where(sound[..., None], np.clip(step, -1.0, 1.0), 0.0)
