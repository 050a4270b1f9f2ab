"""What a check of a data set found: problems, counts, and the text for the terminal."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from posefabric.data.sides import USUAL_RATE, SideReport


@dataclass(frozen=True)
class Problem:
    """One finding: an ``error`` stops reading or spoils results, a ``warning`` deserves a look.

    Attributes:
        kind: a short name; findings of one kind are listed together.
        file: the annotation file or the picture.
        annotation_id: None when it is not about one annotation.
    """

    severity: Literal["error", "warning"]
    kind: str
    file: str
    annotation_id: int | None
    text: str


@dataclass
class CheckReport:
    """``counts`` says what was seen, ``suspects`` which annotations to look at first."""

    annotations: str
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    suspects: list[int] = field(default_factory=list)
    sides: SideReport | None = None

    @property
    def ok(self) -> bool:
        """No errors; there may be warnings."""
        return all(problem.severity != "error" for problem in self.problems)

    def lines(self, examples: int = 5) -> list[str]:
        """Text for the terminal: counts, then ``examples`` findings of each kind, errors first."""
        lines = [self.annotations]
        lines += [f"  {count:>8,} {what}" for what, count in self.counts.items()]
        if self.sides is not None and self.sides.persons.measured:
            rate = self.sides.persons
            lines.append(
                f"  left and right disagree in {rate.opposed} of {rate.measured} persons "
                f"({rate.rate:.1%}; up to {USUAL_RATE:.0%} is usual)"
            )
        kinds: dict[tuple[str, str], list[Problem]] = defaultdict(list)
        for problem in sorted(self.problems, key=lambda problem: problem.severity):
            kinds[problem.severity, problem.kind].append(problem)
        for (severity, kind), found in kinds.items():
            lines.append(f"{severity.upper()} {kind}: {len(found)}")
            lines += [f"    {problem.text}" for problem in found[:examples]]
            if len(found) > examples:
                lines.append(f"    ... and {len(found) - examples} more")
        errors = sum(problem.severity == "error" for problem in self.problems)
        lines.append(f"{errors} errors, {len(self.problems) - errors} warnings")
        return lines
