"""Processes of the bench answer turn by turn, and say how they failed."""

from __future__ import annotations

import os

import fresh_targets
import pytest

from posefabric.bench.fresh import Fresh, once
from posefabric.structures import PosefabricError


def test_a_process_of_its_own_answers_turn_by_turn_and_ends(capfd) -> None:
    with Fresh(fresh_targets.counting, alone=True, start=5) as process:
        answers = [process.ask(), process.ask()]
        pid = process.pid
    assert answers == [(5, pid), (6, pid)] and pid != os.getpid()
    with pytest.raises(OSError, match="No such process"):
        os.kill(pid, 0)
    assert "terminal" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (fresh_targets.failing, "failing: the file is not there"),
        (fresh_targets.broken, "broken: ZeroDivisionError: by nothing .fresh_targets.py:"),
        (fresh_targets.dying, "dying: the process ended with exit code -9"),
    ],
)
def test_a_failure_is_told(target, message) -> None:
    with pytest.raises(PosefabricError, match=message):
        once(target, alone=True)


def test_patience_ends() -> None:
    process = Fresh(fresh_targets.sleeping, alone=True, patience=0.2)
    with process, pytest.raises(PosefabricError, match="sleeping: no answer within 0 s"):
        process.ask()
