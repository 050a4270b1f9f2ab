"""The measures of a finished run's network on one split, and the hits a person behind them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from posefabric.config import Config
from posefabric.data.pipeline import Split, make_codec, make_geometry, open_dataset
from posefabric.deploy.run_report import shipped_network
from posefabric.evaluate.kept import read_predictions
from posefabric.evaluate.measures import evaluate_predictions
from posefabric.evaluate.pck import pck
from posefabric.evaluate.profile import profile
from posefabric.evaluate.runner import predict_dataset
from posefabric.models.build import choose_device
from posefabric.run import RunFolder, write_atomic
from posefabric.structures import PosefabricError
from posefabric.train.phase import headline


def measure_split(run: RunFolder, config: Config, split: Split, counts: Path) -> dict[str, Any]:
    """The headline measures of a run's shipped network on a split; hits a person into ``counts``.

    On ``val`` what the training's own evaluation predicted is measured, without predicting anew.

    ``counts`` (.npz) has ``found`` and ``counted``, (N, K) bool, ``person`` (row in the data set)
    and ``keypoints`` (their names); persons whose picture cannot be read have no row.

    Raises PosefabricError where the split has no keypoints.
    """
    dataset = open_dataset(config.data, split, boxes=config.data.boxes, evaluating=True)
    network = shipped_network(run).to(choose_device(config.device))
    chosen, codec = config.evaluation, make_codec(config.data)
    # A training ends with its own evaluation on the validation persons.
    kept = read_predictions(run) if split == "val" and config.data.boxes is None else None
    predictions = kept or predict_dataset(
        network,
        dataset,
        geometry=make_geometry(config.data),
        codec=codec,
        normalisation=network.normalisation,
        flip=chosen.flip_test,
        on_bad_image=config.data.on_bad_image,
    )
    result = evaluate_predictions(
        dataset,
        predictions,
        input_wh=config.data.input_wh,
        pck_threshold=chosen.pck_threshold,
        pckh_threshold=chosen.pckh_threshold,
        score_threshold=chosen.rescore_threshold,
        nms_threshold=chosen.nms_threshold,
        nms_area=chosen.nms_area or codec.rules.nms_area,
        box_padding=codec.rules.box_padding,
    )
    if result["pck"] is None or result["pck"]["PCK"] is None:
        raise PosefabricError(
            f"{dataset.name}: has no keypoints that count, so nothing can be compared on it"
        )
    persons = [dataset.persons[row] for row in predictions.index]
    hits = pck(
        predictions.keypoints,
        np.stack([person.keypoints for person in persons]),
        np.stack([person.visibility for person in persons]),
        dataset.skeleton,
        boxes_xywh=np.stack([person.box_xywh for person in persons]),
        threshold=chosen.pck_threshold,
        keep_hits=True,
    )
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        found=hits["found"],
        counted=hits["counted"],
        person=predictions.index,
        keypoints=np.array(dataset.skeleton.keypoints),
    )
    counts.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(counts, buffer.getvalue())
    costs = profile(network, config.data.input_wh, repeats=1, warmup=0)
    return {
        "split": split,
        **headline(result),
        "persons": len(persons),
        **{name: costs[name] for name in ("params", "macs", "head_params", "head_macs")},
    }
