"""Rows of the search step: its speed and its peak memory against the yardstick's."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping

import torch

from posefabric.bench.context import Bench, Place
from posefabric.bench.fresh import Fresh
from posefabric.bench.released import BASELINE
from posefabric.bench.rows import Line, Missing, Row, speed_row
from posefabric.bench.subjects import Subject
from posefabric.bench.timing import Rounds, interleaved, ratio_of
from posefabric.bench.training import in_fp32, on_path, own_steps, yardstick_steps
from posefabric.config import Config
from posefabric.structures import PosefabricError
from posefabric.train.precision import resolve_precision

PLAIN, FP32 = "plain_path", "fp32"
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
    """The default and, where those are others, the plain path and fp32; in the same rounds.

    A quick bench has the default alone.
    """
    batch, device = subject.images(quick=bench.quick), place.device
    plan = bench.within(bench.effort.steps)
    config = subject.config()
    precision = resolve_precision(config.search.precision, torch.device(device))
    arms = against_yardstick(subject)
    rows = {"ours": (place.name, precision)}
    if device == "cpu" and not bench.quick:
        arms[PLAIN] = (own_steps, on_path(config, "plain"))
        rows[PLAIN] = (f"{place.name}.{PLAIN}", precision)
    if precision != FP32 and not bench.quick:
        arms[FP32] = (own_steps, in_fp32(config))
        rows[FP32] = (f"{place.name}.{FP32}", FP32)
    took = step_rounds(arms, batch=batch, device=device, plan=plan)
    for arm, (name, used) in rows.items():
        yield speed_row(
            name,
            ours=took[arm],
            theirs=took["theirs"],
            count=batch,
            baseline=BASELINE,
            conditions={"batch": batch, "device": device, "precision": used},
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
    precision = resolve_precision(subject.config().search.precision, torch.device(device))
    conditions = {"batch": batch, "device": device, "precision": precision}
    return memory_row(place.name, peaks, conditions=conditions)


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
