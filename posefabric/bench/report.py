"""The bench's tables and its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from posefabric.bench.rows import Line, Missing, Row


def rows_table(lines: Sequence[Line]) -> Table:
    """The measured ratios with their spread; under each name what is counted."""
    table = Table(
        title="Ratios in one run, median and 10-90 % of the rounds",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold")
    for heading in ("ratio", "10-90 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    group = None
    for line in lines:
        if isinstance(line, Missing):
            continue
        if group is not None and line.name.partition(".")[0] != group:
            table.add_section()
        group = line.name.partition(".")[0]
        table.add_row(
            Text.assemble(line.name, (f"\n  {_what(line)}", "dim")),
            figure(line.ratio.median),
            f"{figure(line.ratio.low)} - {figure(line.ratio.high)}",
        )
    return table


def missing_lines(lines: Sequence[Line]) -> list[str]:
    """What was not measured, and why, a reason a line."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if isinstance(line, Missing):
            reasons.setdefault(line.reason, []).append(line.name)
    return [f"not measured, {reason}: {', '.join(names)}" for reason, names in reasons.items()]


def _what(row: Row) -> str:
    better = "" if row.better == "more" else " (less is better)"
    pair = ""
    if row.ours is not None and row.theirs is not None:
        pair = f"; {figure(row.ours)} against {figure(row.theirs)} {row.measure}"
    return f"{row.unit}{better}; baseline: {row.baseline}{pair}"


def profile_table(name: str, profile: Mapping[str, Any]) -> Table:
    """The stages of a step, an image each."""
    table = Table(
        title=f"A step of search, {name}, batch {profile['batch']}, {profile['precision']}",
        title_justify="left",
    )
    table.add_column("stage")
    for heading in ("ms an image", "of the step", "GFLOP/s", "of the 3x3 peak", "of attainable"):
        table.add_column(heading, justify="right")
    for stage, found in profile["stages"].items():
        table.add_row(
            stage,
            figure(found["ms"]),
            percent(found["share"]),
            "-" if found["gflops"] is None else figure(found["gflops"]),
            percent(found["of_conv_3x3"]),
            percent(found["of_attainable"]),
        )
    return table


def roofline_line(peaks: Mapping[str, Any]) -> str:
    """The peaks in a sentence."""
    pieces = []
    for kind, said in (("conv_3x3", "3x3"), ("depthwise_3x3", "depthwise 3x3")):
        found = peaks[kind]
        shape = "x".join(str(side) for side in found["shape"])
        pieces.append(f"{said} {figure(found['gflops'])} GFLOP/s ({shape}, {found['layout']})")
    copied = figure(peaks["copy"]["gbytes"])
    return f"peaks of this machine, fp32: {', '.join(pieces)}, memory {copied} GB/s"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in a sentence."""
    memory = machine["memory_bytes"]
    facts = [
        machine["cpu"] or "unknown CPU",
        f"{machine['cores']} cores",
        f"{machine['threads']} threads",
        machine["cpu_capability"],
        "" if memory is None else f"{memory / 2**30:.0f} GiB",
        f"torch {machine['packages'].get('torch')}",
        f"GPU {machine['device']}" if machine["device"] != "cpu" else "no GPU",
        "" if machine["load"] is None else f"load {machine['load']:.1f}",
    ]
    return ", ".join(fact for fact in facts if fact)


def bench_record(
    machine: Mapping[str, Any],
    lines: Sequence[Line],
    *,
    roofline: Mapping[str, Any] | None,
    profiles: Mapping[str, Any],
    quick: bool,
    seconds: float,
) -> dict[str, Any]:
    """All of it for JSON: machine, rows, not_measured, roofline, profile, and how it was run."""
    return {
        "machine": dict(machine),
        "rows": [line.record() for line in lines if isinstance(line, Row)],
        "not_measured": [line.record() for line in lines if isinstance(line, Missing)],
        "roofline": None if roofline is None else dict(roofline),
        "profile": dict(profiles),
        "quick": quick,
        "seconds": round(seconds, 1),
    }


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    size = abs(value)
    digits = 3 if size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
