"""The arms that train: the package's own training, a step at a turn, and the yardstick's step."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posefabric.bench.fresh import Gate, answer_turns
from posefabric.bench.memory import Growth
from posefabric.bench.released import released_steps
from posefabric.bench.timing import Clock
from posefabric.config import Config, OptimConfig
from posefabric.data.batch import Normalisation
from posefabric.data.pipeline import TrainingData
from posefabric.data.synthetic import synthetic_people
from posefabric.models.build import build_baseline, build_supernet
from posefabric.models.network import PoseNetwork
from posefabric.run import RunFolder
from posefabric.search.run_search import STRATEGIES
from posefabric.skeletons import load_skeleton
from posefabric.structures import PersonDataset, PoseBatch
from posefabric.train.phase import train_phase
from posefabric.train.strategy import Strategy


class Enough(Exception):
    """Ends a training that has shown enough steps."""


class PacedStrategy:
    """A strategy that asks before each step, and tells what the step took.

    The loop asks a strategy for its schedule before a step and, with ``log_every=1``, for its
    readings after it: between them lie forward, loss, backward, guards and optimiser, and not
    the reading and preparing of pictures. All else is the inner strategy's.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        before: Callable[[], bool],
        after: Callable[[float], None],
        device: torch.device,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._inner = inner
        self._before, self._after = before, after
        self._device = device
        self._clock = clock
        self._began = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def schedule(self, network: Any, progress: float) -> None:
        if not self._before():
            raise Enough
        self._wait()
        self._began = self._clock()
        self._inner.schedule(network, progress)

    def readings(self, network: Any) -> dict[str, float]:
        self._wait()
        self._after(self._clock() - self._began)
        return self._inner.readings(network)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def own_steps(gate: Gate, *, config: Config, batch: int, device: str) -> None:
    """A step of the package's own training at every turn; answers (seconds, peak bytes).

    A search by the options of a fabric, plain training of a baseline, as `posefabric search` and
    `posefabric train` begin it: whatever makes them fast is in it.
    """
    place = torch.device(device)
    growth = Growth(place)
    config = config.model_copy(update={"device": device})
    searches = config.model.network == "fabric"
    optim: OptimConfig = config.search if searches else config.finetune
    strategy = STRATEGIES[config.search.strategy](config.search) if searches else Strategy()
    network: PoseNetwork = build_supernet(config) if searches else build_baseline(config)
    paced: Any = PacedStrategy(
        strategy,
        before=gate.turn,
        after=lambda seconds: gate.answer((seconds, growth.bytes())),
        device=place,
    )
    persons = people(config, batch)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(
            Path(folder) / "run", config=config, kind="search" if searches else "train"
        )
        try:
            train_phase(
                network,
                run=run,
                optim=optim.model_copy(update={"batch_size": batch, "log_every": 1}),
                strategy=paced,
                phase="bench",
                dataset=persons,
                validation=persons,
            )
        except Enough:
            return


def yardstick_steps(gate: Gate, *, config: Config, batch: int, device: str) -> None:
    """A step of the yardstick at every turn; answers (seconds, peak bytes)."""
    place = torch.device(device)
    growth = Growth(place)
    step = released_steps(config, training_batch(config, batch, place), place)
    answer_turns(gate, lambda: (step(), growth.bytes()))


def compiled_steps(gate: Gate, *, config: Config, batch: int, device: str) -> None:
    """As own_steps, with nothing that an earlier process compiled."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        own_steps(gate, config=config, batch=batch, device=device)


def on_path(config: Config, path: str) -> Config:
    """The same with another ``model.path``."""
    model = config.model.model_copy(update={"path": path})
    return config.model_copy(update={"model": model})


def in_fp32(config: Config) -> Config:
    """The same search in fp32, whatever the device can do."""
    search = config.search.model_copy(update={"precision": "fp32"})
    return config.model_copy(update={"search": search})


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
