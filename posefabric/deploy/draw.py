"""Poses drawn on pictures, and sheets of pictures (numpy and OpenCV only)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from posefabric.deploy.brush import (
    DARK,
    SHEET,
    WHITE,
    dashes,
    dot,
    keypoint_colours,
    limb_colours,
    rectangle,
    stroke,
    text_strip,
)
from posefabric.deploy.ranking import person_error
from posefabric.structures import DataError, Person, PersonDataset, PosefabricError, Predictions

if TYPE_CHECKING:
    from posefabric.skeletons import Skeleton

_SUPERSAMPLE = 2
_FAINT = 0.4
_OUTSIDE = (70, 72, 80)


def draw_pose(
    image: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray | None,
    skeleton: Skeleton,
    *,
    threshold: float = 0.2,
    box: np.ndarray | None = None,
    style: Literal["solid", "dashed"] = "solid",
    thickness: int | None = None,
) -> np.ndarray:
    """A copy of a picture with one pose on it.

    Args:
        image: (H, W, 3) uint8 RGB, left as it is.
        keypoints: (K, 2) pixels; joints that are not finite are left out.
        scores: (K,) or None (all shown). From ``threshold`` up a joint is solid, from half of it
            up faint, below that left out.
        box: xywh in pixels; drawn thin, and the person's size for the line width.
        style: solid in the colours of the sides, or thin, white and dashed (ground truth).
        thickness: limb width in pixels; None: from the person's size.

    Raises PosefabricError when a shape or the picture's type is not as said.
    """
    keypoints = np.asarray(keypoints, dtype=np.float64)
    count = len(skeleton.keypoints)
    scores = np.ones(count) if scores is None else np.asarray(scores, dtype=np.float64)
    _check(image, keypoints, scores, count)
    finite = np.isfinite(keypoints).all(axis=1) & np.isfinite(scores)
    seen = finite & (scores > 0) & (scores >= threshold / 2)
    solid = seen & (scores >= threshold)
    reach = 4 * max(image.shape[:2])
    points = np.clip(np.where(finite[:, None], keypoints, 0), -reach, reach)
    if thickness is None:
        thickness = _thickness(points[seen], box)

    canvas = np.ascontiguousarray(image).copy()
    if box is not None:
        rectangle(canvas, box, WHITE, thickness // 3)
    if style == "dashed":
        _paint_dashed(canvas, points, seen, skeleton, thickness)
        return canvas
    if (seen & ~solid).any():
        overlay = canvas.copy()
        _paint_solid(overlay, points, seen, skeleton, thickness)
        canvas = cv2.addWeighted(overlay, _FAINT, canvas, 1 - _FAINT, 0)
    _paint_solid(canvas, points, solid, skeleton, thickness)
    return canvas


def draw_people(
    image: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray | None,
    skeleton: Skeleton,
    *,
    boxes: np.ndarray | None = None,
    threshold: float = 0.2,
) -> np.ndarray:
    """A copy of a picture with N poses: keypoints (N, K, 2), scores (N, K), boxes (N, 4) xywh."""
    canvas = np.ascontiguousarray(image).copy()
    for row in range(len(keypoints)):
        canvas = draw_pose(
            canvas,
            keypoints[row],
            None if scores is None else scores[row],
            skeleton,
            threshold=threshold,
            box=None if boxes is None else boxes[row],
        )
    return canvas


def contact_sheet(
    images: Sequence[np.ndarray],
    *,
    columns: int,
    cell_wh: tuple[int, int],
    captions: Sequence[str] | None = None,
    gap: int = 6,
) -> np.ndarray:
    """Pictures (H, W, 3) uint8 RGB of any size in a grid, whole and centred, captions below.

    Raises PosefabricError when there are no pictures or the captions are not as many.
    """
    if not images or columns < 1:
        raise PosefabricError(
            f"a contact sheet needs pictures and columns >= 1, got {len(images)} and {columns}"
        )
    if captions is not None and len(captions) != len(images):
        raise PosefabricError(f"{len(images)} pictures but {len(captions)} captions; give one each")
    width, height = cell_wh
    strip = 0 if captions is None else 22
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    shape = (gap + rows * (height + strip + gap), gap + columns * (width + gap), 3)
    sheet = np.full(shape, SHEET, dtype=np.uint8)
    for position, image in enumerate(images):
        top = gap + position // columns * (height + strip + gap)
        left = gap + position % columns * (width + gap)
        sheet[top : top + height, left : left + width] = _letterbox(image, cell_wh)
        if captions is not None:
            line = text_strip(captions[position], width, strip)
            sheet[top + height : top + height + strip, left : left + width] = line
    return sheet


def prediction_sheet(
    dataset: PersonDataset,
    predictions: Predictions,
    rows: Iterable[int],
    *,
    columns: int = 6,
    cell_wh: tuple[int, int] = (220, 220),
    threshold: float = 0.2,
    context: float = 1.3,
) -> np.ndarray:
    """A sheet of persons: predictions solid, ground truth thin, white and dashed.

    ``rows`` are rows of ``dataset.persons``; each must be in ``predictions.index``. A cell shows
    the box grown by ``context``; the caption is the row and its :class:`PersonError`. A picture
    that cannot be read becomes a cell that says so. Raises PosefabricError for a row without
    a prediction.
    """
    place = {int(row): position for position, row in enumerate(predictions.index)}
    large = (cell_wh[0] * _SUPERSAMPLE, cell_wh[1] * _SUPERSAMPLE)
    cells, captions = [], []
    for row in rows:
        if row not in place:
            raise PosefabricError(
                f"{dataset.name}: person {row} has no prediction; rows must be among the "
                f"{len(place)} of predictions.index"
            )
        person = dataset.persons[row]
        keypoints = predictions.keypoints[place[row]]
        scores = predictions.scores[place[row]]
        try:
            cell, to_cell = _person_cell(dataset.read_image(person), person, large, context)
        except DataError:
            cells.append(np.full((cell_wh[1], cell_wh[0], 3), 70, dtype=np.uint8))
            captions.append(f"#{row} unreadable")
            continue
        thickness = max(2, round(max(large) * 0.011))
        mapped = keypoints @ to_cell[:, :2].T + to_cell[:, 2]
        cell = draw_pose(
            cell, mapped, scores, dataset.skeleton, threshold=threshold, thickness=thickness
        )
        truth = person.keypoints @ to_cell[:, :2].T + to_cell[:, 2]
        shown = (person.visibility > 0).astype(np.float64)
        cell = draw_pose(cell, truth, shown, dataset.skeleton, style="dashed", thickness=thickness)
        cells.append(cell)
        captions.append(f"#{row} {person_error(person, keypoints, dataset.skeleton).caption()}")
    return contact_sheet(cells, columns=columns, cell_wh=cell_wh, captions=captions)


def save_png(path: Path | str, image: np.ndarray) -> Path:
    """Write (H, W, 3) uint8 RGB as PNG, making folders; PosefabricError when it cannot be."""
    path = Path(path)
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise PosefabricError(f"{path}: OpenCV could not encode a picture of shape {image.shape}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise PosefabricError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def _paint_solid(
    canvas: np.ndarray, points: np.ndarray, shown: np.ndarray, skeleton: Skeleton, thickness: int
) -> None:
    limbs = [
        (start, end, colour)
        for (start, end), colour in zip(skeleton.limbs, limb_colours(skeleton), strict=True)
        if shown[start] and shown[end]
    ]
    edge = max(1, round(thickness * 0.3))
    # A dark rim under everything keeps bright colours readable on bright pictures.
    for start, end, _ in limbs:
        stroke(canvas, points[start], points[end], DARK, thickness + 2 * edge)
    for start, end, colour in limbs:
        stroke(canvas, points[start], points[end], colour, thickness)
    for point, colour, visible in zip(points, keypoint_colours(skeleton), shown, strict=True):
        if visible:
            dot(canvas, point, thickness * 0.95 + edge, DARK, -1)
            dot(canvas, point, thickness * 0.95, WHITE, -1)
            dot(canvas, point, thickness * 0.65, colour, -1)


def _paint_dashed(
    canvas: np.ndarray, points: np.ndarray, shown: np.ndarray, skeleton: Skeleton, thickness: int
) -> None:
    width = max(1, round(thickness * 0.4))
    for colour, extra in ((DARK, 2), (WHITE, 0)):
        for start, end in skeleton.limbs:
            if shown[start] and shown[end]:
                dash = max(4.0, thickness * 1.6)
                dashes(canvas, points[start], points[end], colour, width + extra, dash)
        for point in points[shown]:
            dot(canvas, point, max(1.5, thickness * 0.4) + extra / 2, colour, -1)


def _thickness(points: np.ndarray, box: np.ndarray | None) -> int:
    if box is not None:
        size = float(max(box[2], box[3]))
    elif len(points) > 1:
        size = float((points.max(axis=0) - points.min(axis=0)).max())
    else:
        size = 100.0
    return int(np.clip(round(size * 0.013), 1, 14))


def _letterbox(image: np.ndarray, cell_wh: tuple[int, int]) -> np.ndarray:
    width, height = cell_wh
    scale = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(image, size, interpolation=way)
    cell = np.full((height, width, 3), SHEET, dtype=np.uint8)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = small
    return cell


def _person_cell(
    image: np.ndarray, person: Person, cell_wh: tuple[int, int], context: float
) -> tuple[np.ndarray, np.ndarray]:
    """The person's surroundings at the cell's size, and the (2, 3) image-to-cell transform."""
    x, y, w, h = (float(value) for value in person.box_xywh)
    scale = min(cell_wh[0] / max(w, 1.0), cell_wh[1] / max(h, 1.0)) / context
    shrink = np.ones(2)
    if scale < 1:
        # Shrinking by area first: a warp alone would alias.
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        shrink = np.array(size) / image.shape[1::-1]
        image = cv2.resize(image, (size[0], size[1]), interpolation=cv2.INTER_AREA)
    centre = np.array([x + w / 2, y + h / 2])
    middle = (np.array(cell_wh) - 1) / 2
    to_cell = np.array([[scale, 0, 0], [0, scale, 0]], dtype=np.float64)
    to_cell[:, 2] = middle - scale * centre
    # Pixel i of the shrunk picture covers the original around (i + 0.5) / shrink - 0.5.
    warp = to_cell.copy()
    warp[:, :2] /= shrink
    warp[:, 2] += scale * (0.5 / shrink - 0.5)
    cell = cv2.warpAffine(image, warp, cell_wh, flags=cv2.INTER_CUBIC, borderValue=_OUTSIDE)
    return cell, to_cell


def _check(image: np.ndarray, keypoints: np.ndarray, scores: np.ndarray, count: int) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise PosefabricError(
            f"drawing needs an (H, W, 3) uint8 RGB picture, got {image.shape} {image.dtype}"
        )
    if keypoints.shape != (count, 2) or scores.shape != (count,):
        raise PosefabricError(
            f"the skeleton has {count} keypoints: expected keypoints ({count}, 2) and scores "
            f"({count},), got {keypoints.shape} and {scores.shape}; is it the right skeleton?"
        )
