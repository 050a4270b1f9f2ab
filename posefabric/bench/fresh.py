"""Work in a process of its own, a turn at a time, so that arms can be interleaved and weighed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from posefabric.structures import PosefabricError

# What a fork server imports once, for all processes that it starts.
PRELOADED = ("posefabric.bench.training", "posefabric.models.build", "posefabric.train.loop")


class Gate:
    """The child's side: waits for its turn, answers, waits again."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def answer(self, value: Any) -> None:
        self._connection.send(("answer", value))

    def turn(self) -> bool:
        """Wait to be asked; False when there is no more to do."""
        try:
            return self._connection.recv() == "go"
        except EOFError:
            return False


class Fresh:
    """A process that runs ``target(gate, **options)``; use as a context manager.

    ``target`` is a function of a module. Whenever ``gate.turn()`` is true it owes one answer.

    Args:
        alone: start a new interpreter, for what is weighed; else fork one that has imported
            the package and done nothing with it, where the system can, which takes a moment.
        patience: seconds to wait for an answer.
    """

    def __init__(
        self,
        target: Callable[..., None],
        *,
        alone: bool = False,
        patience: float = 900.0,
        **options: Any,
    ) -> None:
        context: Any = _context(alone)
        self._patience = patience
        self._what = getattr(target, "__name__", str(target))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, target, options), daemon=False)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Fresh:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def ask(self) -> Any:
        """Give it a turn; its answer.

        Raises PosefabricError with the child's own message, or saying how the child ended.
        """
        with contextlib.suppress(BrokenPipeError):
            self._connection.send("go")
        try:
            if not self._connection.poll(self._patience):
                raise PosefabricError(
                    f"{self._what}: no answer within {self._patience:.0f} s; the machine is too "
                    f"slow or too busy for the bench"
                )
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            raise PosefabricError(
                f"{self._what}: the process ended with exit code {self._process.exitcode} (-9: "
                f"killed, as a rule for want of memory)"
            ) from None
        if kind == "error":
            raise PosefabricError(f"{self._what}: {value}")
        return value

    def close(self) -> None:
        """Ask it to end, and wait; what does not end is killed."""
        self._connection.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def once(target: Callable[..., None], *, alone: bool = False, **options: Any) -> Any:
    """The one answer of a process that is then gone."""
    with Fresh(target, alone=alone, **options) as process:
        return process.ask()


def answer_turns(gate: Gate, arm: Callable[[], Any]) -> None:
    """Answer every turn with what ``arm`` returns."""
    while gate.turn():
        gate.answer(arm())


def _context(alone: bool) -> Any:
    methods = multiprocessing.get_all_start_methods()
    if alone or "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _serve(connection: Connection, target: Callable[..., None], options: dict[str, Any]) -> None:
    # Progress lines of a training are not the bench's.
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = nowhere
        try:
            target(Gate(connection), **options)
        except PosefabricError as error:
            _send_error(connection, str(error))
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            _send_error(connection, f"{type(error).__name__}: {error} ({where})")
        finally:
            sys.stdout = sys.__stdout__


def _send_error(connection: Connection, message: str) -> None:
    with contextlib.suppress(OSError):
        connection.send(("error", message))
