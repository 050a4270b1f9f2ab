"""The parts of results.md: the arms, the verdicts, the runs, the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posefabric.study.hits import Hits
from posefabric.study.plan import PlannedRun, StudyFile, shipped_studies
from posefabric.study.rows import Row
from posefabric.study.statistics import RESAMPLES
from posefabric.study.verdicts import Verdict


def intro(
    study: StudyFile, planned: Sequence[PlannedRun], rows: Sequence[Row], failed: Sequence[Row]
) -> list[str]:
    """The title, what there is, and how to read it."""
    split = {"val": "validation", "test": "test"}[rows[0]["split"]]
    left = len(planned) - len(rows)
    lines = [f"# Study {study.name}", ""]
    if left:
        lines += [
            f"**Not complete: {len(rows)} of {len(planned)} runs are finished, {len(failed)} "
            f"failed.**",
            "",
        ]
    lines += [
        f"{len(study.arms)} arms, seeds {', '.join(map(str, study.seeds))}; {rows[0]['persons']} "
        f"{split} persons. PCK in points of 100: mean over runs, standard deviation over runs, and "
        f"the 95 % interval of the mean over persons ({RESAMPLES} bootstrap resamples; the same "
        f"persons in every arm). The interval says how far these networks' means depend on who was "
        f"measured, the deviation how far a network depends on its seed.",
        "",
    ]
    return lines


def arm_tables(rows: Sequence[Row], hits: Hits, timed: Mapping[str, Any]) -> list[str]:
    """The two comparisons: equal epochs of final training, equal total compute.

    Arms that search and train on stand in both.
    """
    equal = [row for row in rows if row["compute"] != "epochs"]
    plain = [row for row in rows if row["compute"] == "epochs"]
    lines: list[str] = []
    if plain:
        lines += ["### Equal epochs of final training" if equal else "### Arms", ""]
        lines += _arm_table(plain, hits, timed)
    if equal:
        searched = [row for row in plain if row["steps"] == "search+finetune"]
        lines += [
            "### Equal total compute",
            "",
            "Arms without a search train for more epochs, so that multiply-adds x persons x passes "
            "over all their training are those of the search and final training of their seed "
            "(backward passes cost alike in proportion; a step of alpha and beta is one more pass "
            "in first_order, four in second_order).",
            "",
            *_arm_table([*searched, *equal], hits, timed),
        ]
    if timed.get("ms"):
        lines += [f"Latency: {timed['conditions']}, {timed['cpu']}, torch {timed['torch']}.", ""]
    return lines


def _arm_table(rows: Sequence[Row], hits: Hits, timed: Mapping[str, Any]) -> list[str]:
    lines = [
        "| arm | runs | PCK | sd | 95 % | parameters, M | MACs, M | head MACs, M | ms | "
        "training, T MACs | CPU minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        values = np.array([100 * row["PCK"] for row in own])
        low, high = hits.interval(own, "PCK")
        ms = [timed["ms"][row["hash"]] for row in own if row["hash"] in timed.get("ms", {})]
        cells = [
            arm,
            str(len(own)),
            f"{values.mean():.2f}",
            f"{values.std(ddof=1):.2f}" if len(own) > 1 else "-",
            f"{100 * low:.2f} to {100 * high:.2f}",
            f"{_mean(own, 'params') / 1e6:.2f}",
            f"{_mean(own, 'macs') / 1e6:.0f}",
            f"{_mean(own, 'head_macs') / 1e6:.0f}",
            f"{np.mean(ms):.1f}" if ms else "-",
            f"{_mean(own, 'train_cost') / 1e12:.3g}",
            f"{_mean(own, 'train_cpu_seconds') / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def verdict_list(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    lines = ["## Verdicts", "", "p: one-sided permutation test over runs.", ""]
    for verdict in verdicts:
        lines.append(f"- **{verdict.claim}.** {verdict.text}")
    return [*lines, ""]


def runs_table(rows: Sequence[Row], failed: Sequence[Row]) -> list[str]:
    lines = [
        "## Runs",
        "",
        "| arm | budget | seed | hash | PCK | persons seen | CPU minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        persons = sum(phase["persons"] for phase in row["phases"])
        lines.append(
            f"| {row['arm']} | {row['budget'] or '-'} | {row['seed']} | {row['hash']} | "
            f"{100 * row['PCK']:.2f} | {persons} | {row['train_cpu_seconds'] / 60:.1f} |"
        )
    for row in failed:
        message = str(row["error"]).splitlines()[0].replace("|", "\\|")
        lines.append(
            f"| {row['arm']} | {row['budget'] or '-'} | {row['seed']} | {row['hash']} | failed: "
            f"{message} | | |"
        )
    machines = dict.fromkeys(
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, device {m['device']}, torch "
        f"{m['torch']}, posefabric {m['posefabric']} ({str(m['git_commit'])[:9]})"
        for m in (row["machine"] for row in rows)
    )
    return [*lines, "", *[f"Machine: {machine}." for machine in machines], ""]


def commands_list(study: StudyFile, rows: Sequence[Row]) -> list[str]:
    """The study's own command, and the first run of each arm by hand."""
    lines = ["## Commands", "", "```bash"]
    file = study.name if study.name in shipped_studies() else f"{study.name}.yaml"
    lines.append(f"posefabric study {file} data.root=DIR --out STUDY")
    seen = set()
    for row in rows:
        if row["arm"] not in seen and row["commands"]:
            seen.add(row["arm"])
            lines += ["", f"# {row['arm']}, seed {row['seed']}", *row["commands"]]
    return [*lines, "```", ""]


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
