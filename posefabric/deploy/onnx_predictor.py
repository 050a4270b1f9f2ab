"""Poses from pictures with an ONNX file: numpy, OpenCV and onnxruntime, no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posefabric.deploy.exported import (
    EXPORT_VERSION,
    ExportedPoseEstimator,
    check_threads,
    check_version,
)
from posefabric.deploy.persons import PosePrediction
from posefabric.structures import PosefabricError

__all__ = ["EXPORT_VERSION", "OnnxPoseEstimator", "OnnxSession", "PosePrediction"]


class OnnxPoseEstimator(ExportedPoseEstimator):
    """An ONNX file written by :func:`posefabric.deploy.export.export_onnx`, ready to predict."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        *,
        batch_size: int = 32,
        input_wh: tuple[int, int] | None = None,
    ) -> None:
        """Open a file.

        Args:
            providers: onnxruntime's execution providers, best first; None: CUDA where this
                onnxruntime has it, else the CPU.
            threads: of one operation on the CPU; None: onnxruntime's choice (all cores).
            batch_size: persons predicted at a time.
            input_wh: another input than the trained one, of a file with a free size.

        Raises PosefabricError when the file is missing or none of ours, when onnxruntime is
        not installed, and for unknown providers.
        """
        check_threads(threads)
        session = OnnxSession(path, providers, threads)
        super().__init__(session, session.path, batch_size=batch_size, input_wh=input_wh)


class OnnxSession:
    """An ONNX file opened in onnxruntime."""

    runtime = "onnxruntime"

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._session = _open_session(self.path, providers, threads)
        self.metadata = _read_metadata(self._session, self.path)
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(self, crops: np.ndarray, outputs: tuple[str, ...]) -> list[np.ndarray]:
        return self._session.run(list(outputs), {"images": crops})


def _open_session(path: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise PosefabricError(
            'onnxruntime is not installed; pip install "posefabric[export]" or pip install '
            "onnxruntime"
        ) from error
    if not path.is_file():
        raise PosefabricError(f"{path}: no such file; `posefabric export RUN` writes one")
    present = onnxruntime.get_available_providers()
    if providers is None:
        cuda = ["CUDAExecutionProvider"] if "CUDAExecutionProvider" in present else []
        providers = [*cuda, "CPUExecutionProvider"]
    missing = [name for name in providers if name not in present]
    if missing or not providers:
        raise PosefabricError(
            f"providers={list(providers)}: this onnxruntime has {', '.join(present)}"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    # Its errors have no common base class but Exception.
    except Exception as error:
        raise PosefabricError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot open it "
            f"({str(error).splitlines()[0][:200]}); is it a complete ONNX file?"
        ) from error


def _read_metadata(session: Any, path: Path) -> dict[str, Any]:
    stored = session.get_modelmeta().custom_metadata_map
    if "posefabric" not in stored:
        raise PosefabricError(
            f"{path}: an ONNX file, but not one of posefabric's (no metadata `posefabric`); "
            "`posefabric export RUN` writes one"
        )
    metadata = {key: json.loads(text) for key, text in stored.items()}
    check_version(metadata, path)
    return metadata
