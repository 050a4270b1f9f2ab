"""Persons as a few arrays, which a loader's workers read without copying them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posefabric.structures import Person


class PackedPersons:
    """The persons of a data set, made anew whenever one is asked for.

    A forked worker that reads a list of objects writes to their reference counts, and so copies
    the list, page by page, into its own memory over an epoch. Arrays are only read.

    Attributes:
        box_xywh: (N, 4) float32. keypoints: (N, K, 2) float32. visibility: (N, K) uint8.
        image_id, annotation_id: (N,) int64.
    """

    def __init__(self, persons: Sequence[Person]) -> None:
        self.box_xywh = np.stack([p.box_xywh for p in persons]).astype(np.float32)
        self.keypoints = np.stack([p.keypoints for p in persons]).astype(np.float32)
        self.visibility = np.stack([p.visibility for p in persons]).astype(np.uint8)
        self.image_id = np.array([p.image_id for p in persons], dtype=np.int64)
        self.annotation_id = np.array([p.annotation_id for p in persons], dtype=np.int64)
        self._numbers = np.array([[p.score, p.area, p.is_crowd] for p in persons], np.float64)
        files = [p.file.encode("utf-8", "surrogateescape") for p in persons]
        self._ends = np.cumsum([len(file) for file in files])
        self._files = np.frombuffer(b"".join(files), np.uint8)

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, row: int) -> Person:
        score, area, is_crowd = self._numbers[row].tolist()
        start = int(self._ends[row - 1]) if row else 0
        file = self._files[start : int(self._ends[row])].tobytes()
        return Person(
            image_id=int(self.image_id[row]),
            annotation_id=int(self.annotation_id[row]),
            file=file.decode("utf-8", "surrogateescape"),
            box_xywh=self.box_xywh[row],
            keypoints=self.keypoints[row],
            visibility=self.visibility[row],
            score=score,
            area=area,
            is_crowd=bool(is_crowd),
        )
