"""What every predictor of an exported network shares: crops, flip test, decoding (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posefabric.data.conventions import Conventions, choose_conventions
from posefabric.data.crop import CropGeometry
from posefabric.deploy.numpy_codec import NumpyCodec
from posefabric.deploy.persons import Boxes, Pictures, PosePrediction, predict_persons
from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from posefabric.skeletons import Skeleton

EXPORT_VERSION = 1
SIZE_STEP = 32  # pixels, of the sides of an input whose size is free


class Session(Protocol):
    """An opened file of an exported network in one runtime.

    Attributes:
        runtime: its name.
        metadata: what the file says of itself.
        outputs: heatmaps and, with the decoder in the graph, keypoints and scores.
    """

    runtime: str
    metadata: dict[str, Any]
    outputs: tuple[str, ...]

    def run(self, crops: np.ndarray, outputs: tuple[str, ...]) -> list[np.ndarray]:
        """Crops (B, H, W, 3) uint8 RGB to the outputs asked for."""
        ...


class ExportedPoseEstimator:
    """A file written by ``posefabric export``, ready to predict.

    Attributes:
        metadata: what the file says of itself (skeleton, input, heatmaps, crop rule, ...).
        source: one line for reports.
        decodes: the file holds the decoder; otherwise, and in the flip test, numpy decodes.
    """

    def __init__(
        self,
        session: Session,
        path: Path,
        *,
        batch_size: int = 32,
        input_wh: tuple[int, int] | None = None,
    ) -> None:
        """``input_wh``: another input than the trained one, of a file with a free size."""
        if batch_size < 1:
            raise PosefabricError(f"batch_size: expected 1 or more, got {batch_size}")
        self.path = path
        self.batch_size = batch_size
        self.session = session
        self.metadata = session.metadata
        preset = self.metadata["preset"]
        # Files from before single conventions could be chosen tell the preset alone.
        rules = choose_conventions(preset, **self.metadata.get("conventions", {}))
        trained_wh = tuple(self.metadata["input_wh"])
        self.input_wh = _checked_size(input_wh, self.metadata, path)
        stride = tuple(self.metadata["heatmap"]["stride"])
        if self.input_wh != trained_wh:
            stride = _stride(self.input_wh, rules)
        self.geometry = CropGeometry(self.input_wh, preset, conventions=rules)
        self.codec = NumpyCodec(preset, stride, conventions=rules)
        self.decodes = "keypoints" in session.outputs
        names = self.metadata["skeleton"]["keypoints"]
        self._flip_index = np.arange(len(names))
        for left, right in self.metadata["skeleton"]["flip_pairs"]:
            self._flip_index[[left, right]] = right, left
        digest = self.metadata.get("architecture_digest")
        self.source = (
            f"{session.runtime} export {path} of posefabric {self.metadata['posefabric']}"
        ) + (f" (architecture {digest})" if digest else "")

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
            infer=lambda crops: self.infer(crops, flip),
        )

    def infer(self, crops: np.ndarray, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Crops (B, H, W, 3) uint8 to keypoints (B, K, 2) in input pixels and scores (B, K)."""
        if self.decodes and not flip:
            keypoints, scores = self.session.run(crops, ("keypoints", "scores"))
            return keypoints, scores
        maps = self.score_maps(crops)
        if flip:
            mirrored = self.score_maps(np.ascontiguousarray(crops[:, :, ::-1]))
            maps = (maps + self.codec.flip_back(mirrored, self._flip_index)) / 2
        return self.codec.decode(maps)

    def score_maps(self, crops: np.ndarray) -> np.ndarray:
        """Crops (B, H, W, 3) uint8 RGB to score maps (B, K, h, w) float32."""
        return self.session.run(crops, ("heatmaps",))[0]


def check_version(metadata: dict[str, Any], path: Path) -> None:
    """PosefabricError when a file is of an export version that this program cannot read."""
    if metadata.get("export_version") != EXPORT_VERSION:
        raise PosefabricError(
            f"{path}: export version {metadata.get('export_version')}, this posefabric reads "
            f"{EXPORT_VERSION}; export it again, or use posefabric {metadata['posefabric']}"
        )


def check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise PosefabricError(f"threads: expected 1 or more, got {threads}")


def _checked_size(
    input_wh: tuple[int, int] | None, metadata: dict[str, Any], path: Path
) -> tuple[int, int]:
    width, height = metadata["input_wh"]
    if input_wh is None or tuple(input_wh) == (width, height):
        return width, height
    if not metadata.get("dynamic_size", False):
        raise PosefabricError(
            f"input_wh={tuple(input_wh)}: {path} takes inputs of {(width, height)} alone; export "
            "it with --dynamic-size"
        )
    if any(side < 2 * SIZE_STEP or side % SIZE_STEP for side in input_wh):
        raise PosefabricError(
            f"input_wh={tuple(input_wh)}: expected two multiples of {SIZE_STEP} from "
            f"{2 * SIZE_STEP} on"
        )
    return input_wh[0], input_wh[1]


def _stride(input_wh: tuple[int, int], rules: Conventions) -> tuple[float, float]:
    """Input pixels a heatmap pixel of maps of a quarter of the input, as data.codec has it."""
    width, height = input_wh
    if rules.stride == "unbiased":
        return (width - 1) / (width // 4 - 1), (height - 1) / (height // 4 - 1)
    return 4.0, 4.0
