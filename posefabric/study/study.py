"""A study from its file to its tables: the folder, what it remembers, and its stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from posefabric.run import write_atomic
from posefabric.run.files import json_bytes
from posefabric.structures import PosefabricError
from posefabric.study.execute import execute
from posefabric.study.final import measure_final
from posefabric.study.plan import PlannedRun, StudyFile, load_study, plan_runs
from posefabric.study.results import write_results
from posefabric.study.rows import ROWS_NAME, finished_rows, read_rows
from posefabric.train.loop import TrainingStopped

Say = Callable[[str], None]
MEMORY_NAME = "study.json"


def run_study(
    name_or_path: str,
    overrides: Sequence[str],
    *,
    out: Path,
    jobs: int,
    table: bool,
    final: bool,
    say: Say,
) -> None:
    """Make what is missing of a study in the folder ``out``, then write its tables.

    ``overrides``: for every run, above all others; without any, those the folder was last used
    with. ``table``: no run is made. ``final``: the test split is read, once all runs are finished.

    Raises TrainingStopped when asked to stop, and PosefabricError when runs have failed, both
    after the tables are written from what there is.
    """
    if jobs < 1:
        raise PosefabricError(f"--jobs {jobs}: expected 1 or more")
    study = load_study(name_or_path)
    given = list(overrides) or _remembered(out)
    planned = plan_runs(study, given)
    out.mkdir(parents=True, exist_ok=True)
    if given and not table:
        write_atomic(out / MEMORY_NAME, json_bytes({"study": study.name, "overrides": given}))
    failed = []
    try:
        if not table:
            failed = execute(planned, out, jobs=jobs, say=say)
        if final and not failed:
            rows = finished_rows(read_rows(out / ROWS_NAME), planned)
            measure_final(planned, rows, out, say)
    except TrainingStopped:
        # Who stops a study does not want to wait for timings.
        tables(study, planned, out, say, time_networks=False)
        raise
    tables(study, planned, out, say)
    if failed:
        raise PosefabricError(
            f"{len(failed)} of {len(planned)} runs failed (messages above and in "
            f"{out / ROWS_NAME}); the same command tries them again"
        )


def tables(
    study: StudyFile,
    planned: Sequence[PlannedRun],
    out: Path,
    say: Say,
    *,
    time_networks: bool = True,
) -> None:
    """Write results.md and what belongs to it from the rows there are."""
    known = read_rows(out / ROWS_NAME)
    rows = finished_rows(known, planned)
    failed = [known[run.key] for run in planned if known.get(run.key, {}).get("state") == "failed"]
    if not rows:
        say("no run is finished: no tables")
        return
    path = write_results(study, planned, rows, failed, out, time_networks=time_networks)
    say(f"written: {path}")


def _remembered(out: Path) -> list[str]:
    path = out / MEMORY_NAME
    if not path.is_file():
        return []
    try:
        return [str(override) for override in json.loads(path.read_text())["overrides"]]
    except (ValueError, KeyError, TypeError) as error:
        raise PosefabricError(f"{path}: cannot be read; delete it: {error}") from error
