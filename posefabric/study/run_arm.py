"""One run of a study: its steps in a run folder, each resumed or skipped, and its row."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from posefabric.budget import Budget
from posefabric.config import Config, with_overrides
from posefabric.data.pipeline import open_dataset
from posefabric.deploy.latency import ensure_table
from posefabric.derive.draw import draw_within
from posefabric.derive.fit_budget import latency_table
from posefabric.derive.run_derive import derive, finetune
from posefabric.evaluate.groups import with_learned_parts
from posefabric.models.build import build_baseline, build_supernet, load_network
from posefabric.models.supernet import Supernet
from posefabric.run import RunFolder
from posefabric.run.environment import describe_environment
from posefabric.run.header import now
from posefabric.search.run_search import STRATEGIES, search
from posefabric.study.commands import commands_of
from posefabric.study.compute import (
    epochs_for,
    looking_macs,
    network_macs,
    passes_of,
    total_cost,
    training_macs,
)
from posefabric.study.measure import measure_split
from posefabric.study.plan import PlannedRun
from posefabric.train.checkpoint import save_weights
from posefabric.train.from_start import train_from_start
from posefabric.train.loop import TrainingStopped
from posefabric.train.phase import headline

Row = dict[str, Any]


def run_arm(
    planned: PlannedRun,
    study: Path,
    *,
    reference: Mapping[str, Any] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Row:
    """Take a run through its steps in ``study/runs/``, from where it was left, and measure it.

    ``reference``: the finished row whose compute a run at equal compute gets. ``stopping`` is
    asked between steps. The counts a person go into ``study/counts/``.

    Raises TrainingStopped, after a checkpoint, when asked to stop.
    """
    path = study / "runs" / planned.folder
    try:
        config = with_learned_parts(planned.config)
        finished = STEPS[planned.steps](path, config, reference, stopping)
        _go_on(path, stopping)
        row = _measured(planned, finished, study)
    finally:
        # Each training freezes what it finds, this run's networks among it (train/phase.py).
        gc.unfreeze()
        gc.collect()
    return row


def _search(
    path: Path,
    config: Config,
    reference: Mapping[str, Any] | None,
    stopping: Callable[[], bool],
) -> RunFolder:
    run = RunFolder.create(path, config=config, kind="search", exist_ok=True)
    if run.state != "finished":
        with _failing_marked(run):
            ensure_table(run, config)
            search(run)
    return run


def _search_derive_finetune(
    path: Path,
    config: Config,
    reference: Mapping[str, Any] | None,
    stopping: Callable[[], bool],
) -> RunFolder:
    run = _search(path, config, reference, stopping)
    _go_on(path, stopping)
    derived = derived_of(run, config)
    _go_on(path, stopping)
    return finetuned_of(derived, config)


def _train(
    path: Path,
    config: Config,
    reference: Mapping[str, Any] | None,
    stopping: Callable[[], bool],
) -> RunFolder:
    """A baseline from the start; or, of a fabric, what its strategy begins with (random: a random
    architecture), derived by the section ``derive`` and trained from the start.
    """
    if config.model.network == "fabric":
        derived = derived_of(drawn_run(path, config), config)
        if reference is not None:
            macs = network_macs(load_network(derived), config)
            config = _with_compute_of(reference, config, macs)
        return finetuned_of(derived, config)
    if reference is not None:
        network = build_baseline(config, pretrained=False)
        config = _with_compute_of(reference, config, network_macs(network, config))
    run = RunFolder.create(path, config=config, kind="train", exist_ok=True)
    if run.state != "finished":
        with _failing_marked(run):
            train_from_start(run)
    return run


STEPS: dict[str, Callable[..., RunFolder]] = {
    "search": _search,
    "search+finetune": _search_derive_finetune,
    "train": _train,
}


def drawn_run(
    path: Path, config: Config, prepare: Callable[[Supernet], None] | None = None
) -> RunFolder:
    """A search of no steps: weights as they begin, alpha and beta as ``prepare`` sets them.

    ``prepare``: none, as the strategy begins; a random one under a budget is drawn until its
    derived network costs that much.
    """
    run = RunFolder.create(path, config=config, kind="search", exist_ok=True)
    if run.state != "finished":
        ensure_table(run, config)
        network = build_supernet(config)
        if prepare is None:
            _begin(network, run)
        else:
            prepare(network)
        save_weights(run.weights_path, network)
        run.write_text(run.architecture_path.name, network.architecture().to_json())
        run.set_state("finished", train_seconds=0.0)
    return run


def _begin(network: Supernet, run: RunFolder) -> None:
    config = run.config
    generator = torch.Generator().manual_seed(config.seed)
    STRATEGIES[config.search.strategy](config.search).prepare(network, generator)
    budget = config.derive.budget or config.search.budget
    if config.search.strategy == "random" and budget is not None:
        table = latency_table(run, budget)
        draw_within(network, generator, config.derive, Budget.parse(budget), table)


def derived_of(run: RunFolder, config: Config) -> RunFolder:
    """The compact network of a search run; the one it has, if it is finished."""
    for child in run.children():
        if child.kind == "derive" and child.state == "finished":
            return child
    child = run.new_child("derive", config)
    with _failing_marked(child):
        derive(run, child)
    return child


def finetuned_of(derived: RunFolder, config: Config) -> RunFolder:
    """The training of a compact network; the one that was begun, taken up."""
    begun = [child for child in derived.children() if child.kind == "train"]
    if begun:
        child = RunFolder.create(begun[-1].path, config=config, kind="train", exist_ok=True)
    else:
        child = derived.new_child("train", config)
    if child.state != "finished":
        with _failing_marked(child):
            finetune(derived, child)
    return child


def _with_compute_of(reference: Mapping[str, Any], config: Config, macs: int) -> Config:
    epochs = epochs_for(total_cost(reference["phases"]), macs=macs, config=config)
    return with_overrides(config, [f"finetune.epochs={epochs!r}"])


@contextlib.contextmanager
def _failing_marked(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if run.state == "running":
            run.set_state("failed")
        raise


def _go_on(path: Path, stopping: Callable[[], bool]) -> None:
    if stopping():
        raise TrainingStopped(f"{path}: stopped between two steps")


def _measured(planned: PlannedRun, finished: RunFolder, study: Path) -> Row:
    phases = _phases(finished)
    counts = Path("counts") / f"{planned.folder}.npz"
    measures = measure_split(finished, planned.config, "val", study / counts)
    environment = describe_environment()
    return {
        "arm": planned.arm,
        "budget": planned.budget,
        "seed": planned.seed,
        "hash": planned.key,
        "state": "finished",
        "steps": planned.steps,
        "compute": "epochs" if planned.reference is None else f"of {planned.reference}",
        **measures,
        "train_seconds": sum(phase["seconds"] for phase in phases),
        "train_cpu_seconds": sum(phase["cpu_seconds"] for phase in phases),
        "train_cost": total_cost(phases),
        "phases": phases,
        "folder": str(finished.path.relative_to(study.resolve())),
        "counts": str(counts),
        "commands": commands_of(planned, finished),
        "machine": {
            **{name: environment[name] for name in ("cpu", "cores", "posefabric", "git_commit")},
            "torch": environment["packages"].get("torch"),
            "threads": torch.get_num_threads(),
            "device": planned.config.device,
        },
        "finished": now(),
    }


def _phases(finished: RunFolder) -> list[dict[str, Any]]:
    """What was trained, first to last: a line a training, with its cost."""
    lineage: list[RunFolder] = []
    run: RunFolder | None = finished
    while run is not None:
        lineage.insert(0, run)
        run = run.parent
    phases = []
    for run in lineage:
        if not (run.path / "evaluation.json").is_file():
            continue
        result = run.read_json("evaluation.json")
        section = run.config.search if run.kind == "search" else run.config.finetune
        persons = result.get("train_persons", None)
        if persons is None:
            persons = len(open_dataset(run.config.data, "train"))
        steps = result["train_steps"]
        passes = passes_of(run.config.search.strategy) if run.kind == "search" else 1
        phases.append(
            {
                "phase": "search" if run.kind == "search" else "finetune",
                "epochs": section.epochs,
                "steps": steps,
                "persons": steps * min(section.batch_size, persons),
                "passes": passes,
                "macs": training_macs(run),
                "looking_macs": looking_macs(run),
                "seconds": result["train_seconds"],
                "cpu_seconds": result["train_cpu_seconds"],
                "precision": result["train_precision"],
                "skipped_steps": result["skipped_steps"],
                "PCK": headline(result).get("PCK"),
            }
        )
    return phases
