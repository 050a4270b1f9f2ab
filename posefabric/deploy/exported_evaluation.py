"""An exported file measured on a data set through its own runtime, by the run's options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from posefabric.config import Config
from posefabric.data.crop import invert_affine, transform_points
from posefabric.data.loaders import CropLoader
from posefabric.deploy.exported import ExportedPoseEstimator
from posefabric.evaluate.measures import evaluate_predictions
from posefabric.structures import PersonDataset, PosefabricError, Predictions
from posefabric.train.phase import measure_options

_log = logging.getLogger(__name__)


def evaluate_exported(
    estimator: ExportedPoseEstimator,
    config: Config,
    dataset: PersonDataset,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """All measures of an exported file: those of :func:`posefabric.train.phase.evaluate`.

    The same persons, crops, flip test, NMS and thresholds (``evaluation.*``); only the network is
    the file's, and numpy decodes where its graph does not.
    """
    predictions = predict_exported(
        estimator,
        dataset,
        flip=config.evaluation.flip_test,
        skip=config.data.on_bad_image == "skip",
        progress=progress,
    )
    return evaluate_predictions(
        dataset, predictions, input_wh=estimator.input_wh, **measure_options(config)
    )


def predict_exported(
    estimator: ExportedPoseEstimator,
    dataset: PersonDataset,
    *,
    flip: bool,
    skip: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Keypoints of every person of a data set, in image pixels, in the data set's order.

    ``skip``: persons of unreadable pictures are left out (logged); otherwise DataError.
    """
    if estimator.skeleton.keypoints != dataset.skeleton.keypoints:
        raise PosefabricError(
            f"{dataset.name} has the keypoints of {dataset.skeleton.name}, {estimator.path} those "
            f"of {estimator.skeleton.name}; evaluate it on data of its own skeleton"
        )
    loader = CropLoader(
        dataset,
        estimator.geometry,
        batch_size=estimator.batch_size,
        on_bad_image="skip" if skip else "error",
    )
    keypoints, scores, index = [], [], []
    for batch in loader.batches():
        points, confidence = estimator.infer(batch.crops.numpy(), flip)
        points = transform_points(invert_affine(batch.image_to_crop.numpy()), points)
        readable = ~batch.unreadable.numpy()
        keypoints.append(points[readable])
        scores.append(np.clip(confidence, 0, 1)[readable])
        index.append(batch.index.numpy()[readable])
        if progress is not None:
            progress(int(batch.index[-1]) + 1, len(dataset.persons))
    if loader.unreadable:
        _log.warning("%s: %d pictures cannot be read", dataset.name, len(loader.unreadable))
    return Predictions(
        keypoints=np.concatenate(keypoints).astype(np.float32),
        scores=np.concatenate(scores).astype(np.float32),
        index=np.concatenate(index).astype(np.int64),
    )
