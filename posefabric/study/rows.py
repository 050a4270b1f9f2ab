"""The rows of a study: one JSON line a run, appended at once, the newest of a hash counting."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posefabric.run.files import append_line, json_bytes
from posefabric.structures import PosefabricError
from posefabric.study.plan import PlannedRun

ROWS_NAME = "rows.jsonl"
Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """One line, in the file when this returns. One process writes a file of rows at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json_bytes(row, indent=None))


def read_rows(path: Path) -> dict[str, Row]:
    """The newest row of every hash; a last line torn by a crash is left out.

    Raises PosefabricError for another line that is not a row.
    """
    if not path.is_file():
        return {}
    rows: dict[str, Row] = {}
    whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
    del torn
    for number, line in enumerate(whole.split("\n") if whole else [], start=1):
        try:
            row = json.loads(line)
            rows[row["hash"]] = row
        except (ValueError, TypeError, KeyError) as error:
            raise PosefabricError(
                f"{path}: line {number}: expected the JSON row of a run, got {line[:60]!r}; "
                f"delete that line, its run is then made again"
            ) from error
    return rows


def finished_rows(rows: dict[str, Row], planned: Iterable[PlannedRun]) -> list[Row]:
    """The rows of the planned runs that are finished, in the plan's order."""
    found = [rows[run.key] for run in planned if run.key in rows]
    return [row for row in found if row["state"] == "finished"]
