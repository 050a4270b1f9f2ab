"""Exports a run's network to ONNX and checks it on the run's own validation pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from posefabric.data.crop import crop_person
from posefabric.data.pipeline import make_geometry, open_dataset
from posefabric.deploy.export import export_onnx
from posefabric.deploy.run_report import shipped_network
from posefabric.run import RunFolder
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError

CHECKED_PERSONS = 16


def export_run(run: RunFolder, path: Path, *, decode: bool = True) -> tuple[Path, dict[str, Any]]:
    """Write model.onnx; returns its path and the check against torch, kept in the run too."""
    config = run.config
    check = export_onnx(
        shipped_network(run),
        path,
        config=config,
        skeleton=load_skeleton(config.data.skeleton),
        decode=decode,
        crops=_validation_crops(run),
    )
    run.write_json("onnx_check.json", check)
    return path, check


def _validation_crops(run: RunFolder) -> np.ndarray | None:
    """(N, H, W, 3) uint8 RGB crops of the first readable validation persons.

    None where the run names no data, as one made from a released checkpoint: then the check is
    made on noise, and says so.
    """
    config = run.config
    if config.data.format != "synthetic" and config.data.root is None:
        return None
    dataset = open_dataset(config.data, "val")
    geometry = make_geometry(config.data)
    crops = []
    for person in dataset.persons:
        try:
            crops.append(crop_person(dataset.read_image(person), person.box_xywh, geometry)[0])
        except DataError:
            continue
        if len(crops) == CHECKED_PERSONS:
            break
    return np.stack(crops)
