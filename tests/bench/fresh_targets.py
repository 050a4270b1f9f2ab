"""Targets for processes of their own; light, for a new interpreter imports this module."""

from __future__ import annotations

import os
import signal

from posefabric.bench.fresh import Gate, answer_turns
from posefabric.structures import PosefabricError


def counting(gate: Gate, *, start: int) -> None:
    print("on no terminal")
    numbers = iter(range(start, 100))
    answer_turns(gate, lambda: (next(numbers), os.getpid()))


def failing(gate: Gate) -> None:
    gate.turn()
    raise PosefabricError("the file is not there")


def broken(gate: Gate) -> None:
    gate.turn()
    raise ZeroDivisionError("by nothing")


def dying(gate: Gate) -> None:
    gate.turn()
    os.kill(os.getpid(), signal.SIGKILL)


def sleeping(gate: Gate) -> None:
    gate.turn()
    gate.turn()
