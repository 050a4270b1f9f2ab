"""predictions.npz of a run: where its network found the validation persons' keypoints."""

from __future__ import annotations

import io

import numpy as np

from posefabric.run import RunFolder
from posefabric.structures import Predictions

PREDICTIONS_NAME = "predictions.npz"


def save_predictions(run: RunFolder, predictions: Predictions) -> None:
    """Write keypoints (N, K, 2) in image pixels, scores (N, K) and index (N,), atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        keypoints=predictions.keypoints,
        scores=predictions.scores,
        index=predictions.index,
    )
    run.write_bytes(PREDICTIONS_NAME, buffer.getvalue())


def read_predictions(run: RunFolder) -> Predictions | None:
    """What :func:`save_predictions` wrote; None where a run has none."""
    if not (run.path / PREDICTIONS_NAME).is_file():
        return None
    with np.load(io.BytesIO(run.read_bytes(PREDICTIONS_NAME))) as kept:
        return Predictions(keypoints=kept["keypoints"], scores=kept["scores"], index=kept["index"])
