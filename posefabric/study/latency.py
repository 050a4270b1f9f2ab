"""Latency of a study's networks, one run an arm, timed side by side in one go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posefabric.deploy.run_report import shipped_network
from posefabric.evaluate.profile import compare
from posefabric.run import RunFolder, write_atomic
from posefabric.run.environment import describe_environment
from posefabric.run.files import json_bytes
from posefabric.study.rows import Row

LATENCY_NAME = "latency.json"
REPEATS = 20


def latencies(rows: Sequence[Row], study: Path, *, measure: bool = True) -> dict[str, Any]:
    """Milliseconds a picture in eager torch on one CPU thread, by the hash of each row measured.

    The first finished run of each arm and budget. Networks of one input size are timed in one
    interleaved run, so that they compare; the file latency.json keeps it, and is made anew only
    when other runs are to be measured. Rows whose run folder is gone are left out. Without
    ``measure``, what is kept is all there is.
    """
    chosen: dict[tuple[str, str], Row] = {}
    for row in rows:
        chosen.setdefault((row["budget"], row["arm"]), row)
    present = [row for row in chosen.values() if (study / row["folder"] / "run.json").is_file()]
    path = study / LATENCY_NAME
    kept = _kept(path)
    if not measure or not present or all(row["hash"] in kept["ms"] for row in present):
        return kept
    by_size: dict[tuple[int, int], list[Row]] = {}
    for row in present:
        size = RunFolder.open(study / row["folder"]).config.data.input_wh
        by_size.setdefault(size, []).append(row)
    measured: dict[str, float] = {}
    for size, group in by_size.items():
        networks = {
            row["hash"]: shipped_network(RunFolder.open(study / row["folder"])) for row in group
        }
        profiles = compare(networks, size, repeats=REPEATS, threads=1)
        measured.update({key: profile["latency_ms"] for key, profile in profiles.items()})
    environment = describe_environment()
    found = {
        "ms": measured,
        "conditions": f"eager torch, 1 thread, median of {REPEATS} interleaved rounds",
        "cpu": environment["cpu"],
        "torch": environment["packages"].get("torch"),
    }
    write_atomic(path, json_bytes(found))
    return found


def _kept(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {"ms": {}}
