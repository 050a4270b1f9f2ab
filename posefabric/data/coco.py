"""Persons from keypoint annotations in COCO format, for any skeleton."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from posefabric.data.coco_json import (
    PathLike,
    keypoint_count_error,
    load_coco_tree,
    person_categories,
    read_json,
)
from posefabric.data.image import read_image
from posefabric.skeletons import Skeleton
from posefabric.structures import DataError, Person, PersonDataset

GROWTH = 5.0  # pixels


def read_coco(
    annotations: PathLike,
    images: PathLike,
    skeleton: Skeleton,
    *,
    boxes: PathLike | None = None,
    box_score_threshold: float = 0.0,
    grow_boxes: bool = False,
    name: str | None = None,
) -> PersonDataset:
    """The persons of a COCO keypoint file, in the order of its pictures, then annotation ids.

    Crowd regions, persons without an annotated keypoint and boxes that are empty inside the
    picture are left out and counted in ``skipped``. Boxes are clipped as the HRNet family does:
    to x1 >= 0, x2 = min(width - 1, x1 + w - 1), likewise for y. A person without ``area`` gets
    the area of its box.

    Args:
        annotations: JSON with ``images``, ``annotations`` and ``categories``; where a category
            names its keypoints, names and order must be the skeleton's.
        images: folder of the pictures.
        skeleton: what the K keypoints are.
        boxes: JSON list of detections ``{image_id, category_id, bbox, score}``; persons are then
            these, unclipped, with annotation id -1, keypoints 0 and visibility 0. Pictures that
            the annotations do not list, and categories that are no persons there, are left out.
            The annotation file may then be one without annotations, as of COCO's test sets.
        box_score_threshold: detections below it are left out.
        grow_boxes: ground-truth boxes as the paper's released code has them (see grown_boxes).
        name: shown in reports; the annotation file's stem if not given.

    Raises DataError that names the file, the annotation and what to change.
    """
    path, folder = Path(annotations), Path(images)
    tree = load_coco_tree(path, annotated=boxes is None)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of pictures (for {path})")
    pictures = _pictures(tree["images"], path, folder)
    categories = person_categories(tree.get("categories"), skeleton, path)
    skipped: Counter[str] = Counter()
    if boxes is None:
        persons = _annotated(
            tree["annotations"], pictures, categories, skeleton, skipped, path, grow_boxes
        )
        order = {image_id: row for row, image_id in enumerate(pictures)}
        persons.sort(key=lambda person: (order[person.image_id], person.annotation_id))
        source = "ground truth" + (", grown to cover its keypoints" if grow_boxes else "")
    else:
        persons = _detected(
            Path(boxes), box_score_threshold, pictures, categories, skeleton, skipped
        )
        source = f"detections of {Path(boxes).name}"
        if box_score_threshold > 0:
            source += f" with score >= {box_score_threshold:g}"
    if not persons:
        left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(
            f"{boxes or path}: no person to use" + (f"; left out: {left_out}" if left_out else "")
        )
    return PersonDataset(
        name=name or path.stem,
        skeleton=skeleton,
        persons=persons,
        read_image=_read_person,
        box_source=source,
        annotations_path=str(path),
        skipped=dict(skipped),
        ground_truth=any(entry.get("keypoints") for entry in tree["annotations"]),
    )


def clip_box(box_xywh: np.ndarray, picture_wh: np.ndarray) -> np.ndarray:
    """(N, 4) boxes clipped to (N, 2) pictures as the HRNet family's COCO reader does.

    The last pixel counts as the box's edge: an inner box loses 1 px of width and height. A box
    that is empty inside the picture gets a width or height of at most 0.
    """
    start = np.maximum(box_xywh[:, :2], 0)
    end = np.minimum(picture_wh - 1, start + np.maximum(box_xywh[:, 2:] - 1, 0))
    return np.concatenate([start, end - start], axis=1)


def grown_boxes(
    box_xywh: np.ndarray, keypoints: np.ndarray, visibility: np.ndarray, picture_wh: np.ndarray
) -> np.ndarray:
    """(N, 4) boxes grown as the paper's released code does, which tells where keypoints are.

    The union of a box (N, 4) and its annotated keypoints (N, K, 2), 5 px larger on every side,
    cut to whole pixels and to the picture (N, 2).
    """
    seen = (visibility > 0)[..., None]
    lowest = np.where(seen, keypoints, np.inf).min(axis=1)
    highest = np.where(seen, keypoints, -np.inf).max(axis=1)
    start = np.trunc(np.minimum(box_xywh[:, :2], lowest) - GROWTH)
    end = np.trunc(np.maximum(box_xywh[:, :2] + box_xywh[:, 2:], highest) + GROWTH)
    start = np.maximum(start, 0)
    return np.concatenate([start, np.minimum(end, picture_wh) - start], axis=1)


def _pictures(
    entries: list[dict[str, Any]], path: Path, folder: Path
) -> dict[int, tuple[str, float, float]]:
    """Image id -> file, width, height."""
    pictures: dict[int, tuple[str, float, float]] = {}
    for number, entry in enumerate(entries):
        try:
            image_id = entry["id"]
            file = str(folder / entry["file_name"])
            pictures[image_id] = file, entry["width"], entry["height"]
        except KeyError as error:
            raise DataError(
                f"{path}: image {entry.get('id', f'number {number + 1}')} has no {error}; an image "
                "has id, file_name, width and height"
            ) from error
        if not isinstance(image_id, int):
            raise DataError(f"{path}: the image id {image_id!r} must be a whole number")
        if len(pictures) <= number:
            raise DataError(f"{path}: the image id {image_id} is there twice; ids must be unique")
    return pictures


def _annotated(
    entries: list[dict[str, Any]],
    pictures: dict[int, tuple[str, float, float]],
    categories: set[int] | None,
    skeleton: Skeleton,
    skipped: Counter[str],
    path: Path,
    grow: bool,
) -> list[Person]:
    numbers = 3 * skeleton.num_keypoints
    seen: set[Any] = set()
    kept: list[dict[str, Any]] = []
    for row, entry in enumerate(entries):
        label = f"{path}: annotation {entry.get('id', f'number {row + 1}')}"
        if categories is not None and entry.get("category_id") not in categories:
            skipped["of another category"] += 1
            continue
        for key in ("id", "image_id", "bbox"):
            if key not in entry:
                raise DataError(f"{label} has no {key!r}")
        if not isinstance(entry["id"], int):
            raise DataError(f"{label}: its id must be a whole number")
        if entry["id"] in seen:
            raise DataError(f"{label} is there twice; ids must be unique")
        seen.add(entry["id"])
        if entry["image_id"] not in pictures:
            raise DataError(
                f"{label} belongs to image {entry['image_id']!r}, which `images` does not list"
            )
        if not isinstance(entry["bbox"], list) or len(entry["bbox"]) != 4:
            raise DataError(f"{label} has the bbox {entry['bbox']!r}, expected x, y, w, h")
        if entry.get("iscrowd"):
            skipped["crowd"] += 1
            continue
        if not isinstance(entry.get("keypoints"), list):
            raise DataError(f"{label} has no keypoints; is this an instances file?")
        if len(entry["keypoints"]) != numbers:
            raise DataError(f"{label}: {keypoint_count_error(len(entry['keypoints']), skeleton)}")
        kept.append(entry)
    if not kept:
        return []
    return _vectorised(kept, pictures, skeleton, skipped, path, grow)


def _vectorised(
    entries: list[dict[str, Any]],
    pictures: dict[int, tuple[str, float, float]],
    skeleton: Skeleton,
    skipped: Counter[str],
    path: Path,
    grow: bool,
) -> list[Person]:
    values = _numbers(entries, "keypoints", path).reshape(-1, skeleton.num_keypoints, 3)
    boxes = _numbers(entries, "bbox", path)
    keypoints = values[..., :2].astype(np.float32)
    visibility = values[..., 2]
    wrong = ~np.isin(visibility, (0, 1, 2)).all(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{path}: annotation {entries[row]['id']} has the visibilities "
            f"{visibility[row].tolist()}; COCO knows 0 not annotated, 1 occluded, 2 visible"
        )
    visibility = visibility.astype(np.uint8)
    sizes = np.asarray([pictures[entry["image_id"]][1:] for entry in entries], dtype=np.float64)
    clipped = clip_box(boxes, sizes)
    bare = ~(visibility > 0).any(axis=1)
    empty = ~bare & (clipped[:, 2:] <= 0).any(axis=1)
    for reason, rows in (("without an annotated keypoint", bare), ("with an empty box", empty)):
        if rows.any():
            skipped[reason] = int(rows.sum())
    box_area = boxes[:, 2] * boxes[:, 3]
    if grow:
        clipped = grown_boxes(boxes, keypoints, visibility, sizes)
    clipped = clipped.astype(np.float32)
    persons = []
    for row in np.flatnonzero(~(bare | empty)).tolist():
        entry = entries[row]
        persons.append(
            Person(
                image_id=entry["image_id"],
                annotation_id=entry["id"],
                file=pictures[entry["image_id"]][0],
                box_xywh=clipped[row],
                keypoints=keypoints[row],
                visibility=visibility[row],
                area=float(entry.get("area") or box_area[row]),
            )
        )
    return persons


def _detected(
    path: Path,
    threshold: float,
    pictures: dict[int, tuple[str, float, float]],
    categories: set[int] | None,
    skeleton: Skeleton,
    skipped: Counter[str],
) -> list[Person]:
    tree = read_json(path)
    if not isinstance(tree, list):
        raise DataError(f"{path}: detections are a list of {{image_id, category_id, bbox, score}}")
    kept = []
    for number, entry in enumerate(tree, 1):
        missing = [key for key in ("image_id", "bbox", "score") if key not in entry]
        if missing or len(entry["bbox"]) != 4:
            raise DataError(
                f"{path}: detection {number} reads {entry!r}; expected image_id, category_id, "
                "bbox (x, y, w, h) and score"
            )
        if entry["image_id"] not in pictures:
            skipped["in a picture that is not annotated"] += 1
        elif categories is not None and entry.get("category_id", 1) not in categories:
            skipped["of another category"] += 1
        elif entry["score"] < threshold:
            skipped["below the score threshold"] += 1
        else:
            kept.append(entry)
    if not kept:
        return []
    boxes = _numbers(kept, "bbox", path).astype(np.float32)
    keypoints = np.zeros((skeleton.num_keypoints, 2), dtype=np.float32)
    visibility = np.zeros(skeleton.num_keypoints, dtype=np.uint8)
    persons = []
    for entry, box in zip(kept, boxes, strict=True):
        if box[2] <= 0 or box[3] <= 0:
            skipped["with an empty box"] += 1
            continue
        persons.append(
            Person(
                image_id=entry["image_id"],
                annotation_id=-1,
                file=pictures[entry["image_id"]][0],
                box_xywh=box,
                keypoints=keypoints,
                visibility=visibility,
                score=float(entry["score"]),
                area=float(box[2] * box[3]),
            )
        )
    order = {image_id: row for row, image_id in enumerate(pictures)}
    persons.sort(key=lambda person: order[person.image_id])
    return persons


def _numbers(entries: list[dict[str, Any]], key: str, path: Path) -> np.ndarray:
    try:
        values = np.asarray([entry[key] for entry in entries], dtype=np.float64)
    except (TypeError, ValueError):
        values = np.full((len(entries), 1), np.nan)
        for row, entry in enumerate(entries):
            if all(isinstance(value, int | float) for value in entry[key]):
                values[row] = 0
    wrong = ~np.isfinite(values).all(axis=1)
    if wrong.any():
        entry = entries[int(wrong.argmax())]
        raise DataError(
            f"{path}: the {key} of annotation {entry.get('id', '(detection)')} in image "
            f"{entry['image_id']} must be finite numbers, got {entry[key]!r}"
        )
    return values


def _read_person(person: Person) -> np.ndarray:
    return read_image(person.file)
