"""The COCO ground truth of a data set: its annotation file, or made from its persons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from posefabric.data.coco_json import load_coco_tree, person_categories
from posefabric.structures import DataError, Person, PersonDataset


def read_ground_truth(dataset: PersonDataset) -> dict[str, Any]:
    """The annotation file, or the same made from the annotated persons of a data set without one.

    Raises DataError when the file cannot be read, and when there is neither.
    """
    if dataset.annotations_path is not None:
        tree = load_coco_tree(dataset.annotations_path, annotated=dataset.ground_truth)
        ids = sorted({annotation.get("category_id", 1) for annotation in tree["annotations"]})
        tree.setdefault("categories", [{"id": number, "name": "person"} for number in ids])
        return tree
    truth = [person for person in dataset.persons if person.annotation_id >= 0]
    if not truth:
        raise DataError(
            f"data set {dataset.name}: OKS needs ground truth, but it has neither an annotation "
            "file nor annotated persons"
        )
    names = list(dataset.skeleton.keypoints)
    return {
        "images": [{"id": int(i)} for i in sorted({p.image_id for p in dataset.persons})],
        "categories": [{"id": 1, "name": "person", "keypoints": names}],
        "annotations": [_annotation(person, number) for number, person in enumerate(truth, 1)],
    }


def keypoint_categories(ground_truth: dict[str, Any], dataset: PersonDataset) -> list[int]:
    """Ids of the categories with this skeleton's keypoints, the reader's choice.

    Raises DataError when no category has them.
    """
    origin = dataset.annotations_path or dataset.name
    known = ground_truth["categories"]
    chosen = person_categories(known, dataset.skeleton, origin)
    if chosen is None:
        chosen = {category["id"] for category in known}
    return sorted(int(category) for category in chosen)


def category_ids(
    ground_truth: dict[str, Any], dataset: PersonDataset, persons: Sequence[Person]
) -> list[int]:
    """The category id of each person: that of its annotation, or the file's only one.

    Raises DataError for a detection when the file has several keypoint categories, and for an
    annotation the file does not have.
    """
    categories = keypoint_categories(ground_truth, dataset)
    if len(categories) == 1:
        return categories * len(persons)
    by_annotation = {int(a["id"]): int(a["category_id"]) for a in ground_truth["annotations"]}
    for person in persons:
        if person.annotation_id not in by_annotation:
            raise DataError(
                f"{dataset.annotations_path}: {len(categories)} categories have keypoints, and "
                f"annotation {person.annotation_id} (image {person.image_id}) tells none; use "
                "ground-truth boxes or a file with one category"
            )
    return [by_annotation[person.annotation_id] for person in persons]


def complete(ground_truth: dict[str, Any], dataset: PersonDataset) -> dict[str, int]:
    """Add in place what the evaluation reads and a file may lack; returns how often each was.

    ``area`` becomes the box's, ``num_keypoints`` the count of annotated ones. Raises DataError
    for an annotation with another number of keypoints than the skeleton has.
    """
    filled: Counter[str] = Counter()
    wanted = 3 * dataset.skeleton.num_keypoints
    categories = keypoint_categories(ground_truth, dataset)
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        label = annotation.get("id")
        # The evaluator takes an annotation id of 0 for "unmatched".
        annotation["id"] = number
        if annotation.setdefault("category_id", categories[0]) not in categories:
            continue
        keypoints = annotation.setdefault("keypoints", [0] * wanted)
        if len(keypoints) != wanted:
            raise DataError(
                f"{dataset.annotations_path}: annotation {label} has {len(keypoints)} keypoint "
                f"values, skeleton {dataset.skeleton.name} expects {wanted}; choose the skeleton "
                "of the file"
            )
        if "area" not in annotation:
            filled["area"] += 1
            annotation["area"] = float(annotation["bbox"][2] * annotation["bbox"][3])
        if "num_keypoints" not in annotation:
            filled["num_keypoints"] += 1
            annotation["num_keypoints"] = sum(value > 0 for value in keypoints[2::3])
        annotation.setdefault("iscrowd", 0)
    return dict(filled)


def evaluated_images(
    dataset: PersonDataset, in_file: set[int], image_ids: Sequence[int] | None
) -> set[int]:
    """The images that count, by the rule of :func:`posefabric.evaluate.oks.oks_evaluate`.

    Raises DataError for an image the ground truth does not have.
    """
    if image_ids is not None:
        chosen = {int(image_id) for image_id in image_ids}
    elif any(person.annotation_id < 0 for person in dataset.persons):
        chosen = in_file
    else:
        chosen = {int(person.image_id) for person in dataset.persons}
    strangers = sorted(chosen - in_file)
    if strangers:
        raise DataError(
            f"{dataset.annotations_path}: image {strangers[0]} is not in this file "
            f"({len(strangers)} such images); evaluate against the annotations of data set "
            f"{dataset.name}"
        )
    return chosen


def _annotation(person: Person, number: int) -> dict[str, Any]:
    box = [float(value) for value in person.box_xywh]
    triples = np.column_stack([person.keypoints, person.visibility]).ravel()
    return {
        "id": number,
        "image_id": int(person.image_id),
        "category_id": 1,
        "bbox": box,
        "area": float(person.area) or box[2] * box[3],
        "iscrowd": int(person.is_crowd),
        "keypoints": [float(value) for value in triples],
        "num_keypoints": int((person.visibility > 0).sum()),
    }
