"""Decoding of score maps in numpy: what data.codec does with torch, where torch is not wanted."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from posefabric.data.conventions import Conventions, Preset, choose_conventions

# The same numbers as in data.codec, which cannot be imported without torch.
_FILTER_CUT = 4.0
_DARK_REACH = 5
_DARK_SIGMA = 2.0
_UDP_RANGE = (1e-3, 50.0)


@dataclass(frozen=True)
class NumpyCodec:
    """Decodes score maps (B, K, h, w) of the presets hrnet, udp and posenfs (CONVENTIONS).

    Attributes:
        preset: hrnet, udp or posenfs.
        stride: input pixels a heatmap pixel, along x and y.
        conventions: how to decode and to shift in the flip test; none: as the preset.
    """

    preset: Preset
    stride: tuple[float, float]
    conventions: Conventions | None = None

    @property
    def rules(self) -> Conventions:
        """The conventions given, or the preset's."""
        return self.conventions or choose_conventions(self.preset)

    def decode(self, heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keypoints (B, K, 2) in input pixels and scores (B, K), the maxima, both float32."""
        rules = self.rules
        maps = np.asarray(heatmaps, dtype=np.float32)
        rows, columns = maps.shape[2:]
        flat = maps.reshape(*maps.shape[:2], -1)
        index = flat.argmax(axis=-1)
        scores = np.take_along_axis(flat, index[..., None], axis=-1)[..., 0]
        if rules.smooth:
            maps = _blurred(maps, int(_FILTER_CUT * rules.smooth + 0.5), rules.smooth)
            index = maps.reshape(*maps.shape[:2], -1).argmax(axis=-1)
        y, x = np.divmod(index, columns)
        interior = (x > 0) & (x < columns - 1) & (y > 0) & (y < rows - 1)
        anchor_x, anchor_y = np.clip(x, 1, columns - 2), np.clip(y, 1, rows - 2)
        if rules.decode == "udp-dark":
            logs = np.log(
                np.clip(
                    _blurred(maps, _DARK_REACH, _DARK_SIGMA, cv2.BORDER_REFLECT_101), *_UDP_RANGE
                ).astype(np.float64)
            )
            logs = np.pad(logs, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
            step = _newton_step(_neighbourhood(logs, x + 1, y + 1))
            interior = np.ones_like(interior)
        elif rules.decode == "dark":
            peak = np.maximum(maps.max(axis=(-2, -1), keepdims=True), np.float32(1e-30))
            around = _neighbourhood(
                _blurred(maps / peak, _DARK_REACH, _DARK_SIGMA), anchor_x, anchor_y
            )
            step = _newton_step(np.log(np.maximum(around.astype(np.float64), 1e-10)))
        else:
            around = _neighbourhood(maps, anchor_x, anchor_y)
            across = around[..., 1, 2] - around[..., 1, 0]
            down = around[..., 2, 1] - around[..., 0, 1]
            step = 0.25 * np.sign(np.stack([across, down], axis=-1))
        cells = np.stack([x, y], axis=-1) + np.where(interior[..., None], step, 0.0)
        keypoints = cells * np.asarray(self.stride)
        keypoints = keypoints + rules.decode_offset
        found = np.where((scores > 0)[..., None], keypoints, rules.missing_coordinate)
        return found.astype(np.float32), scores

    def flip_back(self, heatmaps_of_flipped: np.ndarray, flip_index: np.ndarray) -> np.ndarray:
        """The maps (B, K, h, w) of mirrored inputs in line with the plain ones."""
        maps = heatmaps_of_flipped[:, flip_index, :, ::-1]
        if self.rules.flip_shift:
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


def _blurred(
    maps: np.ndarray, reach: int, sigma: float, border: int = cv2.BORDER_CONSTANT
) -> np.ndarray:
    """Gaussian blur of (B, K, h, w), ``reach`` cells on each side, zeros outside unless said."""
    blurred = np.empty_like(maps)
    for place in np.ndindex(*maps.shape[:2]):
        blurred[place] = cv2.GaussianBlur(
            maps[place],
            (2 * reach + 1, 2 * reach + 1),
            sigma,
            borderType=border,
        )
    return blurred


def _newton_step(log: np.ndarray) -> np.ndarray:
    """One Newton step (B, K, 2) on log-maps about a cell (B, K, 3, 3), as data.codec takes it."""
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
