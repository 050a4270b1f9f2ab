"""Runs the groups of the bench one after another and gathers what they found."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posefabric.bench import (
    group_compile,
    group_evaluation,
    group_inference,
    group_loader,
    group_processes,
    group_shipped,
    group_steps,
)
from posefabric.bench.context import FULL, QUICK, Bench, Effort
from posefabric.bench.fresh import once
from posefabric.bench.machine import describe_machine
from posefabric.bench.report import bench_record
from posefabric.bench.roofline import roofline
from posefabric.bench.rows import Line, Missing
from posefabric.bench.stages import stage_rounds, stage_table
from posefabric.bench.subjects import SUBJECTS, Subject
from posefabric.structures import PosefabricError

Part = Callable[[Bench], Iterator[Line]]

# Should the time run out, the last ones miss it.
GROUPS: dict[str, tuple[Part, ...]] = {
    "search_step": (group_steps.search_step,),
    "inference": (group_inference.inference,),
    "memory": (group_steps.peak_memory,),
    "shipped": (group_shipped.shipped,),
    "loader": (group_loader.waiting, group_loader.memory),
    "evaluation": (group_evaluation.images, group_evaluation.oks),
    "processes": (group_processes.processes,),
    "peers": (group_shipped.peers_in_runtimes, group_inference.peers_in_eager),
    "compile": (group_compile.compiled_path,),
}
PROFILE = "profile"
PEAK_SECONDS = {True: 1.0, False: 4.0}


@dataclass
class Found:
    """What a bench found.

    Attributes:
        machine: see describe_machine.
        lines: rows, measured and not.
        roofline: the machine's peaks; None when the profile was not asked for.
        profiles: subject to its stages (see stage_table), or to {"not_measured": reason}.
        seconds: what the bench took.
    """

    machine: dict[str, Any]
    quick: bool
    lines: list[Line] = field(default_factory=list)
    roofline: dict[str, Any] | None = None
    profiles: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return bench_record(
            self.machine,
            self.lines,
            roofline=self.roofline,
            profiles=self.profiles,
            quick=self.quick,
            seconds=self.seconds,
        )


def run_bench(
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    subjects: Sequence[Subject] = SUBJECTS,
    effort: Effort | None = None,
    groups: dict[str, tuple[Part, ...]] | None = None,
) -> Found:
    """Measure the groups ``only`` (none: all, and the profile); see docs/bench.md.

    What fails is a row that says so: one network too large for the memory does not end the
    bench. Raises PosefabricError for a group that there is not.
    """
    known = GROUPS if groups is None else groups
    check_groups(only, known)
    chosen = [name for name in in_order(known) if not only or name in only]
    with tempfile.TemporaryDirectory(prefix="posefabric-bench-") as folder:
        bench = Bench(
            quick=quick,
            effort=effort or (QUICK if quick else FULL),
            folder=Path(folder),
            say=say,
            subjects=subjects,
        )
        found = Found(machine=describe_machine(), quick=quick)
        began = time.monotonic()
        for name in chosen:
            say(f"measuring {name}, {max(0.0, bench.left()):.0f} s left")
            if name == PROFILE:
                measure_profile(bench, found)
            for part in known.get(name, ()):
                found.lines += _guarded(name, part, bench)
        found.seconds = time.monotonic() - began
    return found


def in_order(known: Iterable[str]) -> list[str]:
    """The groups as they are measured: the profile before the peers, who take longest."""
    names = list(known)
    names.insert(names.index("peers") if "peers" in names else len(names), PROFILE)
    return names


def check_groups(only: Sequence[str], known: Sequence[str] | dict[str, Any] = GROUPS) -> None:
    """PosefabricError for a name that is no group."""
    for name in only:
        if name not in known and name != PROFILE:
            raise PosefabricError(
                f"--only {name}: no such group; there are {', '.join([*known, PROFILE])}"
            )


def _guarded(name: str, part: Part, bench: Bench) -> list[Line]:
    lines: list[Line] = []
    try:
        for line in part(bench):
            lines.append(line)
    except PosefabricError as error:
        lines.append(Missing(f"{name}.{part.__name__}", f"failed: {error}"))
    return lines


def measure_profile(bench: Bench, found: Found) -> None:
    """The roofline, and the stages of a step of every subject against it."""
    try:
        peaks = once(roofline, device="cpu", seconds=PEAK_SECONDS[bench.quick])
    except PosefabricError as error:
        found.profiles = {subject.name: {"not_measured": str(error)} for subject in bench.subjects}
        return
    found.roofline = peaks
    for subject in bench.subjects:
        late = bench.too_late(f"{PROFILE}.{subject.name}")
        if late is not None:
            found.profiles[subject.name] = {"not_measured": late.reason}
            continue
        batch = subject.images(quick=bench.quick)
        root = bench.pictures(subject.config().data.skeleton)
        config = subject.config(f"data.root={root}", "data.cache=false", *group_loader.MADE)
        try:
            stages = once(
                stage_rounds,
                config=config,
                batch=batch,
                device="cpu",
                plan=bench.within(bench.effort.steps),
            )
        except PosefabricError as error:
            found.profiles[subject.name] = {"not_measured": str(error)}
            continue
        found.profiles[subject.name] = stage_table(stages, peaks, batch=batch)
