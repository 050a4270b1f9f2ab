"""One line of the bench: a ratio with its spread, or why there is none."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from posefabric.bench.timing import Ratio, ratio_of

Better = Literal["more", "less"]


@dataclass(frozen=True)
class Row:
    """A measured ratio.

    Attributes:
        name: begins with its group, as ``search_step.``.
        ratio: with its spread over the rounds.
        baseline: what it is against.
        unit: what the ratio counts.
        better: whether a larger or a smaller ratio is good.
        ours, theirs: the two medians, in ``measure``; of this machine under its load, for a
            feeling only.
        conditions: batch size, rounds, device, precision and the like.
    """

    name: str
    ratio: Ratio
    baseline: str
    unit: str
    better: Better = "more"
    ours: float | None = None
    theirs: float | None = None
    measure: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return {
            "name": self.name,
            "ratio": self.ratio.median,
            "low": self.ratio.low,
            "high": self.ratio.high,
            "baseline": self.baseline,
            "unit": self.unit,
            "better": self.better,
            "ours": self.ours,
            "theirs": self.theirs,
            "measure": self.measure,
            "conditions": dict(self.conditions),
        }


@dataclass(frozen=True)
class Missing:
    """A row that could not be measured here, and why."""

    name: str
    reason: str

    def record(self) -> dict[str, str]:
        return {"name": self.name, "reason": self.reason}


Line: TypeAlias = "Row | Missing"


def speed_row(
    name: str,
    *,
    ours: Sequence[float],
    theirs: Sequence[float],
    count: int,
    baseline: str,
    what: str = "images/s",
    per: str = "image",
    conditions: Mapping[str, Any] | None = None,
) -> Row:
    """A row of seconds by round: how many times the baseline's ``what`` ours has.

    ``count``: images (or what else ``per`` names) that a round computes, on both sides.
    """
    return Row(
        name=name,
        ratio=ratio_of(theirs, ours),
        baseline=baseline,
        unit=f"times the baseline's {what}",
        ours=1e3 * statistics.median(ours) / count,
        theirs=1e3 * statistics.median(theirs) / count,
        measure=f"ms {'an' if per[0] in 'aeiou' else 'a'} {per}",
        conditions={**(conditions or {}), "rounds": len(ours)},
    )
