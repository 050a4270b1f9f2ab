"""Decoded crops kept on the device: from the second epoch on, nothing is read or moved."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch

from posefabric.data.crop import CropGeometry
from posefabric.data.loaders import CropLoader
from posefabric.data.reader import CACHE_SHARE, available_memory
from posefabric.distributed import place
from posefabric.structures import CropBatch

logger = logging.getLogger(__name__)

GPU_SHARE = 0.5  # of the GPU's free memory; the rest is for the network


def fits_device(count: int, geometry: CropGeometry, device: torch.device) -> bool:
    """Whether the crops of ``count`` persons may be kept on the device; warns where not."""
    width, height = geometry.crop_wh
    needed = count * width * height * 3
    if device.type == "cuda":
        limit = int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    else:
        limit = int(CACHE_SHARE * available_memory() / place().local_ranks)
    if needed > limit:
        logger.warning(
            "data.cache=device: %d crops of %dx%d would take %.2f GB, more than a cache on this "
            "%s may have (%.2f GB); data.cache=memory is used instead",
            *(count, width, height, needed / 1e9, device.type, limit / 1e9),
        )
    return needed <= limit


class DeviceCache:
    """The crops of a loader's persons as one uint8 tensor (N, Hc, Wc, 3) on the device.

    A batch whose persons are all there is made on the device, without the loader; others are
    read, and their crops stay. Each of several processes keeps what it has seen.

    Memory for all of them is taken at once: ask :func:`fits_device` before.
    """

    def __init__(self, loader: CropLoader, geometry: CropGeometry, device: torch.device) -> None:
        width, height = geometry.crop_wh
        rows = np.unique(loader.rows)
        self._loader, self._persons = loader, loader.persons
        self._slots = np.full(len(self._persons), -1, dtype=np.int64)
        self._slots[rows] = np.arange(len(rows))
        self._filled = np.zeros(len(rows), dtype=bool)
        self._unreadable = np.zeros(len(rows), dtype=bool)
        self._matrices = torch.zeros(len(rows), 2, 3)
        self.crops = torch.empty((len(rows), height, width, 3), dtype=torch.uint8, device=device)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[CropBatch]:
        """As :meth:`CropLoader.batches`, with the crops on the device."""
        plan = self._loader.plan(epoch, start)
        # A person comes once an epoch: what is missing now is so when its batch comes.
        missing = [not self._filled[self._slots[rows]].all() for rows in plan]
        read = self._loader.batches(epoch, start, only=missing)
        for rows, is_read in zip(plan, missing, strict=True):
            yield self._keep(next(read)) if is_read else self._kept(rows)

    def _keep(self, batch: CropBatch) -> CropBatch:
        slots = self._slots[batch.index.numpy()]
        batch.crops = batch.crops.to(self.crops.device, non_blocking=True)
        self.crops[torch.from_numpy(slots).to(self.crops.device)] = batch.crops
        self._matrices[slots] = batch.image_to_crop
        self._unreadable[slots] = batch.unreadable.numpy()
        self._filled[slots] = True
        return batch

    def _kept(self, rows: list[int]) -> CropBatch:
        slots = self._slots[rows]
        unreadable = self._unreadable[slots]
        visibility = self._persons.visibility[rows] * ~unreadable[:, None]
        return CropBatch(
            crops=self.crops[torch.from_numpy(slots).to(self.crops.device)],
            image_to_crop=self._matrices[slots],
            keypoints=torch.from_numpy(self._persons.keypoints[rows]),
            visibility=torch.from_numpy(visibility),
            index=torch.tensor(rows, dtype=torch.int64),
            unreadable=torch.from_numpy(unreadable),
        )
