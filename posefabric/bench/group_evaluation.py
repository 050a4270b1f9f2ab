"""Rows of evaluation: a data set through a network, and OKS against pycocotools."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from posefabric.bench.context import Bench
from posefabric.bench.fresh import Gate, answer_turns, once
from posefabric.bench.group_loader import MADE
from posefabric.bench.inference import evaluation_rounds
from posefabric.bench.released import BASELINE
from posefabric.bench.rows import Line, Missing, Row, speed_row
from posefabric.bench.subjects import Subject
from posefabric.bench.timing import Rounds, interleaved, stopwatch
from posefabric.evaluate.ground_truth import read_ground_truth
from posefabric.evaluate.oks import METRICS, coco_results, oks_evaluate
from posefabric.skeletons import load_skeleton
from posefabric.structures import Person, PersonDataset, PosefabricError, Predictions

PERSONS_IN_PICTURE = 2


def images(bench: Bench) -> Iterator[Line]:
    """Persons read, cropped, predicted with the flip test, and decoded."""
    for subject in bench.subjects:
        name = f"evaluation.images.{subject.name}"
        late = bench.too_late(name)
        yield late or bench.attempt(name, functools.partial(_images_row, bench, subject, name))


def _images_row(bench: Bench, subject: Subject, name: str) -> Row:
    root = bench.pictures(subject.config().data.skeleton)
    batch = subject.images(quick=bench.quick)
    found = once(
        evaluation_rounds,
        config=subject.config(f"data.root={root}", *MADE),
        persons=bench.effort.evaluated[0],
        batch=batch,
        plan=bench.within(bench.effort.evaluations),
    )
    return speed_row(
        name,
        ours=found["took"]["ours"],
        theirs=found["took"]["theirs"],
        count=found["persons"],
        baseline=BASELINE,
        conditions={"batch": batch, "persons": found["persons"], "flip_test": True},
    )


def oks(bench: Bench) -> Iterator[Line]:
    """AP and AR of the same predictions by this package and by pycocotools, results to numbers."""
    name = "evaluation.oks"
    late = bench.too_late(name)
    if late is None and importlib.util.find_spec("pycocotools") is None:
        late = Missing(name, "pycocotools is not installed")
    if late is not None:
        yield late
        return
    persons = bench.effort.evaluated[1]
    took = once(oks_rounds, persons=persons, plan=bench.within(bench.effort.evaluations))
    yield speed_row(
        name,
        ours=took["ours"],
        theirs=took["theirs"],
        count=persons,
        baseline="pycocotools, equal numbers",
        what="persons/s",
        per="person",
        conditions={"persons": persons},
    )


def oks_rounds(gate: Gate, *, persons: int, plan: Rounds) -> None:
    """At a turn: seconds of either evaluation by round, after their numbers were found equal."""
    dataset, predictions = crowd(persons)
    arms = {
        "ours": lambda: _numbers(oks_evaluate(dataset, predictions, nms_threshold=None)),
        "theirs": lambda: by_pycocotools(dataset, predictions),
    }
    check_equal(arms["ours"](), arms["theirs"]())
    timed: dict[str, Callable[[], float]] = {name: stopwatch(arm) for name, arm in arms.items()}
    answer_turns(gate, lambda: interleaved(timed, plan))


def check_equal(ours: list[float], theirs: list[float]) -> None:
    """PosefabricError when two lists of AP and AR differ: then no speed is worth telling."""
    for name, own, other in zip(METRICS, ours, theirs, strict=True):
        if not math.isclose(own, other, rel_tol=0, abs_tol=1e-9):
            raise PosefabricError(f"{name} is {own} here and {other} by pycocotools")


def by_pycocotools(dataset: PersonDataset, predictions: Predictions) -> list[float]:
    """The ten numbers of the COCO keypoint protocol, by its own code."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = {**read_ground_truth(dataset), "info": {}}
        truth.createIndex()
        found = truth.loadRes(coco_results(dataset, predictions, nms_threshold=None))
        evaluation = COCOeval(truth, found, "keypoints")
        evaluation.params.kpt_oks_sigmas = np.asarray(dataset.skeleton.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def crowd(count: int) -> tuple[PersonDataset, Predictions]:
    """Annotated persons without pictures, two a picture, and noisy predictions of them."""
    rng = np.random.default_rng(0)
    skeleton = load_skeleton("coco17")
    joints = skeleton.num_keypoints
    persons = []
    for number in range(count):
        corner, size = rng.uniform(0, 200, 2), rng.uniform(60, 200, 2)
        persons.append(
            Person(
                image_id=1 + number // PERSONS_IN_PICTURE,
                annotation_id=1 + number,
                file="made",
                box_xywh=np.concatenate([corner, size]).astype(np.float32),
                keypoints=(corner + rng.uniform(0, 1, (joints, 2)) * size).astype(np.float32),
                visibility=rng.choice([0, 1, 2], joints, p=[0.2, 0.2, 0.6]).astype(np.uint8),
                area=float(0.6 * size.prod()),
            )
        )
    dataset = PersonDataset(name="made", skeleton=skeleton, persons=persons, read_image=_no_picture)
    truth = np.stack([person.keypoints for person in persons])
    noise = rng.normal(0, 6, truth.shape) * rng.uniform(0, 2, (count, 1, 1))
    return dataset, Predictions(
        keypoints=(truth + noise).astype(np.float32),
        scores=rng.uniform(0.1, 1, (count, joints)).astype(np.float32),
        index=np.arange(count),
    )


def _no_picture(person: Person) -> np.ndarray:
    raise PosefabricError(f"{person.file}: has no picture")


def _numbers(result: dict[str, Any]) -> list[float]:
    return [float(result[name]) for name in METRICS]
