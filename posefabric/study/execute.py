"""Making a study's runs: one after another or side by side, until done or asked to stop."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch

from posefabric.run.header import now
from posefabric.study.plan import PlannedRun
from posefabric.study.rows import ROWS_NAME, Row, append_row, read_rows
from posefabric.study.run_arm import run_arm
from posefabric.train.loop import TrainingStopped
from posefabric.train.progress import StopRequest

Say = Callable[[str], None]
_CHECK_S = 0.5


def execute(planned: Sequence[PlannedRun], study: Path, *, jobs: int, say: Say) -> list[Row]:
    """Make every planned run that has no finished row, and append its row at once.

    A run that fails is a row with its message, and is made again by the next call. With ``jobs``
    above 1, so many processes make a run each; a process has one thread, and one GPU where there
    are several. Returns the failed rows of this call.

    Raises TrainingStopped on Ctrl-C or SIGTERM; what is running writes a checkpoint first.
    """
    progress = _Progress(planned, study, say)
    with StopRequest() as stop:
        if jobs == 1:
            _one_by_one(progress, stop)
        else:
            _side_by_side(progress, stop, jobs)
        if stop.requested:
            raise TrainingStopped(
                f"{study}: stopped; {len(progress.waiting)} of {len(planned)} runs are to be made; "
                f"the same command goes on from here"
            )
    return progress.failed


class _Progress:
    """What is still to be made, and the rows so far."""

    def __init__(self, planned: Sequence[PlannedRun], study: Path, say: Say) -> None:
        self.study = study
        self.say = say
        self.rows = read_rows(study / ROWS_NAME)
        self.total = len(planned)
        self.waiting = [run for run in planned if not self.is_finished(run.key)]
        self.started: list[PlannedRun] = []
        self.failed: list[Row] = []
        if len(self.waiting) < self.total:
            say(f"{self.total - len(self.waiting)} of {self.total} runs are finished already")

    def is_finished(self, key: str) -> bool:
        return self.rows.get(key, {}).get("state") == "finished"

    def reference_of(self, run: PlannedRun) -> Row | None:
        return None if run.reference is None else self.rows[run.reference]

    def next(self) -> PlannedRun | None:
        """The next run that can start; those whose reference failed become failed rows."""
        pending = {run.key for run in self.waiting}
        for run in list(self.waiting):
            if run in self.started:
                continue
            if run.reference is None or self.is_finished(run.reference):
                self.started.append(run)
                self.say(f"[{self.total - len(self.waiting) + 1}/{self.total}] {run.title}")
                return run
            if run.reference not in pending:
                self.add(run, failed_row(run, "the search whose compute it is to get has failed"))
        return None

    def add(self, run: PlannedRun, row: Row) -> None:
        append_row(self.study / ROWS_NAME, row)
        self.rows[run.key] = row
        self.waiting.remove(run)
        if row["state"] == "failed":
            self.failed.append(row)
            self.say(f"{run.title}: failed: {row['error']}")
        else:
            self.say(f"{run.title}: PCK {100 * row['PCK']:.2f}")


def failed_row(run: PlannedRun, message: str, trace: str = "") -> Row:
    """The row of a run that did not finish."""
    return {
        "arm": run.arm,
        "budget": run.budget,
        "seed": run.seed,
        "hash": run.key,
        "state": "failed",
        "error": message,
        "trace": trace,
        "finished": now(),
    }


def attempt(
    run: PlannedRun, study: Path, reference: Row | None, stopping: Callable[[], bool]
) -> Row:
    """The run's row, finished or failed. Raises TrainingStopped and KeyboardInterrupt only."""
    try:
        return run_arm(run, study, reference=reference, stopping=stopping)
    except TrainingStopped:
        raise
    except Exception as error:
        # One arm's mistake must not cost the others their runs.
        return failed_row(run, f"{type(error).__name__}: {error}", traceback.format_exc())


def _one_by_one(progress: _Progress, stop: StopRequest) -> None:
    while not stop.requested and (run := progress.next()) is not None:
        try:
            row = attempt(run, progress.study, progress.reference_of(run), lambda: stop.requested)
        except TrainingStopped:
            # A signal that came to the training's own handler came to ours too.
            stop.requested = True
            return
        progress.add(run, row)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    run: PlannedRun
    slot: int


def _side_by_side(progress: _Progress, stop: StopRequest, jobs: int) -> None:
    # Forked copies of a process in which torch has run threads may hang.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    told = False
    try:
        while True:
            while len(workers) < jobs and not stop.requested:
                run = progress.next()
                if run is None:
                    break
                slot = min(set(range(jobs)) - {worker.slot for worker in workers})
                workers.append(_start(context, progress, run, slot))
            if not workers:
                return
            if stop.requested and not told:
                told = True
                for worker in workers:
                    worker.process.terminate()
            ready = wait_for([worker.connection for worker in workers], timeout=_CHECK_S)
            for worker in [w for w in workers if w.connection in ready]:
                workers.remove(worker)
                _take(worker, progress, stop)
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


def _start(context: Any, progress: _Progress, run: PlannedRun, slot: int) -> _Worker:
    receive, send = context.Pipe(duplex=False)
    gpus = torch.cuda.device_count()
    config = run.config.model_copy(deep=True)
    config.threads = 1
    if config.device == "auto" and gpus > 1:
        config.device = f"cuda:{slot % gpus}"
    arguments = (send, replace(run, config=config), progress.study, progress.reference_of(run))
    process = context.Process(target=_work, args=arguments)
    process.start()
    send.close()
    return _Worker(process=process, connection=receive, run=run, slot=slot)


def _take(worker: _Worker, progress: _Progress, stop: StopRequest) -> None:
    """A worker's row; without one it was stopped, or died."""
    try:
        row = worker.connection.recv()
    except EOFError:
        row = None
    worker.process.join()
    code = worker.process.exitcode
    if row is None and code == 0:
        # Ctrl-C goes to all processes of a terminal, and may reach a worker first.
        stop.requested = True
    elif row is None:
        what = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        if not stop.requested:
            progress.add(worker.run, failed_row(worker.run, f"its process died: {what}"))
    else:
        progress.add(worker.run, row)


def _work(send: Connection, run: PlannedRun, study: Path, reference: Row | None) -> None:
    """What a worker process does: one run."""
    torch.set_num_threads(1)
    with StopRequest() as stop:
        try:
            send.send(attempt(run, study, reference, lambda: stop.requested))
        except TrainingStopped:
            pass
        finally:
            send.close()
