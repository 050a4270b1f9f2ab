"""Claims of a study file held against its rows: effect, interval, p, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posefabric.study.hits import BY_PERSON, Hits
from posefabric.study.plan import Claim
from posefabric.study.rows import Row
from posefabric.study.statistics import interval_over_runs, permutation_test, smallest_p

# Shares, which are told in points of 100.
POINTS = ("PCK", "PCK_limbs", "AP")


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        effect: mean of the better side minus mean of the other, in points of 100 for shares.
        interval: 95 %, of the same; None where it cannot be told.
        p: one-sided, over runs; None where a side has no run.
        holds: None where runs are missing.
        text: the same in plain words.
    """

    claim: str
    effect: float | None
    interval: tuple[float, float] | None
    p: float | None
    holds: bool | None
    text: str

    def as_json(self) -> dict[str, Any]:
        return {
            "claim": self.claim,
            "effect": self.effect,
            "interval": None if self.interval is None else list(self.interval),
            "p": self.p,
            "holds": self.holds,
        }


def judge(claim: Claim, rows: Sequence[Row], hits: Hits, *, budget: str = "") -> Verdict:
    """Hold a claim against the finished rows of one budget.

    ``than``: all runs of these arms are one side; the claim holds when the effect is above 0 and
    p below ``alpha``. ``not_below``: it holds when the mean is at least that of the best of these
    arms, less ``margin``; p is then that of being better than it.
    """
    title = claim.claim + (f" ({budget})" if budget else "")
    sides = {name: _of(rows, name, claim.measure) for name in _arms(claim)}
    missing = [name for name, found in sides.items() if not found]
    if missing:
        text = f"Not decided: no finished run with {claim.measure} of {', '.join(missing)}."
        return Verdict(title, None, None, None, None, text)
    better = sides[claim.better]
    if claim.than:
        other = [row for name in claim.than for row in sides[name]]
        against = " and ".join(claim.than)
    else:
        against = max(claim.not_below, key=lambda name: _mean(sides[name], claim.measure))
        other = sides[against]
    unit = 100.0 if claim.measure in POINTS else 1.0
    effect = unit * (_mean(better, claim.measure) - _mean(other, claim.measure))
    values = [[row[claim.measure] for row in side] for side in (better, other)]
    p, exact = permutation_test(*values)
    if claim.measure in BY_PERSON:
        interval = hits.paired_interval(better, other, claim.measure)
    else:
        interval = interval_over_runs(*values)
    if interval is not None:
        interval = (unit * interval[0], unit * interval[1])
    holds = effect > 0 and p < claim.alpha if claim.than else effect >= -claim.margin
    text = _sentence(claim, against, effect, interval, p, exact, holds, len(better), len(other))
    return Verdict(title, effect, interval, p, bool(holds), text)


def _arms(claim: Claim) -> tuple[str, ...]:
    return (claim.better, *claim.than, *claim.not_below)


def _of(rows: Sequence[Row], arm: str, measure: str) -> list[Row]:
    return [row for row in rows if row["arm"] == arm and row.get(measure) is not None]


def _mean(rows: Sequence[Row], measure: str) -> float:
    return float(np.mean([row[measure] for row in rows]))


def _sentence(
    claim: Claim,
    against: str,
    effect: float,
    interval: tuple[float, float] | None,
    p: float,
    exact: bool,
    holds: bool,
    runs: int,
    other_runs: int,
) -> str:
    unit = " points" if claim.measure in POINTS else ""
    best = "the best of them, " if claim.not_below and len(claim.not_below) > 1 else ""
    pieces = [
        f"{'Holds' if holds else 'Does not hold'}: {claim.better} has {abs(effect):.2f}{unit} "
        f"{'more' if effect >= 0 else 'less'} {claim.measure} than {best}{against} "
        f"({runs} against {other_runs} runs"
    ]
    if interval is not None:
        over = "persons" if claim.measure in BY_PERSON else "runs"
        pieces[0] += f"; 95 % over {over}: {interval[0]:.2f} to {interval[1]:.2f}"
    pieces[0] += f"; p = {p:.3g}{'' if exact else ', drawn'})."
    least = smallest_p(runs, other_runs)
    if claim.than and least >= claim.alpha:
        pieces.append(
            f"With so few runs p cannot be below {least:.3g}, so that no effect could pass "
            f"{claim.alpha:g}: more seeds are needed."
        )
    return " ".join(pieces)
