"""Poses from pictures with a trained network, in torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posefabric.data.batch import Normalisation
from posefabric.data.codec import Codec
from posefabric.data.crop import CropGeometry
from posefabric.data.pipeline import make_codec
from posefabric.deploy.persons import Boxes, Pictures, PosePrediction, predict_persons
from posefabric.derive.fold import deployable
from posefabric.models.build import choose_device, load_network
from posefabric.run import RunFolder
from posefabric.skeletons import Skeleton, load_skeleton
from posefabric.structures import PosefabricError

__all__ = ["PoseEstimator", "PosePrediction"]


class PoseEstimator:
    """A network with all it needs to turn pictures into poses."""

    def __init__(
        self,
        *,
        network: nn.Module,
        skeleton: Skeleton,
        codec: Codec,
        normalisation: Normalisation,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        source: str = "a network made in this program",
    ) -> None:
        """Takes the network over: it is moved to ``device`` and put in evaluation mode.

        ``network(images (B, 3, H, W))`` gives raw outputs and ``network.score_maps(outputs)``
        scores (B, K, h, w). ``batch_size`` persons are predicted at a time.
        """
        if batch_size < 1:
            raise PosefabricError(f"batch_size: expected 1 or more, got {batch_size}")
        self.device = torch.device(device)
        self.network: Any = network.to(self.device).eval()
        self.skeleton = skeleton
        self.geometry = CropGeometry(codec.input_wh, codec.preset, conventions=codec.conventions)
        self.codec = codec
        self.normalisation = normalisation
        self.batch_size = batch_size
        self.source = source

    @classmethod
    def load(
        cls,
        run_path: str | os.PathLike[str],
        which: str = "auto",
        device: str = "auto",
        *,
        batch_size: int = 32,
    ) -> PoseEstimator:
        """The estimator of a run folder; ``source`` says which of its runs was taken.

        Args:
            which: as in :meth:`RunFolder.resolve`; auto is the newest finished compact network,
                else the run itself.
            device: auto (the GPU if there is one), cpu, cuda or cuda:N.

        Raises PosefabricError when there is no such run, or it has no weights yet.
        """
        target = choose_device(device)
        run = RunFolder.open(Path(run_path)).resolve(which)
        network = load_network(run)
        skeleton = load_skeleton(run.config.data.skeleton)
        if skeleton.keypoints != network.graph.keypoint_names:
            raise PosefabricError(
                f"{run.path}: the skeleton {run.config.data.skeleton} has "
                f"{skeleton.num_keypoints} keypoints ({', '.join(skeleton.keypoints[:3])}...), "
                f"the network was made for {', '.join(network.graph.keypoint_names)}; restore "
                "the skeleton file it was trained with"
            )
        normalisation = network.normalisation
        return cls(
            network=deployable(network),
            skeleton=skeleton,
            codec=make_codec(run.config.data),
            normalisation=normalisation,
            device=target,
            batch_size=batch_size,
            source=run.describe(),
        )

    def predict(
        self, images: Pictures, boxes: Boxes = None, flip: bool = False
    ) -> list[PosePrediction]:
        """Poses in picture pixels, one PosePrediction a picture.

        Args:
            images: (H, W, 3) uint8 RGB, a path, or a sequence of those.
            boxes: per picture (N, 4) xywh in its pixels or None (the whole picture is one box);
                for a single picture the (N, 4) array itself will do.
            flip: average with the mirrored input (CONVENTIONS: flip test); twice the time.

        Raises DataError that names the picture, and the box, that cannot be used.
        """
        return predict_persons(
            images,
            boxes,
            geometry=self.geometry,
            num_keypoints=self.skeleton.num_keypoints,
            batch_size=self.batch_size,
            infer=lambda crops: self._infer(crops, flip),
        )

    @torch.no_grad()
    def _infer(self, crops: np.ndarray, flip: bool) -> tuple[np.ndarray, np.ndarray]:
        pixels = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2).float()
        images = self.normalisation.apply(pixels)
        maps = self._score_maps(images)
        if flip:
            mirrored = self._score_maps(images.flip(-1))
            maps = (maps + self.codec.flip_back(mirrored, self.skeleton.flip_index)) / 2
        keypoints, scores = self.codec.decode(maps)
        return keypoints.cpu().numpy(), scores.cpu().numpy()

    def _score_maps(self, images: Tensor) -> Tensor:
        outputs = self.network(images.contiguous(memory_format=torch.channels_last))
        return self.network.score_maps(outputs.float())
