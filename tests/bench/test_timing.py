"""Rounds are interleaved, end in time, and a ratio points the right way."""

from __future__ import annotations

import math

import pytest
from bench_parts import FakeClock

from posefabric.bench.timing import Rounds, interleaved, ratio_of, spread_of, stopwatch
from posefabric.structures import PosefabricError


def test_rounds_go_forth_and_back_and_the_warmup_does_not_count() -> None:
    order: list[str] = []

    def arm(name: str, took: float):
        return lambda: order.append(name) or took

    took = interleaved(
        {"a": arm("a", 1.0), "b": arm("b", 2.0)}, Rounds(warmup=1, rounds=2, least=2)
    )
    assert took == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert order == ["a", "b", "a", "b", "b", "a"]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (5.5, 3), (math.inf, 4)])
def test_no_round_begins_after_the_time_but_the_least(seconds: float, rounds: int) -> None:
    clock = FakeClock()

    def arm() -> float:
        clock.now += 2.0
        return 2.0

    plan = Rounds(warmup=3, rounds=4, least=2, seconds=seconds)
    assert len(interleaved({"a": arm}, plan, clock=clock)["a"]) == rounds


def test_a_stopwatch_waits_for_the_device_before_and_after() -> None:
    clock = FakeClock()

    def work() -> None:
        clock.now += 3.0

    def wait() -> None:
        clock.now += 10.0

    assert stopwatch(work, clock=clock)() == 3.0
    assert stopwatch(work, wait=wait, clock=clock)() == 13.0


def test_twice_as_fast_is_two() -> None:
    found = ratio_of([4.0, 6.0, 8.0], [2.0, 3.0, 2.0])
    assert found.median == 2.0
    assert found.low == 2.0 and found.high == pytest.approx(3.6)


def test_the_spread_is_of_ratios_round_by_round() -> None:
    # A load that doubles both sides of a round leaves its ratio alone.
    found = ratio_of([3.0, 6.0, 12.0], [1.0, 2.0, 4.0])
    assert (found.low, found.median, found.high) == (3.0, 3.0, 3.0)
    assert spread_of([7.0]).low == 7.0


@pytest.mark.parametrize(
    ("above", "below"), [([1.0], []), ([], []), ([1.0], [0.0]), ([math.nan], [1.0])]
)
def test_what_is_no_ratio_is_refused(above, below) -> None:
    with pytest.raises(PosefabricError, match="a ratio"):
        ratio_of(above, below)


def test_a_plan_that_measures_nothing_is_refused() -> None:
    with pytest.raises(PosefabricError, match="least <= rounds"):
        interleaved({}, Rounds(rounds=1, least=2))
