"""What a study comes to: results.md, verdicts.json and the plots, written from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posefabric.run import write_atomic
from posefabric.run.files import json_bytes
from posefabric.study.final import with_final
from posefabric.study.hits import Hits
from posefabric.study.latency import latencies
from posefabric.study.markdown import arm_tables, commands_list, intro, runs_table, verdict_list
from posefabric.study.pareto import Point, plot_pareto
from posefabric.study.plan import PlannedRun, StudyFile
from posefabric.study.rows import Row
from posefabric.study.verdicts import Verdict, judge

RESULTS_NAME = "results.md"
VERDICTS_NAME = "verdicts.json"


def write_results(
    study: StudyFile,
    planned: Sequence[PlannedRun],
    rows: Sequence[Row],
    failed: Sequence[Row],
    out: Path,
    *,
    time_networks: bool = True,
) -> Path:
    """Tables, verdicts and plots of the finished ``rows`` into the folder; path of results.md.

    Of the test split where all rows have been measured on it, else of the validation persons.
    ``time_networks=False`` takes only latencies that are kept.
    """
    rows = with_final(rows, out)
    hits = Hits(rows, out)
    timed = latencies(rows, out, measure=time_networks)
    lines = intro(study, planned, rows, failed)
    verdicts: list[Verdict] = []
    for budget in study.budgets or {"": []}:
        own = [row for row in rows if row["budget"] == budget]
        if not own:
            continue
        lines += [f"## Budget {budget}", ""] if budget else []
        lines += arm_tables(own, hits, timed)
        for name, cost, label in (
            ("macs", lambda r: r["macs"] / 1e6, "M multiply-adds a picture"),
            ("latency", lambda r: timed["ms"].get(r["hash"]), "ms a picture (eager, one thread)"),
        ):
            file = f"pareto-{budget}-{name}.png" if budget else f"pareto-{name}.png"
            points = pareto_points(own, cost)
            y_label = f"PCK, points ({own[0]['split']})"
            if points and plot_pareto(points, out / file, x_label=label, y_label=y_label):
                lines += [f"![PCK against {name}]({file})", ""]
        verdicts += [judge(claim, own, hits, budget=budget) for claim in study.claims]
    lines += verdict_list(verdicts)
    lines += runs_table(rows, failed)
    lines += commands_list(study, rows)
    write_atomic(out / VERDICTS_NAME, json_bytes([verdict.as_json() for verdict in verdicts]))
    write_atomic(out / RESULTS_NAME, "\n".join(lines).rstrip().encode() + b"\n")
    return out / RESULTS_NAME


def pareto_points(rows: Sequence[Row], cost: Any) -> list[Point]:
    """A point an arm: mean cost of the runs that have one, mean PCK in points of 100."""
    points = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        costs = [value for value in map(cost, own) if value is not None]
        values = np.array([100 * row["PCK"] for row in own])
        if costs:
            spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            points.append(Point(arm, float(np.mean(costs)), float(values.mean()), spread))
    return points
