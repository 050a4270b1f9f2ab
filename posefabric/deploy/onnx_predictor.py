"""Poses from pictures with an exported network: numpy, OpenCV and onnxruntime, no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posefabric.data.conventions import choose_conventions
from posefabric.data.crop import CropGeometry
from posefabric.deploy.numpy_codec import NumpyCodec
from posefabric.deploy.persons import Boxes, Pictures, PosePrediction, predict_persons
from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from posefabric.skeletons import Skeleton

__all__ = ["EXPORT_VERSION", "OnnxPoseEstimator", "PosePrediction"]

EXPORT_VERSION = 1


class OnnxPoseEstimator:
    """An ONNX file written by :func:`posefabric.deploy.export.export_onnx`, ready to predict.

    Attributes:
        metadata: what the file says of itself (skeleton, input, heatmaps, crop rule, ...).
        source: one line for reports.
        decodes: the file holds the decoder; otherwise, and in the flip test, numpy decodes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        *,
        batch_size: int = 32,
    ) -> None:
        """Open a file.

        Args:
            providers: onnxruntime's execution providers, best first; None: CUDA where this
                onnxruntime has it, else the CPU.
            threads: of one operation on the CPU; None: onnxruntime's choice (all cores).
            batch_size: persons predicted at a time.

        Raises PosefabricError when the file is missing or none of ours, when onnxruntime is
        not installed, and for unknown providers.
        """
        if batch_size < 1:
            raise PosefabricError(f"batch_size: expected 1 or more, got {batch_size}")
        if threads is not None and threads < 1:
            raise PosefabricError(f"threads: expected 1 or more, got {threads}")
        self.path = Path(path)
        self.batch_size = batch_size
        self._session = _open_session(self.path, providers, threads)
        self.metadata = _read_metadata(self._session, self.path)
        heatmap = self.metadata["heatmap"]
        width, height = self.metadata["input_wh"]
        preset = self.metadata["preset"]
        # Files from before single conventions could be chosen tell the preset alone.
        rules = choose_conventions(preset, **self.metadata.get("conventions", {}))
        self.geometry = CropGeometry((width, height), preset, conventions=rules)
        self.codec = NumpyCodec(preset, tuple(heatmap["stride"]), conventions=rules)
        self.decodes = "keypoints" in [output.name for output in self._session.get_outputs()]
        names = self.metadata["skeleton"]["keypoints"]
        self._flip_index = np.arange(len(names))
        for left, right in self.metadata["skeleton"]["flip_pairs"]:
            self._flip_index[[left, right]] = right, left
        digest = self.metadata.get("architecture_digest")
        self.source = f"ONNX export {self.path} of posefabric {self.metadata['posefabric']}" + (
            f" (architecture {digest})" if digest else ""
        )

    @property
    def skeleton(self) -> Skeleton:
        """The skeleton in the file, for drawing (needs pyyaml, which prediction does not)."""
        from posefabric.skeletons import Skeleton

        stored = self.metadata["skeleton"]
        names = tuple(stored["keypoints"])
        return Skeleton(
            name=stored["name"],
            keypoints=names,
            flip_pairs=tuple((left, right) for left, right in stored["flip_pairs"]),
            limbs=tuple((start, end) for start, end in stored["limbs"]),
            sigmas=np.asarray(stored["sigmas"], dtype=np.float64),
            sigmas_source=stored["sigmas_source"],
            groupings={1: {"all": tuple(range(len(names)))}},
        )

    def predict(
        self, images: Pictures, boxes: Boxes = None, flip: bool = False
    ) -> list[PosePrediction]:
        """Poses in picture pixels; as :meth:`posefabric.deploy.predictor.PoseEstimator.predict`."""
        return predict_persons(
            images,
            boxes,
            geometry=self.geometry,
            num_keypoints=len(self._flip_index),
            batch_size=self.batch_size,
            infer=lambda crops: self._infer(crops, flip),
        )

    def _infer(self, crops: np.ndarray, flip: bool) -> tuple[np.ndarray, np.ndarray]:
        if self.decodes and not flip:
            keypoints, scores = self._session.run(["keypoints", "scores"], {"images": crops})
            return keypoints, scores
        maps = self.score_maps(crops)
        if flip:
            mirrored = self.score_maps(np.ascontiguousarray(crops[:, :, ::-1]))
            maps = (maps + self.codec.flip_back(mirrored, self._flip_index)) / 2
        return self.codec.decode(maps)

    def score_maps(self, crops: np.ndarray) -> np.ndarray:
        """Crops (B, H, W, 3) uint8 RGB to score maps (B, K, h, w) float32."""
        return self._session.run(["heatmaps"], {"images": crops})[0]


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
    if metadata.get("export_version") != EXPORT_VERSION:
        raise PosefabricError(
            f"{path}: export version {metadata.get('export_version')}, this posefabric reads "
            f"{EXPORT_VERSION}; export it again, or use posefabric {metadata['posefabric']}"
        )
    return metadata
