"""The permutation test and the bootstrap against scipy and numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from posefabric.structures import PosefabricError
from posefabric.study.statistics import (
    interval_over_runs,
    percentile_interval,
    permutation_test,
    person_weights,
    resampled_shares,
    smallest_p,
)


def difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)


@pytest.mark.parametrize("sizes", [(3, 3), (3, 8), (5, 2), (2, 6)])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.8, 5.0])
def test_the_exact_permutation_test_is_scipys(sizes: tuple[int, int], shift: float) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(shift, size=sizes[0]), generator.normal(size=sizes[1])
    expected = stats.permutation_test(
        (a, b), difference, alternative="greater", n_resamples=np.inf, vectorized=True
    )
    p, exact = permutation_test(a, b)
    assert exact and p == pytest.approx(expected.pvalue, abs=1e-12)


def test_the_permutation_test_by_hand() -> None:
    # Of the six deals of two, only {3, 4} has as much; with {2, 4} beside it, two.
    assert permutation_test([3, 4], [1, 2]) == (pytest.approx(1 / 6), True)
    assert permutation_test([2, 4], [1, 3]) == (pytest.approx(2 / 6), True)
    assert permutation_test([1, 2], [3, 4]) == (1.0, True)
    assert permutation_test([0.1, 0.1], [0.1, 0.1, 0.1]) == (1.0, True), "ties count as much"
    with pytest.raises(PosefabricError, match="each side"):
        permutation_test([], [1.0])


def test_many_runs_are_dealt_at_random() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(0.5, size=14), generator.normal(size=14)
    p, exact = permutation_test(a, b)
    expected = stats.permutation_test(
        (a, b),
        difference,
        alternative="greater",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    assert not exact and p == pytest.approx(expected.pvalue, abs=0.01)
    assert permutation_test(a, b) == (p, False), "the same draws again"
    assert permutation_test(a + 100, b)[0] == pytest.approx(1e-4), "never 0"


def test_the_smallest_p() -> None:
    assert smallest_p(3, 3) == pytest.approx(1 / 20)
    assert smallest_p(3, 8) == permutation_test([9, 8, 7], range(-8, 0))[0]
    assert smallest_p(14, 14) == pytest.approx(1e-4)


def test_the_interval_over_persons_is_scipys() -> None:
    generator = np.random.default_rng(2)
    counted = generator.integers(0, 15, size=300)
    found = generator.binomial(counted, 0.6)

    def share(f: np.ndarray, c: np.ndarray, axis: int = -1) -> np.ndarray:
        return f.sum(axis=axis) / c.sum(axis=axis)

    expected = stats.bootstrap(
        (found, counted),
        share,
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    shares = resampled_shares([found], [counted], person_weights(300))
    assert percentile_interval(shares) == pytest.approx(tuple(expected), abs=0.004)


def test_resampled_shares_by_hand() -> None:
    weights = np.array([[1, 1, 1], [3, 0, 0], [0, 1, 2]], dtype=np.float32)
    found, counted = np.array([4, 0, 1]), np.array([4, 4, 2])
    first = [5 / 10, 1, 2 / 8]
    assert resampled_shares([found], [counted], weights) == pytest.approx(first)
    # The mean over runs of each one's share.
    both = resampled_shares([found, counted], [counted, counted], weights)
    assert both == pytest.approx([(value + 1) / 2 for value in first])


def test_resamples_draw_as_many_persons_as_there_are() -> None:
    weights = person_weights(50, resamples=200)
    assert weights.shape == (200, 50) and set(weights.sum(axis=1)) == {50}
    assert weights.mean() == 1 and weights.max() > 2
    assert np.array_equal(weights, person_weights(50, resamples=200))


def test_the_interval_over_runs() -> None:
    low, high = interval_over_runs([5, 6, 7], [1, 2, 3]) or (0, 0)
    assert 2 <= low < 4 < high <= 6
    assert interval_over_runs([5], [1]) is None
