"""What a loader's workers do: read pictures, cut persons out, keep the crops in memory."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from posefabric.data.crop import CropGeometry, crop_person
from posefabric.data.packed import PackedPersons
from posefabric.distributed import place
from posefabric.structures import CropBatch, DataError, Person, PersonDataset

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.25  # of the memory that is available
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps what processes share


@dataclass
class LoadedBatch:
    """What a worker hands over: a batch, or the message of the error that ended it."""

    batch: CropBatch | None
    unreadable: dict[str, str]
    error: str | None = None


@dataclass
class CropCache:
    """Crops (N, Hc, Wc, 3) uint8 and whether they are filled, (N,) uint8, for some rows."""

    slots: dict[int, int]
    crops: torch.Tensor
    filled: torch.Tensor


class CropReader(Dataset[LoadedBatch]):
    """Reads and crops one batch; runs in the workers."""

    def __init__(
        self, dataset: PersonDataset, geometry: CropGeometry, *, skip: bool, cache: CropCache | None
    ) -> None:
        self.persons = PackedPersons(dataset.persons)
        self.read_image = dataset.read_image
        self.geometry = geometry
        self.skip = skip
        self.cache = cache
        self._last: tuple[tuple[str, int], np.ndarray] | None = None

    def __getitem__(self, rows: Any) -> LoadedBatch:
        width, height = self.geometry.crop_wh
        persons = [self.persons[row] for row in rows]
        crops = np.zeros((len(rows), height, width, 3), dtype=np.uint8)
        matrices = np.zeros((len(rows), 2, 3), dtype=np.float32)
        visibility = self.persons.visibility[rows]
        unreadable = np.zeros(len(rows), dtype=bool)
        reasons: dict[str, str] = {}
        for at, (row, person) in enumerate(zip(rows, persons, strict=True)):
            try:
                crops[at], matrices[at] = self._crop(row, person)
            except DataError as error:
                if not self.skip:
                    return LoadedBatch(batch=None, unreadable={}, error=str(error))
                matrices[at] = np.eye(2, 3, dtype=np.float32)
                visibility[at] = 0
                unreadable[at] = True
                reasons[person.file] = str(error)
        batch = CropBatch(
            crops=torch.from_numpy(crops),
            image_to_crop=torch.from_numpy(matrices),
            keypoints=torch.from_numpy(self.persons.keypoints[rows]),
            visibility=torch.from_numpy(visibility),
            index=torch.tensor(rows, dtype=torch.int64),
            unreadable=torch.from_numpy(unreadable),
        )
        return LoadedBatch(batch=batch, unreadable=reasons)

    def _crop(self, row: int, person: Person) -> tuple[np.ndarray, np.ndarray]:
        cache = self.cache
        slot = cache.slots[row] if cache is not None else -1
        kept = cache is not None and bool(cache.filled[slot])
        image = None if kept else self._picture(person)
        try:
            if cache is not None and image is None:
                matrix = self.geometry.image_to_crop(person.box_xywh)
                return cache.crops[slot].numpy(), matrix
            assert image is not None
            crop, matrix = crop_person(image, person.box_xywh, self.geometry)
        except DataError as error:
            where = f"{person.file}: annotation {person.annotation_id}"
            raise DataError(f"{where}: {error}") from error
        if cache is not None:
            cache.crops[slot] = torch.from_numpy(crop)
            cache.filled[slot] = 1
        return crop, matrix

    def _picture(self, person: Person) -> np.ndarray:
        # In evaluation the persons of a picture follow each other.
        key, last = (person.file, person.image_id), self._last
        if last is None or last[0] != key:
            # Another thread may still read for an epoch that was abandoned.
            last = self._last = (key, self.read_image(person))
        return last[1]


def make_cache(
    dataset: PersonDataset, rows: np.ndarray, geometry: CropGeometry, workers: int
) -> CropCache | None:
    """An empty cache for the crops of ``rows``, shared when there are workers.

    None, with a warning, when it would take too much memory.
    """
    width, height = geometry.crop_wh
    unique = np.unique(rows)
    needed = len(unique) * width * height * 3
    # Each process of a machine has a cache of its own, in the end of everybody.
    limit = int(CACHE_SHARE * available_memory()) // place().local_ranks
    if workers and SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free // place().local_ranks
        limit = min(limit, free // 2)
    if needed > limit:
        logger.warning(
            "%s: %d crops of %dx%d would take %.2f GB, more than a cache may have (%.2f GB: a "
            "quarter of the available memory, with workers also half of what %s has free); "
            "pictures are read anew in every epoch. cache=false silences this",
            *(dataset.name, len(unique), width, height, needed / 1e9, limit / 1e9, SHARED_MEMORY),
        )
        return None
    crops = torch.empty((len(unique), height, width, 3), dtype=torch.uint8)
    filled = torch.zeros(len(unique), dtype=torch.uint8)
    if workers:
        crops.share_memory_()
        filled.share_memory_()
    return CropCache({int(row): slot for slot, row in enumerate(unique)}, crops, filled)


def available_memory() -> int:
    """Bytes that this machine can still give, without swapping where the system tells."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
