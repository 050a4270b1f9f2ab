"""Small trainings on synthetic people, for tests of the loop and of what surrounds it.

As a script it trains in a folder: ``python trainings.py FOLDER CASE [--die-at-write N]``.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posefabric.config import Config, OptimConfig, config_from_tree
from posefabric.data.pipeline import TrainingData
from posefabric.data.synthetic import synthetic_people
from posefabric.models.build import build_supernet
from posefabric.run import RunFolder
from posefabric.search.run_search import STRATEGIES
from posefabric.skeletons import load_skeleton
from posefabric.structures import PersonDataset
from posefabric.train.loop import Trainer, TrainingStopped
from posefabric.train.strategy import Strategy

PEOPLE, BATCH = 16, 4
STEPS = 10

CASES: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "averaged": dict(search=dict(ema=0.9, evaluate_every=0.75)),
    "sparsemax": dict(
        search=dict(
            relaxation="sparsemax",
            architecture_start=0.1,
            temperature_end=0.1,
            sparsity=0.1,
            source_sparsity=0.05,
            sparsity_start=0.2,
            ema=0.5,
        )
    ),
    "random": dict(search=dict(strategy="random", schedule="steps", loss="mse", ema=0.9)),
    "first_order": dict(
        search=dict(
            strategy="first_order",
            epochs=5.0,
            ema=0.5,
            sparsity=0.1,
            sparsity_start=0.0,
            temperature_end=0.5,
        )
    ),
    "gumbel": dict(search=dict(strategy="gumbel", temperature_end=0.5)),
    "gates": dict(search=dict(strategy="gates", sparsity=0.1, source_sparsity=0.1)),
    "beta_decay": dict(search=dict(strategy="beta_decay", architecture_start=0.4)),
    "partial_channels": dict(search=dict(strategy="partial_channels")),
    "shrinking": dict(
        search=dict(strategy="shrinking", architecture_start=0.2, rounds=2, worth_persons=1),
        model=dict(parts=3, operations=["zero", "skip", "sep_conv_3x3"]),
    ),
    "shrinking_to_a_budget": dict(
        search=dict(
            strategy="shrinking",
            worth="probability",
            architecture_start=0.4,
            sources_left=3,
            budget="macs=9M",
        )
    ),
    "perturbation": dict(search=dict(strategy="perturbation", epochs=5.0)),
    "second_order": dict(search=dict(strategy="second_order", epochs=5.0)),
    "bf16": dict(search=dict(precision="bf16"), model=dict(head="vector", frozen_stem=True)),
}


def make_config(**sections: Any) -> Config:
    """64 pixels, the smallest backbone, STEPS steps over 2.5 epochs."""
    small: dict[str, Any] = {
        "device": "cpu",
        "data": dict(format="synthetic", input_wh=[64, 64], workers=0, synthetic_train=PEOPLE),
        "model": dict(backbone="test_efficientnet", weights="none", channel_factor=2, parts=1),
        "search": dict(
            strategy="synchronous", batch_size=BATCH, epochs=2.5, checkpoint_every=3, log_every=4
        ),
        "finetune": dict(batch_size=BATCH, epochs=1.0, checkpoint_every=2),
    }
    small["data"]["synthetic_val"] = 8
    for name, value in sections.items():
        small[name] = {**small.get(name, {}), **value} if isinstance(value, dict) else value
    return config_from_tree(small, origin="test")


@functools.cache
def people(count: int = PEOPLE, seed: int = 0) -> PersonDataset:
    return synthetic_people(
        count=count, seed=seed, skeleton=load_skeleton("coco17"), picture_wh=(64, 64)
    )


def make_trainer(
    folder: Path,
    config: Config,
    *,
    strategy: Strategy | None = None,
    dataset: PersonDataset | None = None,
    validate: Callable[[Any], dict[str, float]] | None = None,
    writes: bool = True,
) -> Trainer:
    """A trainer in a new or an existing run folder, as a fresh process would make it."""
    if writes:
        run = RunFolder.create(folder, config=config, kind="search", exist_ok=True)
    else:
        run = RunFolder.open(folder, writes=False)
    network = build_supernet(config)
    optim: OptimConfig = config.search
    strategy = strategy or STRATEGIES[config.search.strategy](config.search)
    data, held_out = TrainingData.open_split(
        config,
        share=strategy.held_out_share(),
        optim=optim,
        normalisation=network.normalisation,
        seed=config.seed,
        device=torch.device("cpu"),
        dataset=dataset or people(),
    )
    return Trainer(
        network=network,
        data=data,
        held_out=held_out,
        run=run,
        optim=optim,
        strategy=strategy,
        phase="search",
        seed=config.seed,
        device=torch.device("cpu"),
        sync_norms=config.sync_norms,
        validate=validate,
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every record, in order; JSON keeps a float to its last bit."""
    return [(r["step"], r["loss"]) for r in RunFolder.open(folder).metrics() if "loss" in r]


def die_at_write(number: int) -> None:
    """Kill this process in the middle of its write of that number under checkpoints/."""
    from posefabric.run import files

    count = 0
    write_all = files.write_all

    def dying(descriptor: int, data: bytes | memoryview) -> None:
        nonlocal count
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "checkpoints" in name:
            count += 1
            if count == number:
                os.write(descriptor, memoryview(data).cast("B")[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        write_all(descriptor, data)

    files.write_all = dying


def main(folder: str, case: str, *options: str) -> int:
    torch.set_num_threads(1)
    if options:
        die_at_write(int(options[1]))
    trainer = make_trainer(Path(folder), make_config(**CASES[case]))
    try:
        trainer.fit()
    except TrainingStopped:
        return 130
    torch.save(trainer.network.state_dict(), Path(folder) / "final.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
