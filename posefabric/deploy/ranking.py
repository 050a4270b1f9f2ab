"""Which persons a network gets right and wrong, to choose pictures for a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posefabric.structures import Person, PersonDataset, Predictions

if TYPE_CHECKING:
    from posefabric.skeletons import Skeleton


@dataclass(frozen=True)
class PersonError:
    """How far one person's joints are off.

    Attributes:
        mean: mean distance over the annotated joints, in units of sqrt(box width x height);
            NaN without annotated joints.
        annotated: how many joints are annotated.
        correct: how many of them are within 0.2 torsos; None where the torso is not annotated.
    """

    mean: float
    annotated: int
    correct: int | None

    def caption(self) -> str:
        if not self.annotated:
            return "not annotated"
        right = "" if self.correct is None else f"  {self.correct}/{self.annotated}"
        return f"err {self.mean:.3f}{right}"


def person_error(person: Person, keypoints: np.ndarray, skeleton: Skeleton) -> PersonError:
    """The errors of predicted ``keypoints`` (K, 2), image pixels, against the annotation."""
    annotated = person.visibility > 0
    count = int(annotated.sum())
    if not count:
        return PersonError(mean=float("nan"), annotated=0, correct=None)
    distances = np.linalg.norm(keypoints - person.keypoints, axis=1)[annotated]
    unit = float(np.sqrt(max(person.box_xywh[2] * person.box_xywh[3], 1.0)))
    correct = None
    if skeleton.torso is not None and annotated[list(skeleton.torso)].all():
        shoulder, hip = skeleton.torso
        torso = float(np.linalg.norm(person.keypoints[shoulder] - person.keypoints[hip]))
        correct = int((distances <= 0.2 * torso).sum())
    return PersonError(mean=float(distances.mean()) / unit, annotated=count, correct=correct)


def rank_rows(dataset: PersonDataset, predictions: Predictions, *, annotated: int = 6) -> list[int]:
    """Rows of ``dataset.persons`` from the best predicted to the worst, by mean error.

    Persons with fewer than ``annotated`` annotated joints are left out: their mean says little.
    """
    errors = []
    for row, keypoints in zip(predictions.index, predictions.keypoints, strict=True):
        error = person_error(dataset.persons[int(row)], keypoints, dataset.skeleton)
        if error.annotated >= max(annotated, 1) and np.isfinite(error.mean):
            errors.append((error.mean, int(row)))
    return [row for _, row in sorted(errors)]
