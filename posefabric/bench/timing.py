"""Interleaved rounds of what is compared, and the ratio with its spread that comes of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from posefabric.structures import PosefabricError

Clock = Callable[[], float]
Arm = Callable[[], float]
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and their first and last decile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Rounds:
    """How often a comparison is repeated.

    Attributes:
        warmup, rounds: rounds that do not count, and at most so many that do.
        least: rounds that are made however long they take.
        seconds: after these no further round begins.
    """

    warmup: int = 1
    rounds: int = 7
    least: int = 3
    seconds: float = math.inf


def interleaved(
    arms: Mapping[str, Arm], plan: Rounds, *, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """What each arm says it took, round by round; every round runs each of them once.

    An arm computes once and returns its own measurement, so that what it does before and after
    does not count. Every other round goes backwards: nobody always follows the same neighbour,
    and a load that comes or goes meets all of them.
    """
    if plan.least < 1 or plan.rounds < plan.least or plan.warmup < 0:
        raise PosefabricError(f"rounds: expected 1 <= least <= rounds and warmup >= 0, got {plan}")
    for _ in range(plan.warmup):
        for arm in arms.values():
            arm()
    took: dict[str, list[float]] = {name: [] for name in arms}
    started = clock()
    for turn in range(plan.rounds):
        if turn >= plan.least and clock() - started >= plan.seconds:
            break
        order = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in order:
            took[name].append(arms[name]())
    return took


def stopwatch(
    work: Callable[[], object],
    *,
    wait: Callable[[], object] | None = None,
    clock: Clock = time.perf_counter,
) -> Arm:
    """An arm that times ``work``; ``wait`` returns when a device has done what it was given."""

    def arm() -> float:
        if wait is not None:
            wait()
        started = clock()
        work()
        if wait is not None:
            wait()
        return clock() - started

    return arm


def ratio_of(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The spread of ``above / below``, round by round.

    A speed against a baseline is ``ratio_of(baseline seconds, our seconds)``: above 1 is faster.
    Raises PosefabricError when the rounds do not pair, or one took no time.
    """
    if len(above) != len(below) or not above:
        raise PosefabricError(
            f"a ratio of {len(above)} and {len(below)} rounds: expected as many of each, at least "
            f"one"
        )
    if min(below) <= 0 or not all(math.isfinite(value) for value in (*above, *below)):
        raise PosefabricError(f"a ratio over {list(below)}: expected positive, finite values")
    return spread_of([a / b for a, b in zip(above, below, strict=True)])


def spread_of(values: Sequence[float]) -> Ratio:
    """Median, first and last decile (interpolated between the values) of at least one value."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), QUANTILES)
    return Ratio(median=float(median), low=float(low), high=float(high))
