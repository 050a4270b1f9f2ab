"""Run a network over the persons of a data set, and gather what can be measured."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from posefabric.data.batch import Normalisation, prepare_batch
from posefabric.data.codec import Codec
from posefabric.data.crop import CropGeometry
from posefabric.data.loaders import CropLoader, OnBadImage
from posefabric.distributed import from_first, on_each, place, share
from posefabric.evaluate.measures import evaluate_predictions, table
from posefabric.evaluate.oks import coco_results
from posefabric.evaluate.submission import COCO_OPTIONS, write_submission
from posefabric.structures import PersonDataset, PosefabricError, Predictions

__all__ = [
    "Precision",
    "evaluate_network",
    "evaluate_predictions",
    "evaluating",
    "network_parts",
    "predict_dataset",
    "table",
]

_log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
Progress = Callable[[int, int], None]


def predict_dataset(
    network: nn.Module,
    dataset: PersonDataset,
    *,
    geometry: CropGeometry,
    codec: Codec,
    normalisation: Normalisation,
    flip: bool = True,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    workers: int = 0,
    on_bad_image: OnBadImage = "error",
    unreadable: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Keypoints of every person of a data set, in image pixels, in the data set's order.

    Crops are those of evaluation (no augmentation, no margin). The flip test averages the score
    maps of the picture and of its mirror image (CONVENTIONS: flip test). The network is run in
    evaluation mode without gradients; its modules' training flags are put back afterwards.
    Several processes each take consecutive persons, no one twice, and all get all predictions.

    Args:
        network: ``network(images (B, 3, H, W))`` gives raw outputs (B, K, h, w), and
            ``network.score_maps(outputs)`` scores in 0..1 of the same shape.
        geometry, codec, normalisation: of the training; the geometry's margin is not used.
        device: where the network is; none: where its parameters are.
        precision: bf16 runs the network under autocast; scores are float32 in any case.
        workers: processes that read pictures.
        on_bad_image: ``skip`` leaves persons of unreadable pictures out (logged as a warning).
        unreadable: filled with the files that were skipped and why, when given.
        progress: called with the persons done and their total after every batch.

    Raises:
        DataError: a picture cannot be read, and ``on_bad_image`` is ``error``.
        PosefabricError: an option is unknown, or the score maps do not fit the codec.
    """
    if precision not in ("fp32", "bf16"):
        raise PosefabricError(f"precision: expected fp32 or bf16, got {precision!r}")
    device = _device_of(network) if device is None else torch.device(device)
    geometry = replace(geometry, margin=1.0)
    total = len(dataset.persons)

    def predict_own() -> tuple[list[np.ndarray], dict[str, str]]:
        rows = np.arange(total)[share(total, place())]
        if not len(rows):
            return _empty(dataset.skeleton.num_keypoints), {}
        loader = CropLoader(
            dataset,
            geometry,
            batch_size=batch_size,
            rows=rows,
            workers=workers,
            on_bad_image=on_bad_image,
        )
        found = [_empty(dataset.skeleton.num_keypoints)]
        done = 0
        for batch in loader.batches():
            posed = prepare_batch(
                batch,
                geometry=geometry,
                codec=codec,
                normalisation=normalisation,
                skeleton=dataset.skeleton,
                augment=None,
                generator=None,
                device=device,
            )
            maps = _score_maps(network, posed.images, precision)
            _check_maps(maps, len(posed.images), dataset, codec)
            if flip:
                mirrored = _score_maps(network, posed.images.flip(-1), precision)
                maps = (maps + codec.flip_back(mirrored, dataset.skeleton.flip_index)) / 2
            points, confidence = codec.decode(maps)
            to_image = posed.input_to_image.to(points)
            points = points @ to_image[:, :, :2].transpose(1, 2) + to_image[:, None, :, 2]
            readable = ~batch.unreadable.numpy()
            tensors = points.float(), confidence.float().clamp(0, 1), batch.index
            found.append([tensor.cpu().numpy()[readable] for tensor in tensors])
            done += len(batch.index)
            if progress is not None:
                progress(total if done == len(rows) else done * place().ranks, total)
        return [np.concatenate(column) for column in zip(*found, strict=True)], loader.unreadable

    with evaluating(network), torch.no_grad():
        shares = on_each(predict_own)
    # Ranks have consecutive rows, so that the data set's order is kept.
    columns = zip(*(found for found, _ in shares), strict=True)
    keypoints, scores, index = (np.concatenate(column) for column in columns)
    predictions = Predictions(keypoints=keypoints, scores=scores, index=index)
    reasons = {file: reason for _, found in shares for file, reason in found.items()}
    left_out = total - len(predictions.index)
    if left_out:
        _log.warning(
            "%s: %d persons left out, %d pictures cannot be read: %s",
            dataset.name,
            left_out,
            len(reasons),
            "; ".join(reasons.values()),
        )
    if unreadable is not None:
        unreadable.update(reasons)
    return predictions


def _empty(joints: int) -> list[np.ndarray]:
    """Keypoints, scores and rows of nobody."""
    return [
        np.empty((0, joints, 2), np.float32),
        np.empty((0, joints), np.float32),
        np.empty(0, np.int64),
    ]


def evaluate_network(
    network: nn.Module,
    dataset: PersonDataset,
    *,
    geometry: CropGeometry,
    codec: Codec,
    normalisation: Normalisation,
    flip: bool = True,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    workers: int = 0,
    on_bad_image: OnBadImage = "error",
    progress: Progress | None = None,
    parts: Mapping[str, Sequence[int]] | None = None,
    keep_predictions: bool = False,
    on_predictions: Callable[[Predictions], None] | None = None,
    submission: Path | None = None,
    **measures: Any,
) -> dict[str, Any]:
    """Predict a data set and measure it: :func:`predict_dataset`, :func:`evaluate_predictions`.

    Args:
        parts: none: the parts of the network's own architecture, where it tells one.
        keep_predictions: adds ``predictions``: the persons that AP is measured on, rescored and
            after OKS-NMS under the same options, in the COCO results format.
        on_predictions: called with the predictions before they are measured.
        submission: where to write the predictions for a test server (see write_submission); adds
            ``submission``, what was written.
        measures: further options of :func:`evaluate_predictions`.
        Others: as in predict_dataset.

    Returns:
        The result of evaluate_predictions, and how it was made: flip, precision, preset,
        conventions (those that are not the preset's), input_wh, unreadable (file to reason).
    """
    unreadable: dict[str, str] = {}
    predictions = predict_dataset(
        network,
        dataset,
        geometry=geometry,
        codec=codec,
        normalisation=normalisation,
        flip=flip,
        batch_size=batch_size,
        device=device,
        precision=precision,
        workers=workers,
        on_bad_image=on_bad_image,
        unreadable=unreadable,
        progress=progress,
    )
    if on_predictions is not None:
        on_predictions(predictions)
    if parts is None:
        parts = network_parts(network)
    measures.setdefault("nms_area", codec.rules.nms_area)
    measures.setdefault("box_padding", codec.rules.box_padding)
    result = from_first(
        lambda: evaluate_predictions(
            dataset, predictions, input_wh=geometry.input_wh, parts=parts, **measures
        )
    )
    result.update(
        flip=flip,
        precision=precision,
        preset=codec.preset,
        conventions=codec.rules.differing(codec.preset),
        input_wh=[int(side) for side in geometry.input_wh],
        unreadable=unreadable,
    )
    chosen = {name: value for name, value in measures.items() if name in COCO_OPTIONS}
    chosen["input_wh"] = geometry.input_wh
    if keep_predictions:
        result["predictions"] = coco_results(dataset, predictions, **chosen)
    if submission is not None:
        result["submission"] = from_first(
            lambda: write_submission(dataset, predictions, submission, **chosen)
        )
    return result


def network_parts(network: nn.Module) -> dict[str, tuple[int, ...]] | None:
    """Part name to keypoints of the network's architecture; None where it tells none."""
    architecture = getattr(network, "architecture", None)
    if not callable(architecture):
        return None
    graph: Any = architecture()
    return {part.name: tuple(part.keypoints) for part in graph.parts}


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and every module's own training flag as it was outside."""
    flags = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _score_maps(network: Any, images: Tensor, precision: Precision) -> Tensor:
    low = precision == "bf16"
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low):
        outputs = network(images.contiguous(memory_format=torch.channels_last))
    # Softmax over a whole map and sub-pixel decoding need more than eight bits.
    return network.score_maps(outputs.float())


def _check_maps(maps: Tensor, count: int, dataset: PersonDataset, codec: Codec) -> None:
    width, height = codec.heatmap_wh
    expected = (count, dataset.skeleton.num_keypoints, height, width)
    if tuple(maps.shape) != expected:
        raise PosefabricError(
            f"the network gives score maps of shape {tuple(maps.shape)}, expected {expected}: "
            f"skeleton {dataset.skeleton.name} and a codec with heatmap_wh {codec.heatmap_wh}; "
            "use the skeleton and input_wh the network was made for"
        )


def _device_of(network: nn.Module) -> torch.device:
    for tensor in network.parameters():
        return tensor.device
    return torch.device("cpu")
