"""Leeds Sports Pose and its extension: from the public folders to COCO-format person crops."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.io import loadmat

from posefabric.data.image import read_image
from posefabric.skeletons import Skeleton, load_skeleton
from posefabric.structures import DataError

MIN_JOINTS = 6
BOX_GROWTH, BOX_BORDER = 0.10, 2.0
CROP_FACTOR, MIN_EXTENT = 1.7, 40.0
JPEG_QUALITY = 80

_TITLES = {
    "lsp": "Leeds Sports Pose (Johnson and Everingham, BMVC 2010)",
    "lspet": "Leeds Sports Pose Extended (Johnson and Everingham, CVPR 2011)",
}


def convert_lsp(
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    ids: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Write ``annotations/SPLIT.json`` and the crops in ``SPLIT/``; returns counts a split.

    A joint counts where it is annotated and inside the picture; a person with fewer than 6 is
    left out. The box is the joints' extent grown by 10 % + 2 px on each side, inside the
    picture. The picture is cut to a square of 1.7 times the extent's longer side (taken as at
    least 40 px) about the extent's centre, to whole pixels outwards, inside the picture, and
    saved as JPEG of quality 80. An image id is the picture's number in the public set.

    Args:
        source_dir: the public folder, ``joints.mat`` and the pictures (here or in ``images/``).
            An array of (3, 14, N) is LSP: every joint is annotated, the third row is 1 where
            it is occluded (visibility 1). (14, 3, N) is LSP Extended: the third column is 1
            where the joint is annotated, all of which are seen (visibility 2).
        out_dir: made when missing; files in it are replaced.
        ids: split name -> picture numbers. If not given: the shipped splits for LSP Extended;
            the first 1000 pictures for train, the others for test, its protocol, for LSP.
        progress: called with (pictures done, pictures in all).

    Raises DataError for a missing or unreadable file, or a number the set does not have.
    """
    source, out = Path(source_dir), Path(out_dir)
    joints, visibility, kind = read_joints(source / "joints.mat")
    splits = ids if ids is not None else _default_ids(kind, len(joints))
    folder = source / "images" if (source / "images").is_dir() else source
    files = {
        split: [_picture_file(folder, number, len(joints), kind, split) for number in numbers]
        for split, numbers in splits.items()
    }
    skeleton = load_skeleton("lsp14")
    total = sum(len(numbers) for numbers in splits.values())
    done = 0
    counts: dict[str, dict[str, int]] = {}
    for split, numbers in splits.items():
        target = out / split
        target.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for number, file in zip(numbers, files[split], strict=True):
            picture = read_image(file)
            person = crop_of_person(picture, joints[number - 1], visibility[number - 1])
            if person is not None:
                crop, keypoints, seen, box = person
                _write_jpeg(target / file.name, crop)
                images.append(_image_entry(number, file.name, crop))
                annotations.append(_annotation_entry(number, keypoints, seen, box))
            done += 1
            if progress is not None:
                progress(done, total)
        tree = {
            "info": {"description": f"{_TITLES[kind]}, person crops, COCO keypoint format"},
            "images": images,
            "annotations": annotations,
            "categories": [_category(skeleton)],
        }
        path = out / "annotations" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree), encoding="utf-8")
        left_out = len(numbers) - len(images)
        counts[split] = {"persons": len(images), f"fewer than {MIN_JOINTS} joints": left_out}
    return counts


def read_joints(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Joints (N, 14, 2) float64 in pixels, COCO visibilities (N, 14), and ``lsp`` or ``lspet``."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the folder that joints.mat is in")
    try:
        content = loadmat(str(path))
    except (ValueError, NotImplementedError, OSError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a MATLAB file: {error}") from error
    array = np.asarray(content.get("joints", np.empty(0)), dtype=np.float64)
    if array.ndim == 3 and array.shape[:2] == (3, 14):
        array, kind = array.transpose(2, 1, 0), "lsp"
        visibility = np.where(array[..., 2] > 0, 1, 2)
    elif array.ndim == 3 and array.shape[:2] == (14, 3):
        array, kind = array.transpose(2, 0, 1), "lspet"
        visibility = np.where(array[..., 2] > 0, 2, 0)
    else:
        raise DataError(
            f"{path}: expected `joints` of shape (3, 14, N), LSP, or (14, 3, N), LSP Extended, "
            f"got {array.shape}"
        )
    return array[..., :2], visibility.astype(np.uint8), kind


def crop_of_person(
    picture: np.ndarray, joints: np.ndarray, visibility: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Crop, joints (14, 2), visibility (14,) and box xywh (4,) in it; None: too few joints.

    Takes the picture (H, W, 3), joints (14, 2) and visibility (14,) of :func:`read_joints`.
    """
    picture_wh = np.array([picture.shape[1], picture.shape[0]], dtype=np.float64)
    inside = ((joints >= 0) & (joints <= picture_wh - 1)).all(axis=1)
    visibility = np.where(inside, visibility, 0).astype(np.uint8)
    seen = visibility > 0
    if int(seen.sum()) < MIN_JOINTS:
        return None
    low, high = joints[seen].min(axis=0), joints[seen].max(axis=0)
    grown = BOX_GROWTH * (high - low) + BOX_BORDER
    box_low, box_high = np.maximum(low - grown, 0), np.minimum(high + grown, picture_wh)
    half = CROP_FACTOR * max(float((high - low).max()), MIN_EXTENT) / 2
    centre = (low + high) / 2
    start = np.maximum(np.floor(centre - half), 0).astype(int)
    end = np.minimum(np.ceil(centre + half), picture_wh).astype(int)
    crop = picture[start[1] : end[1], start[0] : end[0]]
    keypoints = np.where(seen[:, None], joints - start, 0.0)
    return crop, keypoints, visibility, np.concatenate([box_low - start, box_high - box_low])


def shipped_ids() -> dict[str, list[int]]:
    """The picture numbers of LSP Extended's train, val and test split."""
    folder = Path(str(resources.files("posefabric"))) / "data" / "ids"
    lists = ids_by_split(folder)
    return {split: lists[split] for split in ("train", "val", "test")}


def ids_by_split(path: Path) -> dict[str, list[int]]:
    """The lists of a folder's .txt files, or of one such file; ``lspet_val.txt`` is val.

    Raises DataError when there is no such file, or the folder holds none.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"{path}: expected a .txt list of picture numbers, or a folder of them")
    return {file.stem.rpartition("_")[2]: read_ids(file) for file in files}


def read_ids(path: str | os.PathLike[str]) -> list[int]:
    """Numbers of a list with one number or range ``first-last`` a line; # starts a comment."""
    numbers: list[int] = []
    for row, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        first, _, last = text.partition("-")
        try:
            numbers.extend(range(int(first), int(last or first) + 1))
        except ValueError as error:
            raise DataError(f"{path}: line {row} reads {text!r}, expected 12 or 12-40") from error
    return numbers


def _default_ids(kind: str, count: int) -> dict[str, list[int]]:
    if kind == "lspet":
        return shipped_ids()
    return {"train": list(range(1, 1001)), "test": list(range(1001, count + 1))}


def _picture_file(folder: Path, number: int, count: int, kind: str, split: str) -> Path:
    if not 1 <= number <= count:
        raise DataError(
            f"split {split}: picture {number} is not in the set, which has 1 to {count}; "
            "correct the ids, or give the complete data set"
        )
    file = folder / (f"im{number:05d}.jpg" if kind == "lspet" else f"im{number:04d}.jpg")
    if not file.is_file():
        raise DataError(f"{file}: no such picture (split {split}); is the archive complete?")
    return file


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise DataError(f"{path}: cannot be written; is there room, and may you write here?")


def _image_entry(number: int, name: str, crop: np.ndarray) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": crop.shape[1], "height": crop.shape[0]}


def _annotation_entry(
    number: int, keypoints: np.ndarray, visibility: np.ndarray, box_xywh: np.ndarray
) -> dict[str, Any]:
    numbers: list[float | int] = []
    for (x, y), seen in zip(keypoints.tolist(), visibility.tolist(), strict=True):
        numbers += [round(x, 2), round(y, 2), seen] if seen else [0, 0, 0]
    box = [round(value, 2) for value in box_xywh.tolist()]
    return {
        "id": number,
        "image_id": number,
        "category_id": 1,
        "iscrowd": 0,
        "num_keypoints": int((visibility > 0).sum()),
        "keypoints": numbers,
        "bbox": box,
        "area": round(box[2] * box[3], 2),
    }


def _category(skeleton: Skeleton) -> dict[str, Any]:
    return {
        "id": 1,
        "name": "person",
        "keypoints": list(skeleton.keypoints),
        "skeleton": [[start + 1, end + 1] for start, end in skeleton.limbs],
    }
