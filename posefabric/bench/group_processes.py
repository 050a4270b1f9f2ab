"""Rows of several processes: one training in two against the same in one with two threads."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posefabric.bench.context import Bench
from posefabric.bench.machine import usable_cores
from posefabric.bench.rows import Line, Missing, speed_row
from posefabric.bench.subjects import Subject
from posefabric.structures import PosefabricError

PROCESSES = 2
BATCH = 16
# Steps that do not count: libraries start, and the crops of the first epoch are drawn.
WARM_STEPS = 2
PATIENCE_S = 600
# What three commands need, to begin at all.
SECONDS = 60.0
ALONE, SHARED, OWN = "alone", "shared", "own"
# Of two processes: norms that see the whole batch, and each its share of it.
ROWS = {SHARED: "", OWN: ".own_norms"}


def processes(bench: Bench) -> Iterator[Line]:
    """Whole commands, `posefabric search`, that train the last subject on synthetic people."""
    subject = bench.subjects[-1]
    name = f"processes.gloo{PROCESSES}.{subject.name}"
    late = bench.too_late(name, needs=SECONDS) or impossible(name)
    if late is not None:
        yield late
        return
    took: dict[str, list[float]] = {arm: [] for arm in (*ROWS, ALONE)}
    for turn in range(bench.effort.launches):
        for arm in list(took) if turn % 2 == 0 else list(took)[::-1]:
            folder = bench.folder / f"processes-{turn}-{arm}"
            launch(
                command(subject, folder, arm=arm, steps=bench.effort.launch_steps),
                threads=PROCESSES if arm == ALONE else 1,
            )
            took[arm].append(step_seconds(folder, skip=WARM_STEPS))
            shutil.rmtree(folder)
        if bench.too_late(name) is not None:
            break
    for arm, ending in ROWS.items():
        yield speed_row(
            name + ending,
            ours=took[arm],
            theirs=took[ALONE],
            count=BATCH,
            baseline=f"one process with {PROCESSES} threads, the same batch",
            conditions={
                "batch": BATCH,
                "steps": bench.effort.launch_steps - WARM_STEPS,
                "device": "cpu",
                "processes": PROCESSES,
            },
        )


def impossible(name: str) -> Missing | None:
    """Why two processes cannot be measured here."""
    if importlib.util.find_spec("posefabric.distributed") is None:
        return Missing(name, "this posefabric trains in one process only")
    if usable_cores() < PROCESSES:
        return Missing(name, f"needs {PROCESSES} cores, this process may use {usable_cores()}")
    return None


def command(subject: Subject, folder: Path, *, arm: str, steps: int) -> list[str]:
    """The training as a command, in one process (``alone``) or in two, by the norms they have."""
    together = arm != ALONE
    start = [sys.executable, "-m"]
    if together:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", "-m"]
    threads = 1 if together else PROCESSES
    # One epoch is drawn, the others come from the cache.
    options = {
        "device": "cpu",
        "threads": threads,
        "sync_norms": str(arm != OWN).lower(),
        "data.format": "synthetic",
        "data.synthetic_train": BATCH,
        "data.synthetic_val": 2,
        "search.batch_size": BATCH,
        "search.epochs": steps,
        "search.log_every": 1,
    }
    given = subject.words(*(f"{key}={value}" for key, value in options.items()))
    words = ["posefabric", "search", *([subject.base] if subject.base else []), *given]
    return [*start, *words, "--out", str(folder)]


def launch(words: Sequence[str], *, threads: int) -> None:
    """Run a command to its end. Raises PosefabricError with its last lines when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            list(words),
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PosefabricError(f"{' '.join(words)}: not done in {PATIENCE_S} s") from error
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise PosefabricError(f"{' '.join(words)}: exit code {done.returncode}: {tail}")


def step_seconds(folder: Path, *, skip: int) -> float:
    """Mean seconds of a step of a run after the first ``skip``, by its own record.

    metrics.jsonl has the images a second since the start of the training.
    """
    passed = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        if "images_per_s" in record:
            step = int(record["step"])
            passed[step] = step * BATCH / float(record["images_per_s"])
    last = max(passed, default=0)
    if skip not in passed or last <= skip:
        raise PosefabricError(f"{folder}: has no record of steps {skip} and later")
    return (passed[last] - passed[skip]) / (last - skip)
