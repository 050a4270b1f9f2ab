"""From picture files to COCO results and overlays, with either predictor."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from posefabric.data.image import read_image
from posefabric.deploy.box_file import BoxFile, PictureBoxes, read_boxes
from posefabric.deploy.draw import draw_people, save_png
from posefabric.deploy.persons import Boxes, Pictures, PosePrediction
from posefabric.evaluate.similarity import rescored
from posefabric.run import write_atomic
from posefabric.skeletons import Skeleton
from posefabric.structures import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
WHOLE_PICTURE = "whole picture"

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


class Estimator(Protocol):
    """What PoseEstimator and OnnxPoseEstimator have in common."""

    @property
    def source(self) -> str: ...

    @property
    def skeleton(self) -> Skeleton: ...

    @property
    def batch_size(self) -> int: ...

    def predict(
        self, images: Pictures, boxes: Boxes = None, flip: bool = False
    ) -> list[PosePrediction]: ...


@dataclass
class _Job:
    """One readable picture on its way."""

    path: Path
    image: np.ndarray
    image_id: int | str
    boxes: np.ndarray | None
    box_scores: np.ndarray


@dataclass
class _Output:
    folder: Path
    overlays: bool
    threshold: float
    category_id: int
    results: list[dict[str, Any]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(
        default_factory=lambda: dict(
            pictures=0, persons=0, whole_pictures=0, without_persons=0, overlays=0
        )
    )


def predict_files(
    estimator: Estimator,
    inputs: PathLike | Sequence[PathLike],
    out_dir: PathLike,
    *,
    boxes_json: PathLike | None = None,
    box_score_threshold: float = 0.0,
    overlays: bool = True,
    threshold: float = 0.2,
    flip: bool = False,
    category_id: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Predict picture files; write ``predictions.json`` and ``overlays/NAME.png`` to a folder.

    predictions.json is in the COCO results format: image_id, category_id, keypoints (x, y,
    score, ...) in picture pixels, score (the box's times the mean of the keypoint scores above
    0.2); and further file_name, bbox and box_source. Image ids are those of the boxes file, else
    the numbers in the file names where all have one, else 1, 2, 3, ... in order. Pictures that
    the boxes file does not mention are predicted as one whole-picture box each; those it lists
    without a person have none. Pictures that cannot be read are counted and left out; what is
    finished is written also when something ends the run.

    Args:
        inputs: files, folders (their pictures, without subfolders) and glob patterns (``**``
            for subfolders).
        boxes_json: COCO detections or annotations (see :func:`read_boxes`).
        box_score_threshold: detections below it are left out.
        threshold: keypoints with a lower score are drawn faint, below half of it not at all.
        flip: average with the mirrored input.
        category_id: written to the results; and the category of the boxes that are used.
        progress: called with the pictures done and their total.

    Returns:
        Counts (pictures, persons, whole_pictures, without_persons, overlays), unreadable (file to
        reason), boxes_left_out (reason to count), image_ids, boxes, source, predictions (path).

    Raises DataError when nothing matches an input, or no picture is in the boxes file.
    """
    files = collect_pictures(inputs)
    box_file = None
    if boxes_json is not None:
        box_file = read_boxes(
            boxes_json, category_id=category_id, score_threshold=box_score_threshold
        )
    found = _match(files, box_file)
    ids, id_rule = _image_ids(files, found, box_file)
    out = _Output(Path(out_dir), overlays, threshold, category_id)
    unreadable: dict[str, str] = {}
    waiting: list[_Job] = []
    # Persons are batched over pictures, but few pictures are held at a time.
    together = max(1, min(8, estimator.batch_size))
    try:
        for done, (path, own, image_id) in enumerate(zip(files, found, ids, strict=True), 1):
            try:
                waiting.append(_read_job(path, own, image_id))
            except DataError as error:
                unreadable[str(path)] = str(error)
                logger.warning("left out: %s", error)
            if waiting and (len(waiting) == together or done == len(files)):
                unreadable.update(_predict(estimator, waiting, out, flip))
                waiting.clear()
            if progress is not None:
                progress(done, len(files))
    finally:
        target = out.folder / "predictions.json"
        write_atomic(target, json.dumps(out.results, allow_nan=False).encode())
    return {
        **out.counts,
        "unreadable": unreadable,
        "boxes_left_out": dict(box_file.left_out) if box_file else {},
        "image_ids": id_rule,
        "boxes": _box_note(boxes_json, out.counts),
        "source": estimator.source,
        "predictions": str(target),
    }


def collect_pictures(inputs: PathLike | Iterable[PathLike]) -> list[Path]:
    """The picture files of files, folders and glob patterns; each input sorted, none twice.

    A file that is named is taken whatever its suffix; folders and patterns give those that end
    in jpg, jpeg, png, webp or bmp. Raises DataError for an input without any picture.
    """
    entries = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if not entries:
        raise DataError("no input: expected picture files, folders or glob patterns")
    found: dict[Path, Path] = {}
    for entry in entries:
        for path in _pictures_of(os.fspath(entry)):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _pictures_of(entry: str) -> list[Path]:
    kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
    place = Path(entry)
    if place.is_file():
        return [place]
    if place.is_dir():
        pictures = sorted(path for path in place.iterdir() if _is_picture(path))
        if not pictures:
            deeper = any(_is_picture(path) for path in place.rglob("*"))
            hint = f"; its subfolders have some: use '{place}/**/*'" if deeper else ""
            raise DataError(f"{entry}: no picture ({kinds}) in this folder{hint}")
        return pictures
    if not glob.has_magic(entry):
        raise DataError(f"{entry}: no such file or folder")
    matches = sorted(Path(match) for match in glob.glob(entry, recursive=True))  # noqa: PTH207
    pictures = [path for path in matches if _is_picture(path)]
    if not pictures:
        came = f"matches {len(matches)} entries, none a picture" if matches else "matches nothing"
        raise DataError(f"{entry}: the pattern {came} ({kinds})")
    return pictures


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _match(files: list[Path], box_file: BoxFile | None) -> list[PictureBoxes | None]:
    if box_file is None:
        return [None] * len(files)
    found = [box_file.find(path) for path in files]
    if not any(found):
        known = [*box_file.by_name, *box_file.by_id][:3]
        raise DataError(
            f"{box_file.path}: mentions none of the {len(files)} pictures ({files[0].name}, ...); "
            f"it has {', '.join(known)}, ...; file names, or numbers in them, must agree"
        )
    return found


def _image_ids(
    files: list[Path], found: list[PictureBoxes | None], box_file: BoxFile | None
) -> tuple[list[int | str], str]:
    """Every picture's id, and where the ids come from, in words."""
    given = [own.image_id if own is not None else None for own in found]
    taken = {value for value in given if value is not None}
    stems = [path.stem for path in files]
    rest = [stem for stem, value in zip(stems, given, strict=True) if value is None]
    numbers = [int(stem) for stem in rest if stem.isascii() and stem.isdigit()]
    if len({*numbers}) == len(rest) and taken.isdisjoint(numbers):
        rule = "the numbers in the file names"
    else:
        rule = "running numbers"
        first = max((value for value in taken if isinstance(value, int)), default=0) + 1
        numbers = list(range(first, first + len(rest)))
    if box_file is not None and taken:
        rule = f"those of {box_file.path}" + (f", else {rule}" if rest else "")
    others = iter(numbers)
    return [next(others) if value is None else value for value in given], rule


def _read_job(path: Path, own: PictureBoxes | None, image_id: int | str) -> _Job:
    image = read_image(path)
    if own is None:
        return _Job(path, image, image_id, None, np.ones(1, dtype=np.float32))
    boxes, scores = own.arrays()
    return _Job(path, image, image_id, boxes, scores)


def _predict(estimator: Estimator, jobs: list[_Job], out: _Output, flip: bool) -> dict[str, str]:
    """Predict and write some pictures; those that cannot be predicted, with the reasons."""
    images, boxes = [job.image for job in jobs], [job.boxes for job in jobs]
    try:
        predictions = estimator.predict(images, boxes, flip=flip)
    except DataError as error:
        if len(jobs) == 1:
            logger.warning("left out: %s: %s", jobs[0].path, error)
            return {str(jobs[0].path): str(error)}
        # One bad picture must not take its neighbours along.
        refused: dict[str, str] = {}
        for job in jobs:
            refused.update(_predict(estimator, [job], out, flip))
        return refused
    for job, prediction in zip(jobs, predictions, strict=True):
        _write(job, prediction, estimator.skeleton, out)
    return {}


def _write(job: _Job, prediction: PosePrediction, skeleton: Skeleton, out: _Output) -> None:
    out.counts["pictures"] += 1
    out.counts["persons"] += len(prediction)
    out.counts["whole_pictures"] += job.boxes is None
    out.counts["without_persons"] += not len(prediction)
    for person in range(len(prediction)):
        out.results.append(_result(job, prediction, person, out.category_id))
    if out.overlays:
        picture = draw_people(
            job.image,
            prediction.keypoints,
            prediction.scores,
            skeleton,
            boxes=None if job.boxes is None else prediction.boxes,
            threshold=out.threshold,
        )
        save_png(out.folder / "overlays" / f"{_overlay_name(job.path, out.names)}.png", picture)
        out.counts["overlays"] += 1


def _result(job: _Job, prediction: PosePrediction, person: int, category: int) -> dict[str, Any]:
    scores = prediction.scores[person]
    triplets = np.concatenate([prediction.keypoints[person], scores[:, None]], axis=1)
    return {
        "image_id": job.image_id,
        "file_name": job.path.name,
        "category_id": category,
        "keypoints": [round(float(value), 4) for value in triplets.ravel()],
        "score": rescored(float(job.box_scores[person]), scores),
        "bbox": [round(float(value), 3) for value in prediction.boxes[person]],
        "box_source": WHOLE_PICTURE if job.boxes is None else "file",
    }


def _overlay_name(path: Path, taken: set[str]) -> str:
    """The picture's stem; a later picture of the same stem also gets its folder, or a number."""
    name, count = path.stem, 1
    while name.casefold() in taken:
        name = f"{path.resolve().parent.name}-{path.stem}" + (f"-{count}" if count > 1 else "")
        count += 1
    taken.add(name.casefold())
    return name


def _box_note(boxes_json: PathLike | None, counts: dict[str, int]) -> str:
    whole = counts["whole_pictures"]
    if boxes_json is None:
        return "none given: every picture as a whole is one box"
    note = f"from {os.fspath(boxes_json)}"
    return note + (f"; {whole} pictures are not in it and were taken whole" if whole else "")
