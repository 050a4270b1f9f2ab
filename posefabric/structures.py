"""The validated values that cross stages: persons, crops, batches and predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from posefabric.skeletons import Skeleton


class PosefabricError(Exception):
    """A message for the user: what was expected, what came, where, and what to change."""


class DataError(PosefabricError):
    """Something in a data set is wrong; the message names the file and the annotation."""


@dataclass(frozen=True)
class Person:
    """One annotated or detected person, without pixels.

    Attributes:
        image_id, annotation_id: integers of the data set (annotation_id -1 for a detection).
        file: path of the image, or a readable label for images made on the fly.
        box_xywh: (4,) float32, pixels.
        keypoints: (K, 2) float32, pixels.
        visibility: (K,) uint8, COCO's 0 = not annotated, 1 = occluded, 2 = visible.
        score: confidence of the box, 1.0 for ground truth.
        area: object area in square pixels (OKS), the box's area when not annotated.
        is_crowd: a COCO crowd region; such persons are never trained on.
    """

    image_id: int
    annotation_id: int
    file: str
    box_xywh: np.ndarray
    keypoints: np.ndarray
    visibility: np.ndarray
    score: float = 1.0
    area: float = 0.0
    is_crowd: bool = False


@dataclass(frozen=True)
class Sample:
    """A person with its picture: ``image`` is (H, W, 3) uint8 RGB."""

    image: np.ndarray
    person: Person


@dataclass(frozen=True)
class PersonDataset:
    """Persons of one split and the way to read their pictures.

    Attributes:
        name: shown in reports.
        skeleton: names, flip pairs, limbs, sigmas and parts of the K keypoints.
        persons: the persons, in a fixed order; a batch's ``index`` points into it.
        read_image: ``Person -> (H, W, 3) uint8 RGB``; raises :class:`DataError`.
        box_source: where the boxes come from, said in every result.
        annotations_path: the COCO ground truth for OKS, when there is one.
        headboxes: (len(persons), 2, 2), corners in image pixels, for PCKh; NaN where missing.
        ground_truth: False for a test split whose keypoints are not given; nothing is measured.
        has_areas: False where persons have no area that OKS could be measured in.
        source_path: the annotation file where it is not COCO's.
        groups: (len(persons),) int64, the shard each person's picture lies in; training then
            goes through a few shards at a time. None: pictures are read in any order.
    """

    name: str
    skeleton: Skeleton
    persons: list[Person]
    read_image: Callable[[Person], np.ndarray]
    box_source: str = "ground truth"
    annotations_path: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    headboxes: np.ndarray | None = None
    ground_truth: bool = True
    has_areas: bool = True
    source_path: str | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.persons)

    def __getitem__(self, index: int) -> Sample:
        person = self.persons[index]
        return Sample(image=self.read_image(person), person=person)


@dataclass
class CropBatch:
    """What loader workers hand over: uint8 crops and the transforms that made them.

    Attributes:
        crops: (B, Hc, Wc, 3) uint8 RGB; the crop covers more than the input so that
            augmentation can rotate and shrink without meeting its border.
        image_to_crop: (B, 2, 3) float32, image pixels to crop pixels.
        keypoints: (B, K, 2) float32 in image pixels.
        visibility: (B, K) uint8.
        index: (B,) int64, rows of ``PersonDataset.persons``.
        unreadable: (B,) bool, pictures that could not be read; their crop is black and
            their visibility 0, so they weigh nothing.
    """

    crops: torch.Tensor
    image_to_crop: torch.Tensor
    keypoints: torch.Tensor
    visibility: torch.Tensor
    index: torch.Tensor
    unreadable: torch.Tensor


@dataclass
class PoseBatch:
    """A batch on the device, ready for a network.

    Attributes:
        images: (B, 3, H, W) float32, normalised, channels_last in memory.
        heatmaps: (B, K, h, w) float32 target Gaussians with peak 1.
        weights: (B, K) float32, 0 where a keypoint is not annotated or outside the map.
        input_to_image: (B, 2, 3) float32, input pixels to image pixels.
        index: (B,) int64, rows of ``PersonDataset.persons``.
    """

    images: torch.Tensor
    heatmaps: torch.Tensor
    weights: torch.Tensor
    input_to_image: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class Predictions:
    """Keypoints of N persons in image pixels.

    Attributes:
        keypoints: (N, K, 2) float32, image pixels.
        scores: (N, K) float32 in 0..1.
        index: (N,) int64, rows of ``PersonDataset.persons``.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    index: np.ndarray
