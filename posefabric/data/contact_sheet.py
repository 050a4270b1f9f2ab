"""A picture of many samples at once: what the network is shown, and whether labels fit."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from posefabric.data.crop import CropGeometry, crop_person, transform_points
from posefabric.skeletons import Skeleton
from posefabric.structures import DataError, Person, PersonDataset

LEFT, RIGHT, MIDDLE, BOX = (255, 140, 0), (0, 160, 255), (90, 220, 90), (255, 255, 255)
GAP, CAPTION = 6, 16


def draw_contact_sheet(
    dataset: PersonDataset,
    geometry: CropGeometry,
    path: str | os.PathLike[str],
    count: int = 24,
    seed: int = 0,
) -> Path:
    """Write a PNG of ``count`` persons drawn by ``seed``; returns its path.

    Each is shown as its whole picture with box and skeleton, next to the crop the network gets:
    left side orange, right side blue, the rest green; occluded keypoints are hollow. A picture
    that cannot be read becomes a grey tile. Raises DataError when the file cannot be written.
    """
    generator = np.random.default_rng(seed)
    count = min(count, len(dataset))
    rows = np.sort(generator.choice(len(dataset), size=count, replace=False))
    tiles = [_tile(dataset, int(row), geometry) for row in rows]
    height = max(tile.shape[0] for tile in tiles)
    width = max(tile.shape[1] for tile in tiles)
    columns = max(1, round(float(np.sqrt(count * 1.5 * height / width))))
    lines = -(-count // columns)
    sheet = np.full(
        (lines * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 40, dtype=np.uint8
    )
    for number, tile in enumerate(tiles):
        top = GAP + (number // columns) * (height + GAP)
        left = GAP + (number % columns) * (width + GAP)
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    sheet = _captioned(sheet, "left orange, right blue, middle green; occluded hollow")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise DataError(f"{path}: cannot be written; a contact sheet ends in .png or .jpg")
    return path


def draw_skeleton(
    image: np.ndarray,
    keypoints: np.ndarray,
    visibility: np.ndarray,
    skeleton: Skeleton,
    thickness: int = 1,
) -> None:
    """Draw annotated limbs and keypoints (K, 2) into the image (H, W, 3), in place."""
    colours = [MIDDLE] * skeleton.num_keypoints
    for left, right in skeleton.flip_pairs:
        colours[left], colours[right] = LEFT, RIGHT
    spots = [(round(float(x)), round(float(y))) for x, y in keypoints]
    for start, end in skeleton.limbs:
        if visibility[start] and visibility[end]:
            sides = {colours[start], colours[end]} - {MIDDLE}
            colour = sides.pop() if len(sides) == 1 else MIDDLE
            cv2.line(image, spots[start], spots[end], colour, thickness, cv2.LINE_AA)
    for spot, seen, colour in zip(spots, visibility, colours, strict=True):
        if seen:
            cv2.circle(
                image, spot, 1 + thickness, colour, 1 if seen == 1 else cv2.FILLED, cv2.LINE_AA
            )


def _tile(dataset: PersonDataset, row: int, geometry: CropGeometry) -> np.ndarray:
    person = dataset.persons[row]
    crop_w, crop_h = geometry.crop_wh
    try:
        image = dataset.read_image(person)
        crop, image_to_crop = crop_person(image, person.box_xywh, geometry)
    except DataError:
        image = np.full((crop_h, crop_w, 3), 128, dtype=np.uint8)
        return _captioned(np.concatenate([image, image], axis=1), f"{person.file}: unreadable")
    crop = crop.copy()
    draw_skeleton(
        crop,
        transform_points(image_to_crop, person.keypoints),
        person.visibility,
        dataset.skeleton,
        thickness=max(1, min(crop_w, crop_h) // 96),
    )
    input_w, input_h = geometry.input_wh
    left, top = geometry.border_wh
    if geometry.margin > 1:
        cv2.rectangle(crop, (left, top), (left + input_w, top + input_h), BOX, 1)
    whole = _whole_picture(image, person, dataset.skeleton, (2 * crop_w, crop_h))
    return _captioned(
        np.concatenate([whole, crop], axis=1),
        f"{Path(person.file).name} {person.annotation_id}",
    )


def _whole_picture(
    image: np.ndarray, person: Person, skeleton: Skeleton, most_wh: tuple[int, int]
) -> np.ndarray:
    """The picture with box and skeleton, scaled into ``most_wh`` and centred on its height."""
    scale = min(most_wh[0] / image.shape[1], most_wh[1] / image.shape[0])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    x, y, width, height = (round(float(value)) for value in person.box_xywh * scale)
    cv2.rectangle(small, (x, y), (x + width, y + height), BOX, 1)
    draw_skeleton(small, person.keypoints * scale, person.visibility, skeleton)
    padded = np.full((most_wh[1], size[0], 3), 40, dtype=np.uint8)
    top = (most_wh[1] - size[1]) // 2
    padded[top : top + size[1]] = small
    return padded


def _captioned(tile: np.ndarray, text: str) -> np.ndarray:
    caption = np.full((CAPTION, tile.shape[1], 3), 40, dtype=np.uint8)
    place = (2, CAPTION - 4)
    cv2.putText(caption, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, BOX, 1, cv2.LINE_AA)
    return np.concatenate([caption, tile], axis=0)
