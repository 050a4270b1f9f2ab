"""Files for the test servers: COCO's keypoint results, and MPII's struct of predictions."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from posefabric.data.mpii_files import MpiiRect, read_mpii_file
from posefabric.evaluate.oks import coco_results, write_coco_results
from posefabric.run import write_atomic
from posefabric.structures import PersonDataset, PosefabricError, Predictions

COCO_OPTIONS = ("nms_threshold", "nms_area", "box_padding", "score_threshold", "sigmas")


def check_submission(dataset: PersonDataset, path: str | os.PathLike[str]) -> None:
    """PosefabricError when the data set has no test server that takes such a file.

    ``.json`` is for persons of COCO files, ``.mat`` for those of MPII files.
    """
    suffix = Path(path).suffix.lower()
    mpii = dataset.source_path is not None
    if suffix not in (".json", ".mat") or mpii != (suffix == ".mat"):
        raise PosefabricError(
            f"{path}: expected a file that ends in {'.mat' if mpii else '.json'}: {dataset.name} "
            f"is {'MPII' if mpii else 'COCO'} data"
        )


def write_submission(
    dataset: PersonDataset,
    predictions: Predictions,
    path: str | os.PathLike[str],
    **options: Any,
) -> dict[str, Any]:
    """Write predictions as the data set's test server takes them; returns what to say of it.

    COCO: a list of {image_id, category_id, keypoints (x, y, score, ...), score}, rescored and
    after OKS-NMS; ``options`` as in coco_results. MPII: see mpii_struct.

    Raises PosefabricError for another kind of file, or when it cannot be written.
    """
    check_submission(dataset, path)
    if dataset.source_path is None:
        results = coco_results(dataset, predictions, **options)
        write_coco_results(results, Path(path))
        return {"persons": len(results), "of": len(dataset.persons)}
    content = BytesIO()
    savemat(content, {"pred": mpii_struct(dataset, predictions)}, oned_as="row")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, content.getvalue())
    return {"persons": len(predictions.index), "of": len(dataset.persons)}


def mpii_struct(dataset: PersonDataset, predictions: Predictions) -> np.ndarray:
    """The struct array ``pred`` (1, pictures) that MPII's evaluation takes.

    ``pred(i).annorect(r).annopoints.point(k)`` has x, y in 1-based picture pixels and the joint's
    0-based id. Of a .mat, ``pred`` holds the same pictures as ``RELEASE.annolist`` has of the
    data set's part (for test: img_train == 0), all in its order, and each picture every person
    in its place, with objpos and scale kept; persons without a prediction have no points.
    """
    assert dataset.source_path is not None
    pictures = read_mpii_file(dataset.source_path)
    points = {
        (dataset.persons[row].image_id, dataset.persons[row].annotation_id): keypoints
        for row, keypoints in zip(predictions.index, predictions.keypoints, strict=True)
    }
    part = pictures[dataset.persons[0].image_id - 1].train
    return struct_array(
        [
            {
                "image": {"name": picture.name},
                "annorect": struct_array(
                    [_rect(rect, points.get((place, rect.number))) for rect in picture.rects],
                    ("scale", "objpos", "annopoints"),
                ),
            }
            for place, picture in enumerate(pictures, 1)
            if picture.train == part
        ],
        ("image", "annorect"),
    )


def struct_array(entries: list[dict[str, Any]], fields: tuple[str, ...]) -> np.ndarray:
    """(1, N) MATLAB struct array of dicts; a field that is missing or None is empty."""
    array = np.empty((1, len(entries)), dtype=[(name, object) for name in fields])
    for column, entry in enumerate(entries):
        for name in fields:
            value = entry.get(name)
            array[name][0, column] = np.zeros((0, 0)) if value is None else value
    return array


def _rect(rect: MpiiRect, keypoints: np.ndarray | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"scale": rect.scale}
    if rect.centre is not None:
        entry["objpos"] = {"x": float(rect.centre[0]), "y": float(rect.centre[1])}
    if keypoints is not None:
        points = [
            {"x": float(x) + 1.0, "y": float(y) + 1.0, "id": float(joint)}
            for joint, (x, y) in enumerate(keypoints)
        ]
        entry["annopoints"] = {"point": struct_array(points, ("x", "y", "id"))}
    return entry
