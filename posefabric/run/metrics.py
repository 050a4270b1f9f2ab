"""The series of a run: metrics.jsonl, and TensorBoard as its mirror."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from posefabric.run.files import append_line, json_bytes, write_atomic
from posefabric.structures import PosefabricError

logger = logging.getLogger(__name__)


class MetricsLog:
    """One JSON record a line, in the order of the run; TensorBoard events in ``board``."""

    def __init__(self, path: Path, *, board: Path) -> None:
        self.path = path
        self._board = _Board(board)

    def append(self, record: dict[str, Any]) -> None:
        """Append one record, and its numbers to TensorBoard if installed.

        The line reaches the file before this returns, whole or not at all. Raises
        PosefabricError when the disk is full.
        """
        line = json_bytes(record, indent=None)
        append_line(self.path, line)
        self._board.add(json.loads(line))

    def read(self) -> list[dict[str, Any]]:
        """All records in order; a last line torn by a crash is left out."""
        return [record for record, _ in self._records()]

    def rewind(self, step: int, phase: str | None = None) -> None:
        """Cut the file at the first record beyond ``step`` (of ``phase``, if given).

        Phases follow one another, and those that came later go too.
        """
        end, seen = 0, False
        for record, after in self._records():
            other = record.get("phase", phase) != phase if phase is not None else False
            if other and seen:
                break
            if not other and record.get("step", step) > step:
                break
            seen = seen or (phase is not None and record.get("phase") == phase)
            end = after
        self._board.rewind(step)
        if self.path.exists() and end < self.path.stat().st_size:
            write_atomic(self.path, self._bytes()[:end])

    def close(self) -> None:
        """Nothing more comes for now: TensorBoard's files are written out."""
        self._board.close()

    def _records(self) -> list[tuple[dict[str, Any], int]]:
        """Every record and the offset in bytes where its line ends."""
        if not self.path.exists():
            return []
        records, end = [], 0
        # What follows the last line end was being written when the process died.
        lines = self._bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            end += len(line) + 1
            try:
                records.append((dict(json.loads(line)), end))
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    break
                raise PosefabricError(
                    f"{self.path}: line {number}: expected a JSON record, got "
                    f"{line[:60]!r}; delete that line to go on"
                ) from error
        return records

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise PosefabricError(
                f"{self.path}: cannot be read ({error.strerror}); expected a file you may read"
            ) from error


class _Board:
    """TensorBoard beside the metrics: one event folder a phase, opened when first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] | None = {}
        self._purge_step: int | None = None

    def add(self, record: dict[str, Any]) -> None:
        step = record.get("step")
        if self._writers is None or not isinstance(step, int):
            return
        phase = str(record.get("phase", ""))
        # A lost mirror must never end a run: the numbers are in metrics.jsonl already.
        try:
            if phase not in self._writers:
                from torch.utils.tensorboard import SummaryWriter

                self._writers[phase] = SummaryWriter(
                    log_dir=str(self._folder / phase), purge_step=self._purge_step
                )
            for key, value in record.items():
                if key != "step" and type(value) in (int, float):
                    self._writers[phase].add_scalar(key, value, step)
        except ImportError:
            self._writers = None
            logger.info("tensorboard is not installed (extra viz): only metrics.jsonl is written")
        except Exception as error:
            self._writers = None
            logger.warning("%s: TensorBoard is left out from here on: %s", self._folder, error)

    def rewind(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        writers, self._writers = self._writers or {}, None if self._writers is None else {}
        for writer in writers.values():
            with contextlib.suppress(Exception):
                writer.close()
