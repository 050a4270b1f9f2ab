"""Everything that can be measured about predictions, as one dict and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from posefabric.evaluate.oks import METRICS, oks_evaluate
from posefabric.evaluate.pck import mpii_pckh, pck
from posefabric.skeletons import load_skeleton
from posefabric.structures import PersonDataset, PosefabricError, Predictions


def evaluate_predictions(
    dataset: PersonDataset,
    predictions: Predictions,
    *,
    input_wh: tuple[int, int] | None = None,
    parts: Mapping[str, Sequence[int]] | None = None,
    headboxes: np.ndarray | None = None,
    pck_threshold: float | None = None,
    sigmas: np.ndarray | None = None,
    nms_threshold: float | None = 0.9,
    score_threshold: float = 0.2,
    image_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Everything that can be measured about predictions, JSON-serialisable.

    PCK is over the predicted persons; AP and AR are over the ground truth, in which persons
    without a prediction (unreadable pictures) are misses.

    Args:
        parts: keypoint indices by part name, for the table of parts.
        headboxes: (len(dataset), 2, 2) head boxes in image pixels, for PCKh of MPII.
        pck_threshold: fraction of the torso or box; none: 0.2 or 0.05.
        input_wh, sigmas, nms_threshold, score_threshold, image_ids: as in oks_evaluate.

    Returns:
        ``data``, ``skeleton``, ``persons``, ``predicted``, ``skipped`` (by the reader, and why),
        ``box_source``, ``sigmas_source``, and ``pck``, ``pckh``, ``oks``: the results of pck,
        mpii_pckh and oks_evaluate, None where the data set has no ground truth (or, for
        ``pckh``, no head boxes came).

    Raises:
        PosefabricError: something does not fit; DataError: the annotation file cannot be read.
    """
    result: dict[str, Any] = {
        "data": dataset.name,
        "skeleton": dataset.skeleton.name,
        "persons": len(dataset.persons),
        "predicted": len(predictions.index),
        "skipped": dict(dataset.skipped),
        "box_source": dataset.box_source,
        "sigmas_source": dataset.skeleton.sigmas_source if sigmas is None else "given",
        "pck": None,
        "pckh": None,
        "oks": None,
    }
    persons = [dataset.persons[row] for row in predictions.index]
    annotated = any(person.annotation_id >= 0 for person in dataset.persons)
    if annotated and persons:
        joints = np.stack([person.keypoints for person in persons])
        visible = np.stack([person.visibility for person in persons])
        result["pck"] = pck(
            predictions.keypoints,
            joints,
            visible,
            dataset.skeleton,
            boxes_xywh=np.stack([person.box_xywh for person in persons]),
            threshold=pck_threshold,
            parts=parts,
        )
        if headboxes is not None:
            _check_mpii(dataset, headboxes)
            chosen = np.asarray(headboxes)[predictions.index]
            result["pckh"] = mpii_pckh(predictions.keypoints, joints, visible, chosen, legacy=True)
    if annotated or dataset.annotations_path is not None:
        result["oks"] = oks_evaluate(
            dataset,
            predictions,
            input_wh=input_wh,
            nms_threshold=nms_threshold,
            score_threshold=score_threshold,
            sigmas=sigmas,
            image_ids=image_ids,
        )
    return result


def table(result: Mapping[str, Any]) -> Table:
    """A result of evaluate_predictions or evaluate_network, to print with rich.

    Rows: the measures of the whole, then PCK a part and a joint, with the counts behind them.
    All values in percent.
    """
    persons = f"{result['predicted']} of {result['persons']} persons"
    facts = [persons, f"boxes: {result['box_source']}"]
    if "flip" in result:
        facts.append(f"flip test: {'yes' if result['flip'] else 'no'}")
    if "preset" in result:
        facts.append(f"{result['preset']}, {result['precision']}")
    scores = result["pck"] or {}
    if scores:
        facts.append(f"PCK by {scores['normaliser']}, {scores['left_out']} persons left out")
    if result["oks"]:
        facts.append(f"OKS sigmas: {result['sigmas_source']}")
    made = Table(
        title=f"{result['data']} ({result['skeleton']})",
        caption="\n".join(facts),
        caption_justify="left",
        min_width=60,
    )
    made.add_column("what")
    made.add_column("value, %", justify="right")
    made.add_column("count", justify="right")
    if scores:
        label = f"PCK@{scores['threshold']:g}"
        made.add_row(label, _cell(scores["PCK"]), str(scores["joints"]))
        if scores["limbs"] is not None:
            made.add_row(f"{label}, limbs", _cell(scores["limbs"]), str(scores["limb_joints"]))
    for name, value in (result["pckh"] or {}).items():
        made.add_row(f"PCKh {name}", "-" if value is None else f"{value:.2f}", "")
    for name in METRICS if result["oks"] else ():
        value = result["oks"][name]
        made.add_row(name, _cell(value if value >= 0 else None), "")
    for kind in ("per_part", "per_joint"):
        made.add_section()
        for name, row in scores.get(kind, {}).items():
            made.add_row(name, _cell(row["value"]), str(row["count"]))
    return made


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _check_mpii(dataset: PersonDataset, headboxes: np.ndarray) -> None:
    if dataset.skeleton.keypoints != load_skeleton("mpii16").keypoints:
        raise PosefabricError(
            f"headboxes: PCKh is for the joints of skeleton mpii16, the data set has "
            f"{dataset.skeleton.name}; leave the head boxes out"
        )
    if len(headboxes) != len(dataset.persons):
        raise PosefabricError(
            f"headboxes: expected one for each of the {len(dataset.persons)} persons of "
            f"{dataset.name}, got {len(headboxes)}"
        )
