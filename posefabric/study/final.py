"""The test split, read once: every finished run of a complete study measured on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from posefabric.data.pipeline import open_dataset
from posefabric.run import RunFolder, write_atomic
from posefabric.run.files import json_bytes
from posefabric.run.header import now
from posefabric.structures import PosefabricError
from posefabric.study.measure import measure_split
from posefabric.study.plan import PlannedRun
from posefabric.study.rows import Row, append_row, read_rows
from posefabric.train.loop import TrainingStopped
from posefabric.train.progress import StopRequest

FINAL_NAME = "final.json"
FINAL_ROWS_NAME = "final.jsonl"


def measure_final(
    planned: Sequence[PlannedRun], rows: Sequence[Row], study: Path, say: Callable[[str], None]
) -> None:
    """Measure each run on the test split, a row at once into final.jsonl; goes on when stopped.

    final.json says when it was first read and of which runs; no other runs are measured later.
    Raises PosefabricError when runs are missing, or when it was read for other runs.
    """
    if len(rows) < len(planned):
        raise PosefabricError(
            f"--final: {len(planned) - len(rows)} of {len(planned)} runs are not finished; the "
            f"test split is read once, at the end"
        )
    hashes = sorted(run.key for run in planned)
    path = study / FINAL_NAME
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["hashes"] != hashes:
            raise PosefabricError(
                f"{path}: the test split was read on {kept['read'][:10]} for another set of runs; "
                f"it is read once, at the end: put a changed study into another --out, and say so "
                f"where its results are told"
            )
    else:
        open_dataset(planned[0].config.data, "test", evaluating=True)
        write_atomic(path, json_bytes({"read": now(), "hashes": hashes}))
    done = read_rows(study / FINAL_ROWS_NAME)
    by_hash = {row["hash"]: row for row in rows}
    with StopRequest() as stop:
        for run in planned:
            if run.key in done:
                continue
            if stop.requested:
                raise TrainingStopped(f"{study}: stopped; the same command goes on from here")
            row = by_hash[run.key]
            counts = f"counts/{run.folder}-test.npz"
            finished = RunFolder.open(study / row["folder"])
            measures = measure_split(finished, run.config, "test", study / counts)
            measures = {"hash": run.key, "state": "finished", **measures, "counts": counts}
            append_row(study / FINAL_ROWS_NAME, measures)
            say(f"{run.title}: PCK {100 * measures['PCK']:.2f} on the test split")


def with_final(rows: Sequence[Row], study: Path) -> list[Row]:
    """The rows with the test split's measures, once all have them; else as they are."""
    final = read_rows(study / FINAL_ROWS_NAME)
    if not all(row["hash"] in final for row in rows):
        return list(rows)
    return [{**row, **final[row["hash"]]} for row in rows]
