"""Rows of torch.compile: a step of the compiled path against the two others, and the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from posefabric.bench.context import Bench
from posefabric.bench.fresh import Fresh
from posefabric.bench.rows import Line, Missing, Row, speed_row
from posefabric.bench.timing import interleaved, ratio_of
from posefabric.bench.training import compiled_steps, on_path, own_steps
from posefabric.structures import PosefabricError
from posefabric.train.precision import resolve_precision

QUICK_LEAVES_OUT = "a quick bench does not compile, which takes a minute (try --only compile)"
# What compiling and its rounds need, to begin at all.
SECONDS = 90.0


def compiled_path(bench: Bench) -> Iterator[Line]:
    """`model.path=compiled` against `fast` and `plain`, compiled anew; the last subject, a CPU."""
    subject = bench.subjects[-1]
    name = f"compile.{subject.name}"
    if bench.quick:
        yield Missing(name, QUICK_LEAVES_OUT)
        return
    late = bench.too_late(name, needs=SECONDS)
    if late is not None:
        yield late
        return
    config = subject.config()
    options: dict[str, Any] = {"batch": subject.batch, "device": "cpu"}
    precision = resolve_precision(config.search.precision, torch.device("cpu"))
    conditions = {**options, "precision": precision}
    fast, plain, compiled = (on_path(config, path) for path in ("fast", "plain", "compiled"))
    try:
        with (
            Fresh(compiled_steps, alone=True, config=compiled, **options) as ours,
            Fresh(own_steps, alone=True, config=fast, **options) as theirs,
            Fresh(own_steps, alone=True, config=plain, **options) as without,
        ):
            first, first_fast = _seconds(ours)(), _seconds(theirs)()
            took = interleaved(
                {
                    "compiled": _seconds(ours),
                    "fast": _seconds(theirs),
                    "plain": _seconds(without),
                },
                bench.within(bench.effort.steps),
            )
    except PosefabricError as error:
        yield Missing(name, f"failed: {error}")
        return
    baseline = "the same step on the fast path"
    others = {name: ("fast", baseline), f"{name}.to_plain": ("plain", "the same on the plain path")}
    for row, (path, other) in others.items():
        yield speed_row(
            row,
            ours=took["compiled"],
            theirs=took[path],
            count=subject.batch,
            baseline=other,
            conditions=conditions,
        )
    yield Row(
        name=f"{name}.first_step",
        ratio=ratio_of([first], [first_fast]),
        baseline=baseline,
        unit="times the baseline's seconds",
        better="less",
        ours=first,
        theirs=first_fast,
        measure="s, the first step, nothing compiled before",
        conditions=conditions,
    )


def _seconds(process: Fresh) -> Callable[[], float]:
    return lambda: process.ask()[0]
