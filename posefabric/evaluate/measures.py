"""Everything that can be measured about predictions, as one dict and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from posefabric.data.conventions import BOX_PADDING
from posefabric.evaluate.oks import METRICS, NmsArea, oks_evaluate
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
    pckh_threshold: float = 0.5,
    legacy_pckh: bool = True,
    sigmas: np.ndarray | None = None,
    nms_threshold: float | None = 0.9,
    nms_area: NmsArea = "crop",
    box_padding: float = BOX_PADDING,
    score_threshold: float | None = 0.2,
    image_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Everything that can be measured about predictions, JSON-serialisable.

    PCK is over the predicted persons; AP and AR are over the ground truth, in which persons
    without a prediction (unreadable pictures) are misses.

    Args:
        parts: keypoint indices by part name, for the table of parts.
        headboxes: (len(dataset), 2, 2) head boxes in image pixels, for PCKh of MPII; none: the
            data set's. Persons whose head box is not finite are left out of PCKh, and counted.
        pck_threshold: fraction of the torso or box; none: 0.2 or 0.05.
        pckh_threshold, legacy_pckh: as in mpii_pckh.
        input_wh, sigmas, nms_threshold, nms_area, box_padding, score_threshold, image_ids: as in
            oks_evaluate.

    Returns:
        ``data``, ``skeleton``, ``persons``, ``predicted``, ``skipped`` (by the reader, and why),
        ``box_source``, ``sigmas_source``, ``ground_truth`` (whether keypoints are known), and
        ``pck``, ``pckh``, ``oks``: the results of pck, mpii_pckh (with ``threshold``, ``persons``
        and ``left_out``) and oks_evaluate, None where the data set has no ground truth (or, for
        ``pckh``, no head boxes; for ``oks``, no areas).

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
        "ground_truth": dataset.ground_truth,
    }
    persons = [dataset.persons[row] for row in predictions.index]
    headboxes = dataset.headboxes if headboxes is None else headboxes
    known = dataset.ground_truth
    annotated = known and any(person.annotation_id >= 0 for person in dataset.persons)
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
            chosen = np.asarray(headboxes, dtype=np.float64)[predictions.index]
            usable = np.isfinite(chosen).all(axis=(1, 2))
            found = (a[usable] for a in (predictions.keypoints, joints, visible, chosen))
            result["pckh"] = {
                **mpii_pckh(*found, threshold=pckh_threshold, legacy=legacy_pckh),
                "threshold": pckh_threshold,
                "persons": int(usable.sum()),
                "left_out": int((~usable).sum()),
            }
    if dataset.has_areas and (annotated or (known and dataset.annotations_path is not None)):
        result["oks"] = oks_evaluate(
            dataset,
            predictions,
            input_wh=input_wh,
            nms_threshold=nms_threshold,
            nms_area=nms_area,
            box_padding=box_padding,
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
        changed = [f"{name}={value}" for name, value in result.get("conventions", {}).items()]
        facts.append(", ".join([result["preset"], *changed, result["precision"]]))
    if not result.get("ground_truth", True):
        facts.append("the annotations have no keypoints: nothing to measure")
    scores = result["pck"] or {}
    if scores:
        facts.append(f"PCK by {scores['normaliser']}, {scores['left_out']} persons left out")
    heads = result["pckh"] or {}
    if heads:
        facts.append(f"PCKh by head size (0.6 head-box diagonals), {heads['left_out']} left out")
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
    for label, key in _pckh_rows(heads):
        made.add_row(label, "-" if heads[key] is None else f"{heads[key]:.2f}", "")
    for name in METRICS if result["oks"] else ():
        value = result["oks"][name]
        made.add_row(name, _cell(value if value >= 0 else None), "")
    for kind in ("per_part", "per_joint"):
        made.add_section()
        for name, row in scores.get(kind, {}).items():
            made.add_row(name, _cell(row["value"]), str(row["count"]))
    return made


def _pckh_rows(heads: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, key) of what to print of PCKh; nothing without."""
    if not heads:
        return []
    whole = f"PCKh@{heads['threshold']:g}"
    labels = {"Mean": whole, "Mean@0.1": "PCKh@0.1", "Mean@0.1 legacy": "PCKh@0.1 legacy (0.11)"}
    facts = ("threshold", "persons", "left_out", *labels)
    rows = [(label, key) for key, label in labels.items() if key in heads]
    return rows + [(f"PCKh {key}", key) for key in heads if key not in facts]


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
