"""The command that measures speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

    Groups: search_step, inference, memory, loader, evaluation, shipped, peers, processes, and
    profile. At most 15 minutes on two cores.
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
