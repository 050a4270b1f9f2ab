"""The hits a person of a study's runs, and shares and intervals over the same persons."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from posefabric.evaluate.pck import LIMB_JOINTS
from posefabric.structures import PosefabricError
from posefabric.study.rows import Row
from posefabric.study.statistics import percentile_interval, person_weights, resampled_shares

# Measures that are a share of the keypoints found, and over which of them.
BY_PERSON: dict[str, tuple[str, ...] | None] = {"PCK": None, "PCK_limbs": LIMB_JOINTS}


class Hits:
    """Counts a person of several rows, read once, all resampled by the same draws of persons.

    Persons are those of the data set, by their rows there; a person that a run could not read
    counts nothing in it. Raises PosefabricError when a file of counts is missing.
    """

    def __init__(self, rows: Sequence[Row], study: Path) -> None:
        self._counts: dict[str, dict[str, np.ndarray]] = {}
        for row in rows:
            self._counts[row["hash"]] = _read(study / row["counts"])
        last = [int(counts["person"].max(initial=-1)) for counts in self._counts.values()]
        self.persons = 1 + max(last, default=-1)
        # One draw for all runs and measures: differences are between the same persons.
        self._weights = person_weights(max(self.persons, 1))

    def shares(self, rows: Sequence[Row], measure: str) -> np.ndarray:
        """Mean over the rows of a measure of BY_PERSON, under each resample of the persons."""
        pairs = [self._totals(row, measure) for row in rows]
        return resampled_shares([p[0] for p in pairs], [p[1] for p in pairs], self._weights)

    def interval(self, rows: Sequence[Row], measure: str) -> tuple[float, float]:
        return percentile_interval(self.shares(rows, measure))

    def paired_interval(
        self, better: Sequence[Row], than: Sequence[Row], measure: str
    ) -> tuple[float, float]:
        """Of the difference of the two sides' means, over the same resampled persons."""
        return percentile_interval(self.shares(better, measure) - self.shares(than, measure))

    def _totals(self, row: Row, measure: str) -> tuple[np.ndarray, np.ndarray]:
        counts = self._counts[row["hash"]]
        names = [str(name) for name in counts["keypoints"]]
        chosen = BY_PERSON[measure]
        columns = [i for i, name in enumerate(names) if chosen is None or name in chosen]
        totals = []
        for kind in ("found", "counted"):
            whole = np.zeros(max(self.persons, 1), dtype=np.float32)
            whole[counts["person"]] = counts[kind][:, columns].sum(axis=1)
            totals.append(whole)
        return totals[0], totals[1]


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(path.read_bytes())) as kept:
            return {name: kept[name] for name in kept.files}
    except (OSError, ValueError) as error:
        raise PosefabricError(
            f"{path}: cannot be read ({error}); delete its run's line in rows.jsonl, and run the "
            f"study again: the finished training is only measured anew"
        ) from error
