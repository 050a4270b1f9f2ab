"""Making runs: what is skipped, retried, waited for and stopped; with trainings made up."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_studies import SIMPLE, write_study

from posefabric.structures import PosefabricError
from posefabric.study import execute as module
from posefabric.study.execute import execute
from posefabric.study.plan import PlannedRun, load_study, plan_runs
from posefabric.study.rows import ROWS_NAME, append_row, finished_rows, read_rows
from posefabric.train.loop import TrainingStopped

ARMS = {
    "equal": {"steps": "train", "overrides": SIMPLE, "compute": "equal"},
    "searched": None,
    "mixture": {"steps": "search"},
}


class Trainings:
    """Stands for run_arm: notes who was made, and does as told."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.references: dict[str, Any] = {}
        self.behaviour: dict[str, Any] = {}

    def __call__(self, planned: PlannedRun, study: Path, *, reference, stopping) -> dict:
        self.made.append(planned.arm)
        self.references[planned.arm] = reference
        if planned.arm in self.behaviour:
            self.behaviour[planned.arm]()
        if stopping():
            raise TrainingStopped("between two steps")
        return {"arm": planned.arm, "hash": planned.key, "state": "finished", "PCK": 0.5}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    made = Trainings()
    monkeypatch.setattr(module, "run_arm", made)
    return made


@pytest.fixture
def planned(tmp_path: Path) -> list[PlannedRun]:
    return plan_runs(load_study(str(write_study(tmp_path / "s.yaml", arms=ARMS))))


def run(planned: list[PlannedRun], out: Path) -> list[dict]:
    return execute(planned, out, jobs=1, say=lambda text: None)


def states(out: Path) -> list[tuple[str, str]]:
    lines = (out / ROWS_NAME).read_text().splitlines()
    return [(row["arm"], row["state"]) for row in map(json.loads, lines)]


def test_each_run_is_made_once(trainings, planned, tmp_path: Path) -> None:
    assert run(planned, tmp_path) == []
    assert sorted(trainings.made) == ["equal", "mixture", "searched"]
    assert trainings.references["equal"]["arm"] == "searched"
    assert trainings.references["searched"] is None
    run(planned, tmp_path)
    assert len(trainings.made) == 3, "finished ones are skipped by their hash"
    other = plan_runs(load_study(str(tmp_path / "s.yaml")), ["search.epochs=0.75"])
    run(other, tmp_path)
    assert len(trainings.made) == 6 and len(states(tmp_path)) == 6
    kept = finished_rows(read_rows(tmp_path / ROWS_NAME), planned)
    assert [row["hash"] for row in kept] == [r.key for r in planned]


def test_a_failure_stops_nobody_else_and_is_tried_again(trainings, planned, tmp_path) -> None:
    def fail() -> None:
        raise PosefabricError("weights=hub: no hub")

    trainings.behaviour["mixture"] = fail
    (failed,) = run(planned, tmp_path)
    assert failed["arm"] == "mixture" and "no hub" in failed["error"]
    assert "in fail" in failed["trace"]
    assert set(states(tmp_path)) == {
        ("mixture", "failed"), ("searched", "finished"), ("equal", "finished"),
    }  # fmt: skip
    trainings.behaviour.clear()
    assert run(planned, tmp_path) == []
    assert trainings.made.count("mixture") == 2 and trainings.made.count("searched") == 1
    assert {row["state"] for row in read_rows(tmp_path / ROWS_NAME).values()} == {"finished"}


def test_equal_compute_of_a_failed_search_fails_too(trainings, planned, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("diverged")

    trainings.behaviour["searched"] = fail
    failed = {row["arm"]: row["error"] for row in run(planned, tmp_path)}
    assert set(failed) == {"searched", "equal"} and "equal" not in trainings.made
    assert failed["searched"] == "ValueError: diverged" and "has failed" in failed["equal"]
    trainings.behaviour.clear()
    assert run(planned, tmp_path) == [] and "equal" in trainings.made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_the_next_call_goes_on(trainings, planned, tmp_path, number) -> None:
    first = planned[1].arm
    trainings.behaviour[first] = lambda: os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match="2 of 3 runs"):
        run(planned, tmp_path)
    assert signal.getsignal(number) == before
    assert trainings.made == [planned[0].arm, first] and len(states(tmp_path)) == 1
    trainings.behaviour.clear()
    run(planned, tmp_path)
    assert trainings.made == [planned[0].arm, first, first, planned[2].arm]


def test_a_torn_row_is_made_again(trainings, planned, tmp_path: Path) -> None:
    run(planned, tmp_path)
    path = tmp_path / ROWS_NAME
    path.write_bytes(path.read_bytes()[:-20])
    run(planned, tmp_path)
    assert len(trainings.made) == 4
    assert len(read_rows(path)) == 3, "the torn line went before the new one came"


def test_a_wrong_line_is_told(tmp_path: Path) -> None:
    append_row(tmp_path / ROWS_NAME, {"hash": "a", "state": "finished"})
    append_row(tmp_path / ROWS_NAME, {"state": "no hash"})
    append_row(tmp_path / ROWS_NAME, {"hash": "b", "state": "finished"})
    with pytest.raises(PosefabricError, match=r"rows\.jsonl: line 2: .*made again"):
        read_rows(tmp_path / ROWS_NAME)
    assert read_rows(tmp_path / "none.jsonl") == {}
