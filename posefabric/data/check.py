"""What is wrong with a data set in COCO format, all of it at once rather than the first mistake."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from posefabric.data.check_report import CheckReport, Problem
from posefabric.data.coco import clip_box
from posefabric.data.coco_json import keypoint_count_error, load_coco_tree, person_categories
from posefabric.data.contact_sheet import draw_contact_sheet
from posefabric.data.image import read_image
from posefabric.data.sides import USUAL_RATE, check_sides
from posefabric.skeletons import Skeleton
from posefabric.structures import DataError

__all__ = ["CheckReport", "Problem", "check_coco", "draw_contact_sheet"]


def check_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    skeleton: Skeleton,
    *,
    read_pictures: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Everything that can be found wrong with an annotation file and its pictures.

    Errors: ids that are missing, doubled or unknown; missing or damaged pictures, or ones of
    another size than stated; wrong keypoint names, counts or values. Warnings: boxes that are
    empty inside the picture; keypoints outside the picture, or annotated at (0, 0); fields that
    OKS evaluation needs; left and right exchanged more often than chance
    (:mod:`posefabric.data.sides`).

    ``read_pictures`` decodes every picture (about 2 ms each); without it, only their presence
    is checked. ``progress`` is called with (pictures done, pictures in all). Raises nothing for
    bad data: an unusable file is a report with one error.
    """
    path = Path(annotations)
    check = _Check(path, skeleton)
    try:
        tree = load_coco_tree(path)
    except DataError as error:
        check.add("error", "unusable file", str(error))
        return check.report
    try:
        categories = person_categories(tree.get("categories"), skeleton, path)
    except DataError as error:
        check.add("error", "keypoint names", str(error))
        categories = None
    check.images(tree["images"])
    check.annotations(tree["annotations"], categories)
    check.pictures(Path(images), read_pictures, progress)
    check.left_and_right()
    return check.report


class _Check:
    def __init__(self, path: Path, skeleton: Skeleton) -> None:
        self.path = path
        self.skeleton = skeleton
        self.report = CheckReport(annotations=str(path))
        self.files: dict[Any, str] = {}
        self.sizes: dict[Any, tuple[float, float]] = {}
        self.persons: list[tuple[Any, np.ndarray]] = []

    def add(
        self,
        severity: Literal["error", "warning"],
        kind: str,
        text: str,
        *,
        file: str | None = None,
        annotation: Any = None,
    ) -> None:
        self.report.problems.append(
            Problem(severity, kind, file or str(self.path), annotation, text)
        )

    def images(self, entries: list[dict[str, Any]]) -> None:
        names: Counter[str] = Counter()
        for number, entry in enumerate(entries, 1):
            image_id, name = entry.get("id"), entry.get("file_name")
            if not isinstance(image_id, int) or not isinstance(name, str):
                self.add("error", "image entry", f"image number {number} has no id or file_name")
                continue
            if image_id in self.files:
                self.add("error", "duplicate image id", f"image id {image_id} is there twice")
            self.files[image_id] = name
            names[name] += 1
            wh = entry.get("width"), entry.get("height")
            if all(isinstance(side, int | float) and side > 0 for side in wh):
                self.sizes[image_id] = entry["width"], entry["height"]
            else:
                self.add("error", "image entry", f"image {image_id} has no width and height")
        for name, count in names.items():
            if count > 1:
                self.add("warning", "picture listed twice", f"{name} is {count} images", file=name)
        self.report.counts["pictures listed"] = len(entries)

    def annotations(self, entries: list[dict[str, Any]], categories: set[int] | None) -> None:
        seen: set[Any] = set()
        counts: Counter[str] = Counter()
        for number, entry in enumerate(entries, 1):
            if categories is not None and entry.get("category_id") not in categories:
                counts["annotations of another category"] += 1
                continue
            identity = entry.get("id")
            if not isinstance(identity, int):
                self.add("error", "annotation entry", f"annotation number {number} has no id")
                continue
            if identity in seen:
                text = f"annotation id {identity} is there twice"
                self.add("error", "duplicate annotation id", text, annotation=identity)
            seen.add(identity)
            if entry.get("image_id") not in self.files:
                text = f"annotation {identity}: image {entry.get('image_id')!r} is not listed"
                self.add("error", "unknown image id", text, annotation=identity)
            counts[self.person(identity, entry)] += 1
        with_person = {entry.get("image_id") for entry in entries}
        self.report.counts["pictures without any annotation"] = len(self.files.keys() - with_person)
        self.report.counts["annotations"] = len(entries)
        self.report.counts.update(sorted(counts.items()))

    def person(self, identity: int, entry: dict[str, Any]) -> str:
        """What the annotation counts as."""
        if entry.get("iscrowd"):
            return "crowd regions"
        label = f"annotation {identity}"
        values = entry.get("keypoints")
        if not isinstance(values, list):
            text = f"{label} has no keypoints; is this an instances file?"
            self.add("error", "keypoint count", text, annotation=identity)
            return "unusable annotations"
        if len(values) != 3 * self.skeleton.num_keypoints:
            text = f"{label}: {keypoint_count_error(len(values), self.skeleton)}"
            self.add("error", "keypoint count", text, annotation=identity)
            return "unusable annotations"
        if not _finite(values) or any(value not in (0, 1, 2) for value in values[2::3]):
            text = f"{label}: x and y must be numbers and visibility 0, 1 or 2, got {values}"
            self.add("error", "keypoint values", text, annotation=identity)
            return "unusable annotations"
        keypoints = np.asarray(values, dtype=np.float64).reshape(-1, 3)
        self.fields(identity, entry, int((keypoints[:, 2] > 0).sum()))
        if not (keypoints[:, 2] > 0).any():
            return "persons without an annotated keypoint"
        self.places(identity, entry, keypoints)
        self.persons.append((identity, keypoints))
        return "persons with keypoints"

    def fields(self, identity: int, entry: dict[str, Any], annotated: int) -> None:
        missing = [key for key in ("area", "iscrowd", "num_keypoints") if key not in entry]
        if missing:
            text = f"annotation {identity} lacks {', '.join(missing)}, which OKS evaluation uses"
            self.add("warning", "missing field", text, annotation=identity)
        elif entry["num_keypoints"] != annotated:
            text = (
                f"annotation {identity}: num_keypoints is {entry['num_keypoints']}, "
                f"but {annotated} are annotated"
            )
            self.add("warning", "num_keypoints", text, annotation=identity)

    def places(self, identity: int, entry: dict[str, Any], keypoints: np.ndarray) -> None:
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not _finite(box):
            text = f"annotation {identity}: bbox must be x, y, w, h, got {box!r}"
            self.add("error", "box", text, annotation=identity)
            box = None
        size = self.sizes.get(entry.get("image_id"))
        if size is None:
            return
        if box is not None:
            clipped = clip_box(np.asarray([box], dtype=np.float64), np.asarray([size]))[0]
            if (clipped[2:] <= 0).any():
                text = f"annotation {identity}: bbox {box} is empty in a picture of {size[0]:g} x "
                text += f"{size[1]:g}"
                self.add("warning", "empty box", text, annotation=identity)
        shown = keypoints[:, 2] > 0
        places = keypoints[:, :2]
        outside = shown & ((places < 0) | (places > np.asarray(size))).any(axis=1)
        for kind, rows in (
            ("keypoint outside the picture", outside),
            ("annotated at (0, 0)", shown & (places == 0).all(axis=1)),
        ):
            for row in np.flatnonzero(rows):
                x, y = places[row]
                text = f"annotation {identity}: {self.skeleton.keypoints[row]} at ({x:g}, {y:g})"
                text += f" in a picture of {size[0]:g} x {size[1]:g}"
                self.add("warning", kind, text, annotation=identity)

    def pictures(
        self, folder: Path, decode: bool, progress: Callable[[int, int], None] | None
    ) -> None:
        if not folder.is_dir():
            text = f"{folder}: no such folder of pictures"
            self.add("error", "missing folder", text, file=str(folder))
            return
        looks = _look_at_all([folder / name for name in self.files.values()], decode)
        for done, (image_id, (file, wh, damage)) in enumerate(
            zip(self.files, looks, strict=True), 1
        ):
            size = self.sizes.get(image_id)
            if damage:
                self.add("error", "unreadable picture", damage, file=file)
            elif wh is not None and size is not None and wh != size:
                text = (
                    f"{file}: {wh[0]} x {wh[1]} pixels, the annotations say {size[0]} x {size[1]}"
                )
                self.add("error", "picture size", text, file=file)
            if progress is not None:
                progress(done, len(self.files))
        if decode:
            self.report.counts["pictures read"] = len(self.files)

    def left_and_right(self) -> None:
        if not self.persons:
            return
        values = np.stack([keypoints for _, keypoints in self.persons])
        sides = check_sides(values[..., :2], values[..., 2] > 0, self.skeleton)
        self.report.sides = sides
        self.report.suspects = [self.persons[row][0] for row in np.flatnonzero(sides.opposed)]
        for rate in (sides.persons, *sides.couples):
            if rate.suspicious:
                first = ", ".join(map(str, self.report.suspects[:10]))
                self.add(
                    "warning",
                    "left and right exchanged",
                    f"{rate.label} point in opposite directions in {rate.opposed} of "
                    f"{rate.measured} persons ({rate.rate:.1%}; up to {USUAL_RATE:.0%} is usual); "
                    f"look at annotations {first}",
                )


def _finite(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _look_at_all(
    files: list[Path], decode: bool
) -> Iterable[tuple[str, tuple[int, int] | None, str | None]]:
    if not decode:
        for file in files:
            yield str(file), None, None if file.is_file() else f"{file}: no such picture"
        return
    # OpenCV decodes outside the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(_look_at, files)


def _look_at(file: Path) -> tuple[str, tuple[int, int] | None, str | None]:
    try:
        image = read_image(file)
    except DataError as error:
        return str(file), None, str(error)
    return str(file), (image.shape[1], image.shape[0]), None
