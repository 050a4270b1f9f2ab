"""The COCO keypoint protocol: results in its format, after OKS-NMS, and their AP and AR."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from posefabric.data.crop import BOX_PADDING
from posefabric.evaluate.ground_truth import (
    category_ids,
    complete,
    evaluated_images,
    keypoint_categories,
    read_ground_truth,
)
from posefabric.evaluate.similarity import crop_area, oks_nms, rescored
from posefabric.structures import PersonDataset, PosefabricError, Predictions

NmsArea = Literal["crop", "box"]
METRICS = ("AP", "AP50", "AP75", "AP(M)", "AP(L)", "AR", "AR50", "AR75", "AR(M)", "AR(L)")


def coco_results(
    dataset: PersonDataset,
    predictions: Predictions,
    *,
    input_wh: tuple[int, int] | None = None,
    nms_threshold: float | None = 0.9,
    nms_area: NmsArea = "crop",
    box_padding: float = BOX_PADDING,
    score_threshold: float | None = 0.2,
    sigmas: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Predictions in the COCO keypoint results format, rescored and after OKS-NMS.

    Args:
        dataset, predictions: ``predictions.index`` points into ``dataset.persons``.
        input_wh: the network's input, whose shape the crop's area follows (see crop_area).
        nms_threshold: OKS above which the worse of two persons goes; none: no NMS.
        nms_area: the NMS measures OKS in the area of the padded ``crop`` or of the ``box``.
        box_padding: factor on the box's sides that makes the crop.
        score_threshold: keypoint scores above it count in the person's score (see rescored).
        sigmas: (K,) OKS constants of the NMS; none: the skeleton's.

    Returns:
        Dicts of plain Python numbers, in the order of the data set: image_id, category_id,
        keypoints (x, y, score, ...) in image pixels, score.

    Raises:
        PosefabricError: an index or shape does not fit.
        DataError: the annotation file cannot be read, or it has several keypoint categories and
        a detection tells none.
    """
    return _results(
        dataset,
        predictions,
        ground_truth=read_ground_truth(dataset),
        input_wh=input_wh,
        nms_threshold=nms_threshold,
        nms_area=nms_area,
        box_padding=box_padding,
        score_threshold=score_threshold,
        sigmas=_sigmas(dataset, sigmas),
    )


def write_coco_results(results: Sequence[dict[str, Any]], path: Path | str) -> Path:
    """Write the results of :func:`coco_results` as a COCO results file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(results), allow_nan=False), encoding="utf-8")
    return path


def oks_evaluate(
    dataset: PersonDataset,
    predictions: Predictions,
    *,
    input_wh: tuple[int, int] | None = None,
    nms_threshold: float | None = 0.9,
    nms_area: NmsArea = "crop",
    box_padding: float = BOX_PADDING,
    score_threshold: float | None = 0.2,
    sigmas: np.ndarray | None = None,
    image_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """AP and AR of the COCO keypoint protocol, for any skeleton and its sigmas.

    The ground truth is ``dataset.annotations_path``; without one it is made from the persons.
    Annotations without keypoints, and crowds, are ignored as the protocol does.

    Args:
        image_ids: the images that count. None: for detected boxes every image of the
            annotation file, so that a person nobody detected counts as missed; for ground-truth
            boxes the images of the data set, which is the same for a whole data set and right
            for a split of it.
        Others: as in :func:`coco_results`.

    Returns:
        AP, AP50, AP75, AP(M), AP(L), AR, AR50, AR75, AR(M), AR(L) (fractions; -1 where the
        ground truth has nothing, as pycocotools says it), persons, results (after NMS),
        not_finite (persons predicted with NaN or infinity: kept with score 0), images,
        images_in_file, sigmas_source, box_source, nms_threshold, nms_area, score_threshold; plain
        Python values. ``filled`` counts annotation fields the file lacks: ``area`` is then the
        box's, ``num_keypoints`` what is annotated.

    Raises:
        DataError: the annotation file cannot be read, or has no ground truth for the data set.
        PosefabricError: as :func:`coco_results`.
    """
    # COCOeval reads files and starts C++; importing the module must stay light.
    from faster_coco_eval import COCO, COCOeval_faster

    ground_truth = read_ground_truth(dataset)
    constants = _sigmas(dataset, sigmas)
    results = _results(
        dataset,
        predictions,
        ground_truth=ground_truth,
        input_wh=input_wh,
        nms_threshold=nms_threshold,
        nms_area=nms_area,
        box_padding=box_padding,
        score_threshold=score_threshold,
        sigmas=constants,
    )
    filled = complete(ground_truth, dataset)
    in_file = {int(image["id"]) for image in ground_truth["images"]}
    chosen = evaluated_images(dataset, in_file, image_ids)
    counted = [dict(result) for result in results if result["image_id"] in chosen]
    truth = COCO(ground_truth)
    evaluation = COCOeval_faster(
        truth, truth.loadRes(counted), iouType="keypoints", kpt_oks_sigmas=constants.tolist()
    )
    evaluation.params.imgIds = sorted(chosen)
    evaluation.params.catIds = keypoint_categories(ground_truth, dataset)
    evaluation.run()
    result: dict[str, Any] = {
        name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)
    }
    result.update(
        persons=len(predictions.index),
        not_finite=int((~_finite(predictions)).sum()),
        results=len(counted),
        images=len(chosen),
        images_in_file=len(in_file),
        sigmas_source="given" if sigmas is not None else dataset.skeleton.sigmas_source,
        box_source=dataset.box_source,
        nms_threshold=nms_threshold,
        nms_area=nms_area,
        score_threshold=score_threshold,
        filled=filled,
    )
    return result


def _results(
    dataset: PersonDataset,
    predictions: Predictions,
    *,
    ground_truth: dict[str, Any],
    input_wh: tuple[int, int] | None,
    nms_threshold: float | None,
    nms_area: NmsArea,
    box_padding: float,
    score_threshold: float | None,
    sigmas: np.ndarray,
) -> list[dict[str, Any]]:
    _check(dataset, predictions)
    persons = [dataset.persons[row] for row in predictions.index]
    finite = _finite(predictions)
    keypoints = np.where(finite[:, None, None], predictions.keypoints, 0.0)
    keypoint_scores = np.where(finite[:, None], predictions.scores, 0.0)
    scores = np.asarray(
        [
            rescored(person.score, row, score_threshold)
            for person, row in zip(persons, keypoint_scores, strict=True)
        ]
    )
    kept = np.arange(len(persons))
    if nms_threshold is not None:
        images = np.asarray([person.image_id for person in persons], dtype=np.int64)
        # Without padding, and in its own shape, a crop is the box.
        shape, padding = (input_wh, box_padding) if nms_area == "crop" else (None, 1.0)
        areas = np.asarray([crop_area(person.box_xywh, shape, padding) for person in persons])
        pieces = [np.zeros(0, dtype=np.int64)]
        for rows in _groups(images):
            best = oks_nms(keypoints[rows], scores[rows], areas[rows], sigmas, nms_threshold)
            pieces.append(rows[best])
        kept = np.sort(np.concatenate(pieces))
    categories = category_ids(ground_truth, dataset, persons)
    results = []
    for row in kept:
        triples = np.column_stack([keypoints[row], keypoint_scores[row]])
        results.append(
            {
                "image_id": int(persons[row].image_id),
                "category_id": categories[row],
                "keypoints": [float(value) for value in triples.ravel()],
                "score": float(scores[row]),
            }
        )
    return results


def _groups(keys: np.ndarray) -> list[np.ndarray]:
    """Rows of equal keys, each group in ascending order of rows."""
    if not len(keys):
        return []
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order])) + 1
    return np.split(order, starts)


def _sigmas(dataset: PersonDataset, sigmas: np.ndarray | None) -> np.ndarray:
    chosen = np.asarray(dataset.skeleton.sigmas if sigmas is None else sigmas, dtype=np.float64)
    if chosen.shape != (dataset.skeleton.num_keypoints,) or not np.all(chosen > 0):
        raise PosefabricError(
            f"sigmas: expected {dataset.skeleton.num_keypoints} positive numbers, one a keypoint "
            f"of skeleton {dataset.skeleton.name}, got {chosen.tolist()}"
        )
    return chosen


def _check(dataset: PersonDataset, predictions: Predictions) -> None:
    count, joints = len(predictions.index), dataset.skeleton.num_keypoints
    for name, shape in (("keypoints", (count, joints, 2)), ("scores", (count, joints))):
        came = np.shape(getattr(predictions, name))
        if came != shape:
            raise PosefabricError(f"predictions.{name}: expected shape {shape}, got {came}")
    if count and not 0 <= int(predictions.index.min()) <= int(predictions.index.max()) < len(
        dataset.persons
    ):
        raise PosefabricError(
            f"predictions.index: expected rows of the {len(dataset.persons)} persons of data set "
            f"{dataset.name}, got {predictions.index.min()} to {predictions.index.max()}"
        )


def _finite(predictions: Predictions) -> np.ndarray:
    """(N,) persons whose numbers can be used; a diverged network's count as misses, score 0."""
    values = np.concatenate([predictions.keypoints, predictions.scores[..., None]], axis=2)
    return np.asarray(np.isfinite(values).all(axis=(1, 2)))
