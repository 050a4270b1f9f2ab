"""The files of a run folder: their names, reading and atomic writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posefabric.run.files import json_bytes, write_atomic
from posefabric.run.header import Kind, State
from posefabric.structures import PosefabricError


class RunFiles:
    """Well-known files of the folder ``path``, none of which needs to exist, and any others."""

    writes = True  # False: one of several processes that leaves all writing to the first

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path = path
        self.kind: Kind = kind

    @property
    def state(self) -> State:
        raise NotImplementedError

    @property
    def architecture_path(self) -> Path:
        return self.path / "architecture.json"

    @property
    def weights_path(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def onnx_path(self) -> Path:
        return self.path / "model.onnx"

    @property
    def overlays_dir(self) -> Path:
        return self.path / "overlays"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file of the run atomically; PosefabricError when the disk is full."""
        if self.writes:
            write_atomic(self.path / name, data)
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """``value``: JSON values, numpy and torch scalars and arrays."""
        return self.write_bytes(name, json_bytes(value))

    def read_bytes(self, name: str) -> bytes:
        """A file of the run; PosefabricError when it is missing or unreadable."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise PosefabricError(
                f"{self.path / name}: cannot be read ({error.strerror}); expected it in this "
                f"{self.kind} run, whose state is {self.state}"
            ) from error

    def read_json(self, name: str) -> Any:
        """A JSON file of the run; PosefabricError when it is missing or not JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise PosefabricError(f"{self.path / name}: is not valid JSON ({error})") from error
