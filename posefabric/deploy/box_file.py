"""Boxes of pictures from COCO detections or annotations, found by file name or image id."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from posefabric.data.coco_json import read_json
from posefabric.structures import DataError


@dataclass
class PictureBoxes:
    """The persons a file lists for one picture."""

    image_id: int | str | None = None
    boxes: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) float32 xywh and scores (N,) float32."""
        boxes = np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4)
        return boxes, np.asarray(self.scores, dtype=np.float32)


@dataclass
class BoxFile:
    """Boxes by image id and by file name; ``left_out`` counts what was not used, and why."""

    path: Path
    by_id: dict[str, PictureBoxes]
    by_name: dict[str, list[tuple[PurePosixPath, PictureBoxes]]]
    left_out: Counter[str]

    def find(self, picture: Path) -> PictureBoxes | None:
        """The entry of a picture; None when the file does not mention it.

        By file name, where the file has names (the longest common end of the path wins), else
        by image id: ``000000000785.jpg`` is image 785.
        """
        named = self.by_name.get(picture.name, [])
        parts = PurePosixPath(picture.resolve().as_posix()).parts
        if named:
            common = [_common_end(parts, name.parts) for name, _ in named]
            best = max(common)
            if common.count(best) > 1:
                raise DataError(
                    f"{self.path}: {picture.name} is there {common.count(best)} times, in "
                    f"{', '.join(str(name.parent) for name, _ in named[:3])}; none of them "
                    f"ends like {picture}"
                )
            return named[common.index(best)][1]
        # A file with names speaks by them: there a number in a name is no image id.
        return None if self.by_name else self.by_id.get(_plain_id(picture.stem))


def read_boxes(
    path: str | os.PathLike[str], *, category_id: int = 1, score_threshold: float = 0.0
) -> BoxFile:
    """Read COCO detections, or the boxes of COCO annotations.

    A list of ``{bbox, image_id or file_name, score, category_id}`` (the last two may be
    missing), or an object with ``images`` and ``annotations``. Crowds, other categories (unless
    the file names only one), scores below ``score_threshold`` and boxes that are not four finite
    numbers with positive sides are left out and counted.

    Raises DataError when the file is neither of the two, or leaves no box.
    """
    path = Path(path)
    tree = read_json(path)
    pictures: dict[str, PictureBoxes] = {}
    names: dict[str, PictureBoxes] = {}
    if isinstance(tree, dict) and isinstance(tree.get("annotations"), list):
        entries = tree["annotations"]
        for image in tree.get("images") or []:
            if not isinstance(image, dict) or "id" not in image:
                raise DataError(f"{path}: an entry of `images` has no id: {str(image)[:80]}")
            found = pictures.setdefault(_plain_id(image["id"]), PictureBoxes(image["id"]))
            if "file_name" in image:
                names[str(image["file_name"])] = found
    elif isinstance(tree, list):
        entries = tree
    else:
        raise DataError(
            f"{path}: expected COCO detections (a list of {{image_id, bbox, score}}) or COCO "
            "annotations (an object with images and annotations)"
        )
    categories = {e.get("category_id") for e in entries if isinstance(e, dict)} - {None}
    left_out: Counter[str] = Counter()
    kept = 0
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not ({"image_id", "file_name"} & entry.keys()):
            raise DataError(
                f"{path}: entry {number} reads {str(entry)[:80]}; expected bbox and image_id "
                "(or file_name)"
            )
        score, reason = _judge(entry, category_id, len(categories) > 1, score_threshold)
        if reason:
            left_out[reason] += 1
            continue
        kept += 1
        if "file_name" in entry:
            key = str(entry["file_name"])
            found = names.setdefault(key, PictureBoxes(entry.get("image_id")))
        else:
            key = _plain_id(entry["image_id"])
            found = pictures.setdefault(key, PictureBoxes(entry["image_id"]))
        found.boxes.append([float(value) for value in entry["bbox"]])
        found.scores.append(score)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(
            f"{path}: no box to use among {len(entries)} entries"
            + (f" ({reasons}; categories {sorted(map(str, categories))})" if reasons else "")
        )
    by_name: dict[str, list[tuple[PurePosixPath, PictureBoxes]]] = {}
    for name, found in names.items():
        name = PurePosixPath(name.replace("\\", "/"))
        by_name.setdefault(name.name, []).append((name, found))
    return BoxFile(path=path, by_id=pictures, by_name=by_name, left_out=left_out)


def _judge(
    entry: dict[str, Any], category_id: int, several: bool, threshold: float
) -> tuple[float, str | None]:
    """The score, and why an entry is left out (None: it is not)."""
    if several and entry.get("category_id", category_id) != category_id:
        return 0.0, "of another category"
    if entry.get("iscrowd"):
        return 0.0, "crowd"
    box, score = entry.get("bbox"), entry.get("score", 1.0)
    numbers = [score, *(box if isinstance(box, Sequence) else ())]
    if len(numbers) != 5 or not all(_is_finite(value) for value in numbers):
        return 0.0, "without four finite numbers in bbox"
    if numbers[3] <= 0 or numbers[4] <= 0:
        return 0.0, "with an empty box"
    if score < threshold:
        return 0.0, "below the score threshold"
    return float(score), None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain_id(value: Any) -> str:
    """``000000000785``, ``"785"`` and 785 are one id."""
    text = str(value)
    return str(int(text)) if text.isascii() and text.isdigit() else text


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for mine, theirs in zip(reversed(one), reversed(other), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
