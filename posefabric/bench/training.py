"""The arms that train: the package's own loop, a step at a turn, and the yardstick's step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posefabric.bench.fresh import Gate, answer_turns
from posefabric.bench.memory import Growth
from posefabric.bench.released import released_steps
from posefabric.config import Config, OptimConfig
from posefabric.data.batch import Normalisation
from posefabric.data.pipeline import TrainingData
from posefabric.data.synthetic import synthetic_people
from posefabric.models.build import build_baseline, build_supernet
from posefabric.models.network import PoseNetwork
from posefabric.run import RunFolder
from posefabric.search.run_search import STRATEGIES
from posefabric.skeletons import load_skeleton
from posefabric.structures import CropBatch, PersonDataset, PoseBatch
from posefabric.train.loop import Trainer
from posefabric.train.memory import keep_freed_memory
from posefabric.train.strategy import Strategy


@dataclass
class PacedData(TrainingData):
    """Training data that asks before each step, and tells what the step before it took.

    A step is what the loop does between the prepared batch and its wish for the next crops:
    forward, loss, backward, guards, optimiser, log. Reading and preparing are not in it.

    Attributes:
        before_step: called with the seconds of the last step, None before the first; the
            training ends when it returns False.
    """

    before_step: Callable[[float | None], bool] = lambda seconds: True
    clock: Callable[[], float] = time.perf_counter
    _began: float | None = None

    def crops(self, step: int) -> Iterator[tuple[int, CropBatch]]:
        for number, crops in super().crops(step):
            seconds = None if self._began is None else self.clock() - self._began
            if not self.before_step(seconds):
                return
            yield number, crops

    def prepare(self, crops: CropBatch, step: int) -> PoseBatch:
        batch = super().prepare(crops, step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._began = self.clock()
        return batch


def own_steps(gate: Gate, *, config: Config, batch: int, device: str) -> None:
    """A step of the package's own training at every turn; answers (seconds, peak bytes).

    A search by the options of a fabric, plain training of a baseline: the trainer, its layout,
    its precision and its guards as `posefabric search` and `posefabric train` have them.
    """
    place = torch.device(device)
    growth = Growth(place)
    keep_freed_memory()
    searches = config.model.network == "fabric"
    optim: OptimConfig = config.search if searches else config.finetune
    network: PoseNetwork = build_supernet(config) if searches else build_baseline(config)
    strategy = STRATEGIES[config.search.strategy](config.search) if searches else Strategy()
    optim = optim.model_copy(update={"batch_size": batch})
    data: Any = PacedData.open(
        config,
        optim=optim,
        normalisation=network.normalisation,
        seed=config.seed,
        device=place,
        dataset=people(config, batch),
    )

    def before_step(seconds: float | None) -> bool:
        if seconds is not None:
            gate.answer((seconds, growth.bytes()))
        return gate.turn()

    data.before_step = before_step
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", config=config, kind=_kind(searches))
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


def yardstick_steps(gate: Gate, *, config: Config, batch: int, device: str) -> None:
    """A step of the yardstick at every turn; answers (seconds, peak bytes)."""
    place = torch.device(device)
    growth = Growth(place)
    step = released_steps(config, training_batch(config, batch, place), place)
    answer_turns(gate, lambda: (step(), growth.bytes()))


def training_batch(config: Config, batch: int, device: torch.device) -> PoseBatch:
    """The first batch of synthetic people, prepared as a training prepares it."""
    data = TrainingData.open(
        config,
        optim=config.search.model_copy(update={"batch_size": batch}),
        normalisation=Normalisation(),
        seed=config.seed,
        device=device,
        dataset=people(config, batch),
    )
    return data.prepare(next(data.crops(0))[1], 0)


def people(config: Config, count: int) -> PersonDataset:
    return synthetic_people(count=count, seed=0, skeleton=load_skeleton(config.data.skeleton))


def _kind(searches: bool) -> Any:
    return "search" if searches else "train"
