"""How long a training waits for its data, and what its workers hold in memory."""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posefabric.bench.fresh import Gate
from posefabric.bench.memory import private_bytes
from posefabric.config import Config
from posefabric.data.loaders import CropLoader
from posefabric.data.pipeline import TRAINING_MARGIN, TrainingData, make_geometry, open_dataset
from posefabric.models.build import build_supernet
from posefabric.run import RunFolder
from posefabric.search.run_search import STRATEGIES
from posefabric.structures import CropBatch, PersonDataset, PoseBatch, PosefabricError
from posefabric.train.loop import Trainer
from posefabric.train.memory import keep_freed_memory
from posefabric.train.phase import choose_path

PREFETCHED = 2  # batches that each of torch's workers reads ahead
QUARTERS = 4


@dataclass
class WatchedData(TrainingData):
    """Training data that notes, for each step, the seconds of waiting, preparing and all of it.

    ``last_step``: the training ends after so many steps.
    """

    last_step: int = 1
    clock: Callable[[], float] = time.perf_counter
    waits: list[float] = field(default_factory=list)
    prepares: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def crops(self, step: int) -> Iterator[tuple[int, CropBatch]]:
        source = super().crops(step)
        for _ in range(self.last_step):
            began = self.clock()
            item = next(source)
            self.waits.append(self.clock() - began)
            yield item
            self.steps.append(self.clock() - began)

    def prepare(self, crops: CropBatch, step: int) -> PoseBatch:
        began = self.clock()
        batch = super().prepare(crops, step)
        self.prepares.append(self.clock() - began)
        return batch


def wait_shares(data: WatchedData, *, skip: int) -> dict[str, list[float]]:
    """Waiting and preparing as shares of each step but the first ``skip``; whole seconds too."""
    return {
        "wait": [w / s for w, s in zip(data.waits, data.steps, strict=True)][skip:],
        "prepare": [p / s for p, s in zip(data.prepares, data.steps, strict=True)][skip:],
        "seconds": data.steps[skip:],
    }


def loader_waits(
    gate: Gate, *, configs: dict[str, Config], batch: int, steps: int, device: str
) -> None:
    """At each turn the next configuration's :func:`wait_shares` over ``steps`` steps.

    Searches with one network whose input follows the configuration; every picture is decoded
    anew unless ``data.cache`` says otherwise. The steps in which workers live on what they had
    read while the first step warmed up do not count.
    """
    place = torch.device(device)
    keep_freed_memory(place)
    first = next(iter(configs.values()))
    network = build_supernet(first)
    choose_path(network, first, place)
    for config in configs.values():
        if not gate.turn():
            return
        optim = config.search.model_copy(update={"batch_size": batch})
        strategy = STRATEGIES[optim.strategy](optim)
        data: Any = WatchedData.open(
            config,
            optim=optim,
            normalisation=network.normalisation,
            seed=config.seed,
            device=place,
        )
        skip = 1 + PREFETCHED * config.data.workers
        data.last_step = skip + steps
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder.create(Path(folder) / "run", config=config, kind="search")
            Trainer(
                network=network,
                data=data,
                run=run,
                optim=optim,
                strategy=strategy,
                phase="bench",
                seed=config.seed,
                device=place,
            ).fit()
        gate.answer(wait_shares(data, skip=skip))
        del data
    gate.turn()


def workers_memory(gate: Gate, *, config: Config, batch: int, persons: int) -> None:
    """At a turn: private bytes of the loader's workers after each quarter of an epoch.

    A list of four lists, one number a worker. The data set's persons are repeated up to
    ``persons``: what grows, grows with the persons that a worker has touched.
    """
    dataset = repeated(open_dataset(config.data, "train"), persons)
    while gate.turn():
        loader = CropLoader(
            dataset,
            make_geometry(config.data, TRAINING_MARGIN),
            batch_size=batch,
            seed=config.seed,
            workers=config.data.workers,
            cache=False,
            drop_last=True,
        )
        at = {round(len(loader) * quarter / QUARTERS) for quarter in range(1, QUARTERS + 1)}
        found: list[list[int]] = []
        for done, _ in enumerate(loader.batches(), start=1):
            if done in at:
                pids = sorted(child.pid or 0 for child in multiprocessing.active_children())
                sizes = [private_bytes(pid) for pid in pids]
                if None in sizes:
                    raise PosefabricError("this system does not tell a process's private memory")
                found.append([size for size in sizes if size is not None])
        gate.answer(found)
        del loader


def repeated(dataset: PersonDataset, count: int) -> PersonDataset:
    """The data set with its persons over and over, as objects of their own, ``count`` in all."""
    persons = [
        dataclasses.replace(dataset.persons[i % len(dataset)], annotation_id=i + 1)
        for i in range(count)
    ]
    return dataclasses.replace(dataset, persons=persons)
