"""Pictures and boxes in, poses in picture pixels out: what every predictor shares (no torch)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np

from posefabric.data.crop import CropGeometry, crop_person, invert_affine, transform_points
from posefabric.data.image import read_image
from posefabric.structures import DataError

Picture: TypeAlias = "np.ndarray | str | os.PathLike[str]"
Pictures: TypeAlias = "Picture | Sequence[Picture]"
Boxes: TypeAlias = "np.ndarray | Sequence[np.ndarray | Sequence[Sequence[float]] | None] | None"
Infer: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class PosePrediction:
    """The N persons of one picture.

    Attributes:
        keypoints: (N, K, 2) float32, picture pixels.
        scores: (N, K) float32 in 0..1.
        boxes: (N, 4) float32 xywh in picture pixels, in the order they were asked for.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)


def predict_persons(
    images: Pictures,
    boxes: Boxes,
    *,
    geometry: CropGeometry,
    num_keypoints: int,
    batch_size: int,
    infer: Infer,
) -> list[PosePrediction]:
    """One PosePrediction a picture, in order; persons are batched over the pictures.

    Args:
        images: (H, W, 3) uint8 RGB, a path, or a sequence of those; none at all gives [].
        boxes: per picture (N, 4) xywh in its pixels, N may be 0, or None: the whole picture is
            one box. For a single picture the (N, 4) array itself will do.
        geometry: its crop must be the input (margin 1).
        infer: crops (B, H, W, 3) uint8 to keypoints (B, K, 2) in input pixels and scores (B, K).

    Raises DataError that names the picture, and the box, that cannot be used.
    """
    pictures = _list_of_pictures(images)
    asked = _list_of_boxes(boxes, len(pictures), single=_is_one(images))
    results: list[PosePrediction] = []
    crops: list[np.ndarray] = []
    to_crop: list[np.ndarray] = []
    slots: list[tuple[int, int]] = []

    def flush() -> None:
        points, scores = infer(np.stack(crops))
        points = transform_points(invert_affine(np.stack(to_crop)), points)
        for row, (image, person) in enumerate(slots):
            results[image].keypoints[person] = points[row]
            results[image].scores[person] = np.clip(scores[row], 0.0, 1.0)
        crops.clear()
        to_crop.clear()
        slots.clear()

    for number, (label, picture) in enumerate(_opened(pictures)):
        own = _checked_boxes(asked[number], picture, label)
        count = len(own)
        results.append(
            PosePrediction(
                keypoints=np.zeros((count, num_keypoints, 2), dtype=np.float32),
                scores=np.zeros((count, num_keypoints), dtype=np.float32),
                boxes=own,
            )
        )
        for person, box in enumerate(own):
            try:
                crop, matrix = crop_person(picture, box, geometry)
            except (DataError, cv2.error) as error:
                raise DataError(f"{label}, box {person}: {error}") from error
            crops.append(crop)
            to_crop.append(matrix)
            slots.append((number, person))
            if len(crops) == batch_size:
                flush()
    if crops:
        flush()
    return results


def _is_one(images: Any) -> bool:
    if isinstance(images, str | os.PathLike):
        return True
    return isinstance(images, np.ndarray) and images.ndim != 4


def _list_of_pictures(images: Any) -> list[Any]:
    if _is_one(images):
        return [images]
    if not isinstance(images, np.ndarray | Sequence):
        raise DataError(
            f"images: expected (H, W, 3) uint8 RGB, a path, or a list of those, got "
            f"{type(images).__name__}"
        )
    return list(images)


def _list_of_boxes(boxes: Any, count: int, *, single: bool) -> list[Any]:
    if boxes is None:
        return [None] * count
    # A (1, N, 4) array is a list of one picture's boxes already.
    if single and not _is_list_of_one(boxes):
        return [boxes]
    if isinstance(boxes, np.ndarray) and boxes.ndim == 2 and count != 1:
        raise DataError(
            f"boxes: an array of shape {boxes.shape} for {count} pictures; expected a list of "
            f"{count}, each an (N, 4) array of x, y, width, height, or None"
        )
    if isinstance(boxes, np.ndarray) and boxes.ndim == 2:
        return [boxes]
    if not isinstance(boxes, np.ndarray | Sequence) or len(boxes) != count:
        came = len(boxes) if isinstance(boxes, np.ndarray | Sequence) else type(boxes).__name__
        raise DataError(
            f"boxes: expected one entry a picture ({count}), each an (N, 4) array of x, y, width, "
            f"height, or None for the whole picture; got {came}"
        )
    return list(boxes)


def _is_list_of_one(boxes: Any) -> bool:
    if isinstance(boxes, np.ndarray):
        return boxes.ndim == 3
    if not isinstance(boxes, Sequence) or len(boxes) != 1:
        return False
    return boxes[0] is None or np.ndim(boxes[0]) == 2 or np.size(boxes[0]) == 0


def _opened(pictures: list[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(label for errors, pixels); files are read when their turn comes."""
    for number, picture in enumerate(pictures):
        if isinstance(picture, str | os.PathLike):
            yield f"picture {number} ({os.fspath(picture)})", read_image(picture)
        else:
            yield f"picture {number}", _checked_picture(picture, number)


def _checked_picture(picture: Any, number: int) -> np.ndarray:
    where = f"picture {number}: expected (H, W, 3) uint8 RGB"
    if not isinstance(picture, np.ndarray):
        raise DataError(f"{where} or a path, got {type(picture).__name__}")
    if picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 1):
        raise DataError(
            f"{where}, got a grey picture {picture.shape}; repeat it to three channels "
            "(cv2.cvtColor with cv2.COLOR_GRAY2RGB)"
        )
    if picture.ndim == 3 and picture.shape[2] == 4:
        raise DataError(f"{where}, got four channels {picture.shape}; drop alpha: image[..., :3]")
    if picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise DataError(f"{where}, got shape {picture.shape}")
    if picture.dtype != np.uint8:
        raise DataError(
            f"{where}, got {picture.dtype}; bring the values to 0..255 and use .astype(numpy.uint8)"
        )
    return picture


def _checked_boxes(boxes: Any, picture: np.ndarray, label: str) -> np.ndarray:
    """(N, 4) float32 of its own, for one picture."""
    if boxes is None:
        height, width = picture.shape[:2]
        return np.array([[0, 0, width, height]], dtype=np.float32)
    try:
        found = np.array(boxes, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{label}: boxes must be (N, 4) numbers x, y, width, height") from error
    if found.size == 0:
        return np.zeros((0, 4), dtype=np.float32)
    if found.ndim != 2 or found.shape[1] != 4:
        raise DataError(
            f"{label}: boxes of shape {found.shape}, expected (N, 4): x, y, width, height in pixels"
        )
    return found
