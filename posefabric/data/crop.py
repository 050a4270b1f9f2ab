"""From a person's box to a network's input: the affine transforms and the uint8 crop."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from posefabric.data.conventions import (
    BOX_PADDING,
    PRESETS,
    Conventions,
    Preset,
    choose_conventions,
)
from posefabric.structures import DataError, PosefabricError

__all__ = [
    "BOX_PADDING",
    "PRESETS",
    "CropGeometry",
    "Preset",
    "compose_affine",
    "crop_person",
    "invert_affine",
    "transform_points",
]


@dataclass(frozen=True)
class CropGeometry:
    """How a box becomes a network's input (CONVENTIONS: box to crop, warp).

    The box is widened to the input's aspect ratio and by 1.25, about its centre, and that
    region is mapped to the input: ``hrnet`` and ``posenfs`` let it span W x H pixels about
    (W/2, H/2), ``udp`` W - 1 x H - 1 about ((W - 1)/2, (H - 1)/2).

    Attributes:
        input_wh: the network's input in pixels.
        preset: hrnet, udp or posenfs.
        margin: the crop covers this many times the input's sides, at the same resolution, so
            that augmentation on the device can rotate and shrink; 1 in evaluation, where the
            crop is the input. Crop and input are a whole number of pixels apart.
        conventions: its warp and box_padding are used; none: the preset's.
    """

    input_wh: tuple[int, int]
    preset: Preset
    margin: float = 1.0
    conventions: Conventions | None = None

    def __post_init__(self) -> None:
        choose_conventions(self.preset)
        if min(self.input_wh) < 2:
            raise PosefabricError(
                f"input_wh: expected sides of 2 pixels or more, got {self.input_wh}"
            )
        if not 1.0 <= self.margin <= 8.0:
            raise PosefabricError(f"margin: expected a factor from 1 to 8, got {self.margin}")

    @property
    def rules(self) -> Conventions:
        """The conventions given, or the preset's."""
        return self.conventions or choose_conventions(self.preset)

    @property
    def border_wh(self) -> tuple[int, int]:
        """Pixels the crop has more than the input on each of its sides."""
        width, height = self.input_wh
        extra = (self.margin - 1.0) / 2.0
        return int(width * extra + 0.5), int(height * extra + 0.5)

    @property
    def crop_wh(self) -> tuple[int, int]:
        """Width and height of the crop in pixels."""
        border_x, border_y = self.border_wh
        return self.input_wh[0] + 2 * border_x, self.input_wh[1] + 2 * border_y

    @property
    def input_centre(self) -> np.ndarray:
        """(2,) float64: the input pixel on which the box's centre falls."""
        span = np.asarray(self.input_wh, dtype=np.float64)
        return (span - 1.0) / 2.0 if self.rules.warp == "unbiased" else span / 2.0

    @property
    def crop_to_input(self) -> np.ndarray:
        """(2, 3) float32: crop pixels to input pixels without augmentation, a whole shift."""
        border_x, border_y = self.border_wh
        return np.array([[1, 0, -border_x], [0, 1, -border_y]], dtype=np.float32)

    def region(self, box_xywh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centre (2,) and size (2,) in image pixels of the region that becomes the input.

        Raises DataError for a box that is not finite or has no area.
        """
        box = np.asarray(box_xywh, dtype=np.float64)
        if box.shape != (4,) or not np.isfinite(box).all() or box[2] <= 0 or box[3] <= 0:
            raise DataError(
                f"box {np.round(box, 2).tolist()}: expected four finite numbers x, y, width, "
                "height with positive sides; correct or remove this annotation"
            )
        aspect = self.input_wh[0] / self.input_wh[1]
        width = max(box[2], box[3] * aspect) * self.rules.box_padding
        return box[:2] + box[2:] / 2.0, np.array([width, width / aspect])

    def image_to_input(self, box_xywh: np.ndarray) -> np.ndarray:
        """(2, 3) float32: image pixels to input pixels, for a box (4,) in image pixels."""
        return self._about_box(box_xywh, self.input_centre).astype(np.float32)

    def image_to_crop(self, box_xywh: np.ndarray) -> np.ndarray:
        """(2, 3) float32: image pixels to crop pixels, for a box (4,) in image pixels."""
        return self._about_box(box_xywh, self.input_centre + self.border_wh).astype(np.float32)

    def _about_box(self, box_xywh: np.ndarray, target: np.ndarray) -> np.ndarray:
        centre, size = self.region(box_xywh)
        span = np.asarray(self.input_wh, dtype=np.float64) - (self.rules.warp == "unbiased")
        scale = span / size
        offset = target - scale * centre
        return np.array([[scale[0], 0.0, offset[0]], [0.0, scale[1], offset[1]]])


def crop_person(
    image: np.ndarray, box_xywh: np.ndarray, geometry: CropGeometry
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one person out of a picture, by linear interpolation on a black ground.

    Takes image (H, W, 3) uint8 and box (4,) in its pixels. Returns the crop (Hc, Wc, 3) uint8
    and image_to_crop (2, 3) float32. Raises DataError for a picture or box of another kind.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(
            f"picture of shape {image.shape} and type {image.dtype}: expected (H, W, 3) uint8 RGB"
        )
    matrix = geometry.image_to_crop(box_xywh)
    crop = cv2.warpAffine(
        image,
        matrix,
        geometry.crop_wh,
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(0, 0, 0),
    )
    return np.asarray(crop, dtype=np.uint8), matrix


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply affine transforms (..., 2, 3) to points (..., N, 2); leading axes broadcast."""
    linear, offset = matrix[..., :, :2], matrix[..., :, 2]
    return points @ np.swapaxes(linear, -1, -2) + offset[..., None, :]


def invert_affine(matrix: np.ndarray) -> np.ndarray:
    """The inverse (..., 2, 3) of affine transforms (..., 2, 3), in the same type."""
    inverse = np.linalg.inv(matrix[..., :, :2].astype(np.float64))
    offset = -inverse @ matrix[..., :, 2:].astype(np.float64)
    return np.concatenate([inverse, offset], axis=-1).astype(matrix.dtype)


def compose_affine(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The transform (..., 2, 3) that applies ``first``, then ``second``, both (..., 2, 3)."""
    composed = second[..., :, :2].astype(np.float64) @ first.astype(np.float64)
    composed[..., :, 2] += second[..., :, 2]
    return composed.astype(first.dtype)
