"""Is it more than chance: permutation test over runs, bootstrap over persons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from posefabric.structures import PosefabricError

MOST_EXACT = 50_000
DRAWS = 9_999
RESAMPLES = 2_000
COVERAGE = 0.95
# Sums of the same runs in another order differ in the last bits.
_SAME = 1e-12


def permutation_test(
    better: Sequence[float], than: Sequence[float], *, seed: int = 0
) -> tuple[float, bool]:
    """One-sided p of mean(better) - mean(than) > 0 over all ways to deal the runs; if exact.

    The share of deals whose difference is at least what was found, the deal itself among them.
    All deals are counted while there are at most 50,000; then 9,999 drawn ones and the deal
    itself (Phipson and Smyth, 2010). Raises PosefabricError when a side has no run.
    """
    a, b = np.asarray(better, dtype=np.float64), np.asarray(than, dtype=np.float64)
    if not len(a) or not len(b):
        raise PosefabricError("a permutation test needs a run on each side")
    runs = np.concatenate([a, b])
    total, count = runs.sum(), len(a)

    def difference(sums: np.ndarray) -> np.ndarray:
        return sums / count - (total - sums) / len(b)

    found = float(difference(a.sum()))
    tolerance = _SAME * max(1.0, float(np.abs(runs).max()))
    if math.comb(len(runs), count) <= MOST_EXACT:
        deals = np.array(list(itertools.combinations(range(len(runs)), count)))
        exceeding = difference(runs[deals].sum(axis=1)) >= found - tolerance
        return float(exceeding.mean()), True
    generator = np.random.default_rng(seed)
    drawn = generator.permuted(np.tile(runs, (DRAWS, 1)), axis=1)[:, :count].sum(axis=1)
    exceeding = int((difference(drawn) >= found - tolerance).sum())
    return (exceeding + 1) / (DRAWS + 1), False


def smallest_p(better: int, than: int) -> float:
    """The least p that a permutation test of so many runs can give."""
    deals = math.comb(better + than, better)
    return 1 / (deals if deals <= MOST_EXACT else DRAWS + 1)


def resampled_shares(
    found: Sequence[np.ndarray], counted: Sequence[np.ndarray], weights: np.ndarray
) -> np.ndarray:
    """Mean over runs of the share found, under each resample of the persons: (R,).

    ``found`` and ``counted``: (N,) counts a person, one pair a run, over the same persons;
    ``weights`` (R, N): how often a resample draws a person.
    """
    shares = [
        (weights @ run_found) / np.maximum(weights @ run_counted, 1)
        for run_found, run_counted in zip(found, counted, strict=True)
    ]
    return np.mean(shares, axis=0)


def person_weights(persons: int, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(R, N): how often each of N persons is drawn in a bootstrap resample of N."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(persons, np.full(persons, 1 / persons), size=resamples)
    # Half the memory; sums of counts stay far below 2**24, and so exact.
    return drawn.astype(np.float32)


def percentile_interval(values: np.ndarray, coverage: float = COVERAGE) -> tuple[float, float]:
    """The middle ``coverage`` of resampled values (the percentile bootstrap)."""
    low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def interval_over_runs(
    better: Sequence[float], than: Sequence[float], *, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap interval of the difference of means over runs, for measures without persons.

    None where both sides are a single run, whose spread is not known.
    """
    a, b = np.asarray(better, dtype=np.float64), np.asarray(than, dtype=np.float64)
    if len(a) < 2 and len(b) < 2:
        return None
    generator = np.random.default_rng(seed)
    means = [
        side[generator.integers(0, len(side), size=(RESAMPLES, len(side)))].mean(axis=1)
        for side in (a, b)
    ]
    return percentile_interval(means[0] - means[1])
