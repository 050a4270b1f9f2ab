"""Rows of the search step: its speed and its peak memory against the yardstick's."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping

from posefabric.bench.context import Bench, Place
from posefabric.bench.fresh import Fresh
from posefabric.bench.released import BASELINE
from posefabric.bench.rows import Line, Missing, Row, speed_row
from posefabric.bench.subjects import Subject
from posefabric.bench.timing import Rounds, interleaved, ratio_of
from posefabric.bench.training import on_path, own_steps, yardstick_steps
from posefabric.config import Config
from posefabric.structures import PosefabricError

PLAIN = "plain_path"
StepArm = tuple[Callable[..., None], Config]
# Moments of the optimiser are there from the second step on.
PEAK_STEPS = 3


def step_rounds(
    arms: Mapping[str, StepArm], *, batch: int, device: str, plan: Rounds
) -> dict[str, list[float]]:
    """Seconds of a training step by round and arm; each arm lives in a process of its own."""
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(Fresh(target, config=config, batch=batch, device=device))
            for name, (target, config) in arms.items()
        }

        def arm(name: str) -> Callable[[], float]:
            return lambda: processes[name].ask()[0]

        return interleaved({name: arm(name) for name in arms}, plan)


def against_yardstick(subject: Subject) -> dict[str, StepArm]:
    config = subject.config()
    return {"ours": (own_steps, config), "theirs": (yardstick_steps, config)}


def search_step(bench: Bench) -> Iterator[Line]:
    """A step of search: forward, loss, backward, optimiser, with all that the loop does."""
    for subject in bench.subjects:
        for place in bench.places(f"search_step.{subject.name}"):
            if isinstance(place, Missing):
                yield place
                continue
            try:
                yield from _step_rows(bench, subject, place)
            except PosefabricError as error:
                yield Missing(place.name, f"failed: {error}")


def _step_rows(bench: Bench, subject: Subject, place: Place) -> Iterator[Row]:
    """The default and, where that is another, the plain path; in the same rounds."""
    batch = subject.images(quick=bench.quick)
    plan = bench.within(bench.effort.steps)
    arms = against_yardstick(subject)
    names = {"ours": place.name}
    if place.device == "cpu":
        arms[PLAIN] = (own_steps, on_path(subject.config(), "plain"))
        names[PLAIN] = f"{place.name}.{PLAIN}"
    took = step_rounds(arms, batch=batch, device=place.device, plan=plan)
    for arm, name in names.items():
        yield speed_row(
            name,
            ours=took[arm],
            theirs=took["theirs"],
            count=batch,
            baseline=BASELINE,
            conditions={"batch": batch, "device": place.device},
        )


def peak_memory(bench: Bench) -> Iterator[Line]:
    """The peak of a step of search above its process's start; each in a new interpreter."""
    for subject in bench.subjects:
        for place in bench.places(f"memory.{subject.name}"):
            if isinstance(place, Missing):
                yield place
                continue
            yield bench.attempt(place.name, functools.partial(_peak_row, bench, subject, place))


def _peak_row(bench: Bench, subject: Subject, place: Place) -> Row:
    batch, device = subject.images(quick=bench.quick), place.device
    peaks: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(bench.effort.processes_memory):
        for arm, (target, config) in against_yardstick(subject).items():
            with Fresh(target, alone=True, config=config, batch=batch, device=device) as process:
                peaks[arm].append([process.ask()[1] for _ in range(PEAK_STEPS)][-1])
    return memory_row(place.name, peaks, conditions={"batch": batch, "device": device})


def memory_row(name: str, peaks: Mapping[str, list[float]], *, conditions: dict) -> Row:
    """Ours over theirs, of peak bytes by process."""
    return Row(
        name=name,
        ratio=ratio_of(peaks["ours"], peaks["theirs"]),
        baseline=BASELINE,
        unit="of the baseline's peak memory",
        better="less",
        ours=statistics.median(peaks["ours"]) / 2**20,
        theirs=statistics.median(peaks["theirs"]) / 2**20,
        measure="MiB above the process's start",
        conditions={**conditions, "rounds": len(peaks["ours"])},
    )
