"""The commands that measure speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from posefabric.cli_output import say, show


def bench(
    *,
    quick: Annotated[bool, Parameter(help="3 minutes: smaller batches, few rounds")] = False,
    json: Annotated[Path | None, Parameter(help="write machine, rows and profile there")] = None,
    only: Annotated[
        tuple[str, ...], Parameter(help="these groups, or profile", consume_multiple=True)
    ] = (),
) -> None:
    """Measure speed and memory as ratios in one run; docs/bench.md says how to read them.

    Groups: search_step, inference, memory, loader, evaluation, shipped, peers, compile,
    processes, and profile. At most 15 minutes on two cores.
    """
    from posefabric.bench.machine import describe_machine
    from posefabric.bench.report import (
        machine_line,
        missing_lines,
        profile_table,
        roofline_line,
        rows_table,
    )
    from posefabric.bench.run_bench import check_groups, run_bench
    from posefabric.run.files import json_bytes, write_atomic

    check_groups(only)
    say(machine_line(describe_machine()))
    found = run_bench(quick=quick, only=only, say=say)
    if found.lines:
        show(rows_table(found.lines))
    for line in missing_lines(found.lines):
        say(line)
    if found.roofline is not None:
        say(roofline_line(found.roofline))
    for name, profile in found.profiles.items():
        if "not_measured" in profile:
            say(f"profile of {name}: not measured: {profile['not_measured']}")
        else:
            show(profile_table(name, profile))
    say(f"done in {found.seconds / 60:.1f} minutes")
    if json is not None:
        write_atomic(json, json_bytes(found.record()))
        say(f"written: {json}")


def latency(
    config: str,
    /,
    *overrides: str,
    out: Annotated[Path, Parameter(help="the table to write, for search.latency_table")],
    check: Annotated[
        int, Parameter(help="predict so many other architectures and time them; 0: none")
    ] = 20,
) -> None:
    """Time this device's pieces of a search space, for budgets such as latency=8ms.

    In search.latency_runtime with search.latency_threads, one picture, on an idle machine. A
    search with such a budget does it by itself; a table of your own can be used again.

    Parameters
    ----------
    config
        A shipped name (see `posefabric show configs`) or a YAML file.
    """
    from posefabric.config import load_config
    from posefabric.deploy.latency import check_table, measure_table, write_table

    settings = load_config(config, list(overrides))
    table = measure_table(settings, say=say)
    say(
        f"{table.runtime}, {table.threads} threads: {table.overhead_ms:.2f} ms and "
        f"{table.factor:.2f} times the pieces' sum; {_agreement(table.fitted)}"
    )
    if check:
        table = check_table(table, settings, count=check)
        say(f"checked: {_agreement(table.checked or {})}")
    write_table(table, out)
    say(f"written: {out}; use it by search.latency_table={out}")


def _agreement(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['networks']} networks, median error {100 * facts['median_error']:.1f} %, largest "
        f"{100 * facts['largest_error']:.1f} %, Spearman {facts['spearman']:.3f}"
    )
