"""Poses from pictures with an OpenVINO model: numpy, OpenCV and openvino, no torch."""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from posefabric.deploy.exported import ExportedPoseEstimator, check_threads, check_version
from posefabric.structures import PosefabricError

METADATA = ("posefabric", "metadata")  # the place of the metadata, one JSON string, in the .xml

_log = logging.getLogger(__name__)


class OpenvinoPoseEstimator(ExportedPoseEstimator):
    """A model.xml with its .bin, written by ``posefabric export --openvino``, ready to predict."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        *,
        batch_size: int = 32,
        input_wh: tuple[int, int] | None = None,
    ) -> None:
        """Open a file.

        Args:
            path: the .xml; the .bin of the same name lies beside it.
            threads: on the CPU; None: openvino's choice (all cores).
            batch_size: persons predicted at a time.
            input_wh: another input than the trained one, of a file with a free size.

        Raises PosefabricError when a file is missing or none of ours, and when openvino is not
        installed.
        """
        check_threads(threads)
        session = OpenvinoSession(path, threads)
        super().__init__(session, session.path, batch_size=batch_size, input_wh=input_wh)


class OpenvinoSession:
    """An OpenVINO model compiled for the CPU, in the precision that it was exported in."""

    runtime = "openvino"

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        openvino = require_openvino()
        self.path = Path(path)
        for file in (self.path, self.path.with_suffix(".bin")):
            if not file.is_file():
                raise PosefabricError(
                    f"{file}: no such file; `posefabric export RUN --openvino` writes the .xml "
                    "and the .bin, which stay together"
                )
        core = openvino_core()
        try:
            model = core.read_model(self.path)
        # Its errors have no common base class but Exception.
        except Exception as error:
            raise PosefabricError(
                f"{self.path}: openvino {openvino.__version__} cannot read it "
                f"({_first_line(error)}); are the .xml and the .bin complete?"
            ) from error
        self.metadata = _read_metadata(model, self.path)
        self.outputs = tuple(self.metadata["outputs"])
        wanted = self.metadata.get("precision", "fp32")
        if wanted == "bf16" and not has_bf16():
            _log.warning(
                "%s: exported for bf16, which this CPU has not; openvino computes in fp32",
                self.path,
            )
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Said outright: left alone, openvino takes bf16 wherever the CPU has it.
            "INFERENCE_PRECISION_HINT": "bf16" if wanted == "bf16" and has_bf16() else "f32",
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(self, crops: np.ndarray, outputs: tuple[str, ...]) -> list[np.ndarray]:
        found = self._request.infer({"images": crops})
        return [np.array(found[name]) for name in outputs]


def require_openvino() -> Any:
    """The module openvino; PosefabricError that says how to install it where it is missing."""
    try:
        import openvino
    except ImportError as error:
        raise PosefabricError(
            'openvino is not installed; pip install "posefabric[openvino]" or pip install openvino'
        ) from error
    return openvino


@functools.cache
def openvino_core() -> Any:
    """The process's one ``openvino.Core``, which is never freed.

    Each one's CPU plugin exchanges the stack that signals are handled on, and restores at its end
    what it found: two that end in another order than they began leave freed memory there, and the
    next signal, Ctrl-C or a child's end, kills the process (seen with 2026.4).
    """
    return require_openvino().Core()


def has_bf16() -> bool:
    """Whether openvino computes in bf16 on this CPU (AVX-512 BF16, AMX)."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _read_metadata(model: Any, path: Path) -> dict[str, Any]:
    if not model.has_rt_info(list(METADATA)):
        raise PosefabricError(
            f"{path}: an OpenVINO model, but not one of posefabric's (no {'/'.join(METADATA)} in "
            "its rt_info); `posefabric export RUN --openvino` writes one"
        )
    metadata = json.loads(model.get_rt_info(list(METADATA)).astype(str))
    check_version(metadata, path)
    return metadata


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first lines of its messages are places in its own source.
    return lines[-1][:200] if lines else type(error).__name__
