"""Crops of a run's own persons: of training to calibrate with, of validation to check on."""

from __future__ import annotations

import numpy as np

from posefabric.config import Config
from posefabric.data.crop import crop_person
from posefabric.data.pipeline import Split, make_geometry, open_dataset
from posefabric.structures import DataError, PosefabricError


def person_crops(config: Config, split: Split, count: int, *, seed: int | None) -> np.ndarray:
    """(N, H, W, 3) uint8 RGB inputs of the first readable persons, at most ``count``.

    ``seed``: the persons are drawn by it; None: in the order of the data set. Training persons
    have no augmentation, and their boxes as in evaluation.

    Raises PosefabricError when no picture can be read.
    """
    dataset = open_dataset(config.data, split, evaluating=True)
    geometry = make_geometry(config.data)
    rows = np.arange(len(dataset.persons))
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)
    crops = []
    for row in rows:
        person = dataset.persons[row]
        try:
            crops.append(crop_person(dataset.read_image(person), person.box_xywh, geometry)[0])
        except DataError:
            continue
        if len(crops) == count:
            break
    if not crops:
        raise PosefabricError(
            f"{dataset.name}: no picture of its {len(rows)} persons can be read; check data.root "
            f"and data.{split}_images"
        )
    return np.stack(crops)
