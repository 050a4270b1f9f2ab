"""MPII Human Pose: persons by centre and scale, with head boxes for PCKh."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from posefabric.data.coco_json import PathLike
from posefabric.data.image import read_image
from posefabric.data.mpii_files import MpiiPicture, MpiiRect, read_headboxes, read_mpii_file
from posefabric.skeletons import Skeleton, load_skeleton
from posefabric.structures import DataError, Person, PersonDataset

BOX_SIDE = 200.0  # pixels of a person of scale 1
CENTRE_SHIFT = 15.0  # pixels of a person of scale 1: the box goes down, so as to show the feet
BOX_SOURCE = "centre and scale of the annotation"
# Of joints that are the same annotation, written to as many digits as JSON has.
SAME_JOINTS = 0.5


def read_mpii(
    annotations: PathLike,
    images: PathLike,
    skeleton: Skeleton,
    *,
    split: Literal["train", "val", "test"],
    headboxes: PathLike | None = None,
    name: str | None = None,
) -> PersonDataset:
    """The persons of an MPII file: the HRNet family's JSON, or the official .mat (CONVENTIONS).

    A person's box is square, 200 px x scale, about the annotated centre moved down by 15 px x
    scale; the crop widens it by 1.25. Files count pixels from 1, persons from 0. Left out and
    counted: persons without a joint (but of a test set), without centre or scale.

    Args:
        annotations: ``.json``; or ``.mat``, in which ``train`` are the persons of the training
            pictures and ``test`` the single persons of the others.
        images: folder of the pictures.
        skeleton: has to have mpii16's keypoints.
        split: train, val or test.
        headboxes: a file with a head box for each person of a JSON, in its order (see
            read_headboxes); a .mat has its own.

    Returns:
        A data set whose ``headboxes`` (N, 2, 2) are NaN where a person has none; whose
        ``image_id`` is the picture's 1-based place and ``annotation_id`` the person's number in
        the file; and of whose ``ground_truth`` a test set without joints has none.

    Raises DataError for a file that cannot be used, and head boxes of other persons.
    """
    path, folder = Path(annotations), Path(images)
    if skeleton.keypoints != load_skeleton("mpii16").keypoints:
        raise DataError(
            f"{path}: MPII has the keypoints of skeleton mpii16, not of {skeleton.name}; choose "
            "data.skeleton=mpii16"
        )
    pictures = read_mpii_file(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of pictures (for {path})")
    chosen = mpii_split(pictures, split, path)
    annotated = any(rect.visibility.any() for _, _, rect in chosen)
    if not annotated and split != "test":
        raise DataError(f"{path}: no person has a joint; only a test set may be so")
    skipped: Counter[str] = Counter()
    persons, heads = [], []
    for place, picture, rect in chosen:
        if rect.centre is None or not rect.scale or not rect.scale > 0:
            skipped["without centre or scale"] += 1
        elif annotated and not rect.visibility.any():
            skipped["without an annotated keypoint"] += 1
        else:
            persons.append(_person(rect, str(folder / picture.name), place))
            heads.append(rect.headbox - 1)
    if not persons:
        left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"{path}: no person to use; left out: {left_out or 'none'}")
    boxes = np.stack(heads)
    if headboxes is not None:
        boxes = _given_headboxes(Path(headboxes), persons, path)
    return PersonDataset(
        name=name or path.stem,
        skeleton=skeleton,
        persons=persons,
        read_image=lambda person: read_image(person.file),
        box_source=BOX_SOURCE,
        skipped=dict(skipped),
        headboxes=boxes if np.isfinite(boxes).any() else None,
        ground_truth=annotated,
        has_areas=False,
        source_path=str(path),
    )


def mpii_split(
    pictures: list[MpiiPicture], split: Literal["train", "val", "test"], path: Path
) -> list[tuple[int, MpiiPicture, MpiiRect]]:
    """(1-based place in the file, picture, person) of every person of a split.

    All of a JSON's; of a .mat's those of the training pictures, or the single persons of the
    others. Raises DataError for the validation split of a .mat.
    """
    official = any(picture.train is not None for picture in pictures)
    if official and split == "val":
        raise DataError(
            f"{path}: the official file has no validation split; give the HRNet family's "
            "valid.json as data.val_annotations"
        )
    found = []
    for place, picture in enumerate(pictures, 1):
        if picture.train is None or picture.train == (split == "train"):
            found += [
                (place, picture, rect)
                for rect in picture.rects
                if not official or split == "train" or rect.single
            ]
    return found


def person_box(centre: np.ndarray, scale: float) -> np.ndarray:
    """(4,) xywh in 0-based pixels, of a centre (2,) in 1-based pixels and a scale of 200 px."""
    side = BOX_SIDE * scale
    down = np.array([0.0, CENTRE_SHIFT * scale])
    middle = np.asarray(centre, dtype=np.float64) + down - 1.0
    return np.concatenate([middle - side / 2, [side, side]])


def _person(rect: MpiiRect, file: str, place: int) -> Person:
    assert rect.centre is not None and rect.scale is not None
    box = person_box(rect.centre, rect.scale)
    seen = rect.visibility > 0
    return Person(
        image_id=place,
        annotation_id=rect.number,
        file=file,
        box_xywh=box.astype(np.float32),
        keypoints=np.where(seen[:, None], rect.joints - 1, 0).astype(np.float32),
        visibility=rect.visibility,
        area=float(box[2] * box[3]),
    )


def _given_headboxes(path: Path, persons: list[Person], annotations: Path) -> np.ndarray:
    """(N, 2, 2) in 0-based pixels, of the rows of a file that the persons have in theirs."""
    heads, joints = read_headboxes(path)
    rows = np.array([person.annotation_id for person in persons]) - 1
    if rows.max() >= len(heads):
        raise DataError(
            f"{path}: {len(heads)} head boxes, but {annotations} has a person {rows.max() + 1}; "
            "give the head boxes of that file"
        )
    if joints is not None:
        ours = np.stack([person.keypoints for person in persons])
        seen = np.stack([person.visibility for person in persons]) > 0
        apart = np.abs(joints[rows] - 1 - ours).max(axis=-1)
        wrong = (np.where(seen, apart, 0) > SAME_JOINTS).any(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"{path}: row {rows[row] + 1} has other joints than person {rows[row] + 1} of "
                f"{annotations}; give the head boxes of that file, in its order"
            )
    return heads[rows] - 1
