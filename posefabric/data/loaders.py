"""Seeded batches of uint8 crops, read by workers, kept in memory when they fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from posefabric.data.crop import CropGeometry
from posefabric.data.reader import CropReader, LoadedBatch, make_cache
from posefabric.distributed import Launch, share
from posefabric.structures import CropBatch, DataError, PersonDataset, PosefabricError

OnBadImage = Literal["error", "skip"]


class CropLoader:
    """Batches of crops of a data set, the same whatever the number of workers.

    Args:
        dataset: persons and the way to read their pictures.
        geometry: what is cut out.
        batch_size: persons a batch.
        rows: rows of ``dataset.persons`` to use; none: all.
        seed: epoch e is in the order of ``default_rng([seed, e])``; none: in the order of rows.
        workers: processes that read and crop; 0: a thread of this one, a batch ahead.
        cache: keep the decoded crops in memory that workers share.
        on_bad_image: ``error`` raises DataError, ``skip`` gives a black crop without keypoints
            and counts the file in ``unreadable``.
        drop_last: leave out a last, smaller batch.
        launch: this process's place; it reads its share of every batch. None: all of it.
        window: groups of ``dataset.groups`` (shards) whose persons are mixed at a time.
    """

    def __init__(
        self,
        dataset: PersonDataset,
        geometry: CropGeometry,
        *,
        batch_size: int,
        rows: Sequence[int] | np.ndarray | None = None,
        seed: int | None = None,
        workers: int = 0,
        cache: bool = False,
        on_bad_image: OnBadImage = "error",
        drop_last: bool = False,
        launch: Launch | None = None,
        window: int = 16,
    ) -> None:
        self.rows = _checked_rows(dataset, rows)
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.launch = launch or Launch()
        self.unreadable: dict[str, str] = {}
        if batch_size < 1 or workers < 0:
            raise PosefabricError(
                f"batch_size {batch_size} and workers {workers}: expected at least 1 and 0"
            )
        if batch_size < self.launch.ranks:
            raise PosefabricError(
                f"{dataset.name}: batches of {batch_size} persons for {self.launch.ranks} "
                "processes, each of which needs one or more; use a larger batch_size or fewer "
                "processes"
            )
        if on_bad_image not in ("error", "skip"):
            raise PosefabricError(f"on_bad_image: expected error or skip, got {on_bad_image}")
        if len(self) == 0:
            raise PosefabricError(
                f"{dataset.name}: {len(self.rows)} persons give no batch of {batch_size} with "
                "drop_last; use a smaller batch_size"
            )
        self._window = window
        self._groups = dataset.groups
        self._plan = _Plan()
        self._runs = 0
        # A generator of its own keeps torch's global one untouched by iterating.
        reader = CropReader(
            dataset,
            geometry,
            skip=on_bad_image == "skip",
            cache=make_cache(dataset, self.rows, geometry, workers) if cache else None,
        )
        self.persons = reader.persons
        self._loader: DataLoader[LoadedBatch] = DataLoader(
            reader,
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, epoch: int = 0) -> np.ndarray:
        """Rows of ``dataset.persons`` in the order of an epoch, (N,) int64."""
        if self.seed is None:
            return self.rows
        generator = np.random.default_rng([self.seed, epoch])
        if self._groups is None:
            return generator.permutation(self.rows)
        return shuffle_in_windows(self.rows, self._groups, self._window, generator)

    def plan(self, epoch: int = 0, start: int = 0) -> list[list[int]]:
        """The rows of this process's share of batches ``start`` to the last of an epoch."""
        order, size = self.order(epoch), self.batch_size
        batches = [order[k * size : (k + 1) * size] for k in range(start, len(self))]
        return [rows[share(len(rows), self.launch)].tolist() for rows in batches]

    def batches(
        self, epoch: int = 0, start: int = 0, *, only: Sequence[bool] | None = None
    ) -> Iterator[CropBatch]:
        """Batches ``start`` to the last of an epoch; those before are not read.

        ``only``: of those, the ones to read.

        Raises DataError with the reader's own message for a bad picture, unless they are
        skipped. One iteration of a loader goes on at a time: PosefabricError otherwise.
        """
        plan = self.plan(epoch, start)
        chosen = plan if only is None else itertools.compress(plan, only)
        self._plan.batches = list(chosen)
        self._runs += 1
        run = self._runs
        loaded_ones = iter(self._loader)
        for loaded in loaded_ones if self._loader.num_workers else _ahead(loaded_ones):
            if loaded.error is not None:
                raise DataError(loaded.error)
            assert loaded.batch is not None
            self.unreadable.update(loaded.unreadable)
            yield loaded.batch
            if run != self._runs:
                raise PosefabricError(
                    "batches() was called again while an earlier iteration went on; finish the "
                    "first, or make a second CropLoader"
                )


def _ahead(batches: Iterator[LoadedBatch]) -> Iterator[LoadedBatch]:
    """The same, each read by a thread while the one before is worked on."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as reader:
        coming = reader.submit(next, batches, None)
        while (loaded := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield loaded


def shuffle_in_windows(
    rows: np.ndarray, groups: np.ndarray, window: int, generator: np.random.Generator
) -> np.ndarray:
    """``rows`` in a random order that goes through a few groups at a time.

    Groups (``groups[row]``) come in a random order, ``window`` of them together, and the rows of
    these are mixed. Up to ``window`` groups that is a permutation like any other.
    """
    own = groups[rows]
    names = np.unique(own)
    if len(names) <= window:
        return generator.permutation(rows)
    mixed = generator.permutation(names)
    # Rows sorted by their group's place, so that a window is a slice.
    place = np.empty(names[-1] + 1, dtype=np.int64)
    place[mixed] = np.arange(len(mixed))
    turn = place[own] // window
    order = np.argsort(turn, kind="stable")
    cuts = np.searchsorted(turn[order], np.arange(1, turn.max() + 1))
    return np.concatenate([generator.permutation(part) for part in np.split(rows[order], cuts)])


def split_by_image(
    dataset: PersonDataset, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split persons at random so that no picture is on both sides.

    Returns two sorted arrays of rows: the first has as nearly ``fraction`` of the persons as
    whole pictures, taken in a random order, allow: at least one picture, and it leaves at least
    one. Raises PosefabricError when that cannot be.
    """
    image_ids = np.array([person.image_id for person in dataset.persons], dtype=np.int64)
    pictures, persons = np.unique(image_ids, return_counts=True)
    if not 0 < fraction < 1 or len(pictures) < 2:
        raise PosefabricError(
            f"{dataset.name}: a split of {len(pictures)} pictures by fraction {fraction}: expected "
            "two pictures or more and a fraction between 0 and 1"
        )
    order = np.random.default_rng(seed).permutation(len(pictures))
    misses = np.abs(np.cumsum(persons[order]) - fraction * len(image_ids))
    count = int(np.argmin(misses[:-1])) + 1
    first = np.isin(image_ids, pictures[order[:count]])
    return np.flatnonzero(first), np.flatnonzero(~first)


class _Plan(Sampler[list[int]]):
    """The batches to come, as lists of rows; workers live on while it changes."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _unchanged(loaded: Any) -> Any:
    return loaded


def _start_worker(worker: int) -> None:
    # Workers are the parallelism; OpenCV's own threads would only fight over the cores.
    cv2.setNumThreads(0)


def _checked_rows(dataset: PersonDataset, rows: Sequence[int] | np.ndarray | None) -> np.ndarray:
    count = len(dataset.persons)
    chosen = np.arange(count) if rows is None else np.asarray(rows, dtype=np.int64)
    if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= count:
        raise PosefabricError(
            f"{dataset.name}: rows of shape {chosen.shape}: expected at least one row, each in "
            f"0..{count - 1}; check the annotations and the split"
        )
    return chosen.astype(np.int64)
