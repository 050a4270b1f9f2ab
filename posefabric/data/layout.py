"""Finds annotation files, picture folders and skeletons in a data set's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from posefabric.skeletons import Skeleton, load_skeleton, shipped_skeletons
from posefabric.structures import DataError


@dataclass(frozen=True)
class SplitFiles:
    """One annotation file and the folder its pictures lie in."""

    annotations: Path
    images: Path


def find_splits(path: Path) -> list[SplitFiles]:
    """COCO-format annotation files under ``path``, or ``path`` itself, with their pictures.

    A file ``.../person_keypoints_val2017.json`` or ``val.json`` belongs to a folder ``val2017``
    or ``val`` beside it or one level up; else its pictures lie beside it.
    Raises DataError when there is none.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(path.glob("**/*.json"))
    found = [
        SplitFiles(annotations=file, images=_picture_folder(file))
        for file in files
        if path.is_file() or _is_annotation_file(file)
    ]
    if not found:
        raise DataError(
            f"{path}: no COCO-format annotation file (a .json with images and annotations) here"
        )
    return found


def guess_skeleton(annotations: Path, named: str | None = None) -> Skeleton:
    """The named skeleton, else the shipped one whose keypoints are those of the file."""
    if named is not None:
        return load_skeleton(named)
    names = _keypoint_names(annotations)
    known = [load_skeleton(name) for name in shipped_skeletons()]
    for skeleton in known:
        if list(skeleton.keypoints) == names:
            return skeleton
    raise DataError(
        f"{annotations}: its keypoints ({', '.join(names) or 'none named'}) are those of no "
        f"shipped skeleton ({', '.join(s.name for s in known)}); say which with --skeleton NAME "
        f"or a YAML file of your own"
    )


def _picture_folder(file: Path) -> Path:
    words = file.stem.split("_")
    candidates = [
        base / word for base in (file.parent, file.parent.parent) for word in (file.stem, words[-1])
    ]
    return next((folder for folder in candidates if folder.is_dir()), file.parent)


def _is_annotation_file(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(1)
    if head != b"{":
        return False
    try:
        tree = json.loads(file.read_bytes())
    except ValueError:
        # A broken file is shown to the user by whoever reads it.
        return True
    return isinstance(tree, dict) and "images" in tree and "annotations" in tree


def _keypoint_names(file: Path) -> list[str]:
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from error
    for category in tree.get("categories", []) if isinstance(tree, dict) else []:
        if category.get("keypoints"):
            return list(category["keypoints"])
    return []
