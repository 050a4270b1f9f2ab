"""results.md: a study's tables in markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from posefabric.run import write_atomic
from posefabric.study.plan import PlannedRun, StudyFile
from posefabric.study.rows import Row

RESULTS_NAME = "results.md"


def write_results(
    study: StudyFile, planned: Sequence[PlannedRun], rows: Sequence[Row], out: Path
) -> Path:
    """Tables of the finished runs into the study's folder; the path of results.md."""
    lines = [f"# {study.name}", "", f"{len(rows)} of {len(planned)} runs are finished.", ""]
    for budget in study.budgets or {"": []}:
        lines += [f"## {budget}", ""] if budget else []
        lines += _arms_table([row for row in rows if row["budget"] == budget])
    path = out / RESULTS_NAME
    write_atomic(path, "\n".join([*lines, ""]).encode())
    return path


def _arms_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| arm | runs | PCK, mean | sd | parameters, M | MACs, M | head MACs, M | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        pck = 100 * np.array([row["PCK"] for row in own])
        spread = f"{pck.std(ddof=1):.2f}" if len(own) > 1 else "-"
        params, macs, head = (
            np.mean([row[name] for row in own]) / 1e6 for name in ("params", "macs", "head_macs")
        )
        minutes = np.mean([row["train_cpu_seconds"] for row in own]) / 60
        lines.append(
            f"| {arm} | {len(own)} | {pck.mean():.2f} | {spread} | {params:.2f} | {macs:.0f} | "
            f"{head:.0f} | {minutes:.1f} |"
        )
    return [*lines, ""]
