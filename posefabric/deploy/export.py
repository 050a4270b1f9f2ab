"""A network as one ONNX file: uint8 crops in, score maps and keypoints out, checked."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posefabric import __version__
from posefabric.config import Config
from posefabric.data.batch import Normalisation
from posefabric.data.codec import Codec
from posefabric.data.pipeline import make_codec
from posefabric.deploy.onnx_predictor import EXPORT_VERSION
from posefabric.derive.fold import deployable
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.compact import build_compact
from posefabric.models.network import PoseNetwork
from posefabric.models.supernet import Supernet
from posefabric.run import write_atomic
from posefabric.skeletons import Skeleton
from posefabric.structures import PosefabricError

TOLERANCE = 1e-3  # of score maps, relative to the largest score
BATCHES = (1, 3, 8)

_CROP_RULE = (
    "Widen the person's box (x, y, width, height) about its centre to the aspect ratio of "
    "input_wh, multiply both sides by box_padding, and warp that region to input_wh by linear "
    "interpolation on a black ground. warp in conventions says how: biased, the region spans "
    "W x H pixels about (W / 2, H / 2); unbiased, W - 1 x H - 1 about ((W - 1) / 2, "
    "(H - 1) / 2). Keypoints go back by "
    "the inverse of that warp."
)


class ExportedNetwork(nn.Module):
    """uint8 crops (B, H, W, 3) to score maps (B, K, h, w) and, decoded, keypoints and scores."""

    def __init__(
        self, network: nn.Module, *, normalisation: Normalisation, codec: Codec, decode: bool
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.normalisation = normalisation
        self.codec = codec
        self.decode = decode

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        inputs = self.normalisation.apply(images.permute(0, 3, 1, 2).float())
        maps = self.network.score_maps(self.network(inputs))
        if not self.decode:
            return (maps,)
        keypoints, scores = self.codec.decode(maps)
        return maps, keypoints, scores.clamp(0, 1)


def export_onnx(
    network: nn.Module,
    path: str | os.PathLike[str],
    *,
    config: Config,
    skeleton: Skeleton,
    decode: bool = True,
    opset: int = 18,
    crops: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write a network as one self-contained ONNX file with a dynamic batch.

    Input ``images`` (B, H, W, 3) uint8 RGB crops; the normalisation is in the graph. Outputs
    ``heatmaps`` (B, K, h, w) float32 score maps and, with ``decode``, ``keypoints`` (B, K, 2)
    in input pixels and ``scores`` (B, K) in 0..1. A compact network is folded; a mixture
    becomes the compact network that computes the same (pruned without loss, then folded).
    The metadata tells all that a program needs to use the file, as JSON strings.

    Before the file takes its place it is compared, in onnxruntime on the CPU and in batches of
    1, 3 and 8, with the network as given.

    Args:
        network: compact or mixture, on any device; it is left as it is.
        config: of its run; input_wh, preset and sigma are used.
        crops: (N, H, W, 3) uint8 RGB to compare on; None: seeded noise, which says less.

    Returns:
        Facts to show: path, bytes, opset, batch, outputs, checked_on, and the largest differences
        score_maps_difference (with largest_score, for scale) and, decoded,
        keypoints_difference_px, scores_difference and keypoints_apart (the share of keypoints
        more than 1 px apart: flat maps have ties).

    Raises PosefabricError when the extra is missing, the skeleton or the crops do not fit, the
    exporter fails, the place cannot be written, or score maps differ by more than 1e-3 of the
    largest score.
    """
    onnx, onnxruntime = _require_extra()
    target = Path(path)
    codec = make_codec(config.data)
    given = copy.deepcopy(network).cpu().eval()
    graph = given.architecture() if isinstance(given, PoseNetwork) else None
    if graph is not None and graph.keypoint_names != skeleton.keypoints:
        raise PosefabricError(
            f"skeleton {skeleton.name} has the keypoints {', '.join(skeleton.keypoints)}, the "
            f"network was made for {', '.join(graph.keypoint_names)}; export with that skeleton"
        )
    pixels, checked_on = _check_crops(crops, config.data.input_wh)
    normalisation: Normalisation = getattr(given, "normalisation", Normalisation())
    settings: dict[str, Any] = dict(normalisation=normalisation, codec=codec, decode=decode)
    reference = ExportedNetwork(given, **settings).eval()
    expected = _run_torch(reference, pixels)
    if tuple(expected[0].shape[1:]) != (skeleton.num_keypoints, *reversed(codec.heatmap_wh)):
        raise PosefabricError(
            f"the network gives score maps {tuple(expected[0].shape[1:])}, expected "
            f"{skeleton.num_keypoints} keypoints of {codec.heatmap_wh}; export with the "
            "configuration and skeleton it was trained with"
        )
    outputs = ["heatmaps", "keypoints", "scores"] if decode else ["heatmaps"]
    module = ExportedNetwork(_deployable(given), **settings).eval()
    model = _to_onnx(module, pixels[:2], outputs, opset)
    metadata = _metadata(config, codec, normalisation, skeleton, outputs)
    metadata["architecture_digest"] = graph.digest() if graph is not None else None
    model.producer_name, model.producer_version = "posefabric", __version__
    model.doc_string = f"Pose estimation, {skeleton.name}. {_CROP_RULE}"
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise PosefabricError(f"the exported graph is not valid ONNX: {error}") from error
    data = model.SerializeToString()
    differences = _compare(onnxruntime, data, pixels, expected, outputs)
    worst, allowed = differences["score_maps_difference"], TOLERANCE * differences["largest_score"]
    if not worst <= allowed:
        raise PosefabricError(
            f"{target}: not written: onnxruntime {onnxruntime.__version__} and torch "
            f"{torch.__version__} differ by {worst:.2g} in score maps, expected at most "
            f"{allowed:.2g}; try another opset or other versions"
        )
    write_atomic(target, data)
    return {
        "path": str(target),
        "bytes": len(data),
        "opset": opset,
        "batch": f"dynamic, checked with {', '.join(map(str, BATCHES))}",
        "outputs": ", ".join(outputs),
        "checked_on": checked_on,
        **differences,
    }


def _require_extra() -> tuple[Any, Any]:
    try:
        import onnx
        import onnx.checker
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PosefabricError(
            f'{error.name} is not installed; export needs: pip install "posefabric[export]"'
        ) from error
    return onnx, onnxruntime


def _deployable(network: nn.Module) -> nn.Module:
    if isinstance(network, Supernet):
        # The relaxation of alpha and beta is data to the exporter; as constants it is gone.
        compact = build_compact(prune(network.architecture()))
        transfer_weights(network, compact)
        network = compact.eval()
    return deployable(network)


def _check_crops(crops: np.ndarray | None, input_wh: tuple[int, int]) -> tuple[np.ndarray, str]:
    width, height = input_wh
    if crops is None:
        noise = np.random.default_rng(0).integers(0, 256, (max(BATCHES), height, width, 3))
        return noise.astype(np.uint8), f"{max(BATCHES)} crops of seeded noise"
    crops = np.asarray(crops)
    if crops.dtype != np.uint8 or crops.shape[1:] != (height, width, 3) or not len(crops):
        raise PosefabricError(
            f"crops of shape {crops.shape} and type {crops.dtype}: expected (N, {height}, {width}, "
            "3) uint8 RGB, as crop_person cuts them, at least one"
        )
    # The largest batch needs that many; the smallest example two, or torch takes it for fixed.
    repeats = -(-max(BATCHES) // len(crops))
    return np.concatenate([crops] * repeats), f"{len(crops)} crops given"


@torch.no_grad()
def _run_torch(module: nn.Module, crops: np.ndarray) -> list[np.ndarray]:
    parts = [module(piece) for piece in torch.from_numpy(crops).split(max(BATCHES))]
    return [torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True)]


def _to_onnx(module: nn.Module, crops: np.ndarray, outputs: list[str], opset: int) -> Any:
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (torch.from_numpy(crops),),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["images"],
                output_names=outputs,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            )
        assert program is not None
        model = program.model_proto
    except Exception as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        raise PosefabricError(
            f"torch {torch.__version__} could not export this network with opset {opset} "
            f"({type(error).__name__}: {first})"
        ) from error
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise PosefabricError(
            f"opset={opset}: torch {torch.__version__} could only write opset {written}; use that"
        )
    # The exporter notes source lines and local paths at every node.
    for entry in (model.graph, *model.graph.node, *model.graph.value_info):
        del entry.metadata_props[:]
    return model


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter's progress, hints and warnings are not for the user."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    sink = io.StringIO()
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(sink):
                yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def _compare(
    onnxruntime: Any,
    data: bytes,
    crops: np.ndarray,
    expected: list[np.ndarray],
    outputs: list[str],
) -> dict[str, float]:
    """The largest differences between onnxruntime, in batches of 1, 3 and 8, and torch."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    differences = dict.fromkeys(outputs, 0.0)
    apart: list[np.ndarray] = []
    for size in BATCHES:
        for start in range(0, len(crops), size):
            found = session.run(outputs, {"images": crops[start : start + size]})
            for name, ours, theirs in zip(outputs, found, expected, strict=True):
                distance = np.abs(ours - theirs[start : start + size])
                # max() would pass over NaN.
                differences[name] = float(np.maximum(differences[name], distance.max()))
                if name == "keypoints":
                    apart.append((distance.max(axis=-1) > 1.0).ravel())
    result = {
        "largest_score": float(np.abs(expected[0]).max()),
        "score_maps_difference": differences["heatmaps"],
    }
    if apart:
        result["keypoints_difference_px"] = differences["keypoints"]
        result["scores_difference"] = differences["scores"]
        result["keypoints_apart"] = float(np.concatenate(apart).mean())
    return result


def _metadata(
    config: Config,
    codec: Codec,
    normalisation: Normalisation,
    skeleton: Skeleton,
    outputs: list[str],
) -> dict[str, Any]:
    return {
        "posefabric": __version__,
        "export_version": EXPORT_VERSION,
        "name": config.name,
        "skeleton": {
            "name": skeleton.name,
            "keypoints": skeleton.keypoints,
            "limbs": skeleton.limbs,
            "flip_pairs": skeleton.flip_pairs,
            "sigmas": skeleton.sigmas.tolist(),
            "sigmas_source": skeleton.sigmas_source,
        },
        "input": "images: (batch, height, width, 3) uint8 RGB crops, not normalised",
        "outputs": outputs,
        "input_wh": codec.input_wh,
        "preset": codec.preset,
        "heatmap": {"wh": codec.heatmap_wh, "stride": codec.stride, "sigma": codec.sigma},
        "normalisation": {
            "in_graph": True,
            "mean": normalisation.mean,
            "std": normalisation.std,
            "channel_order": normalisation.channel_order,
        },
        "box_padding": codec.rules.box_padding,
        "box_to_crop": _CROP_RULE,
        "flip_shift": int(codec.rules.flip_shift),
        "conventions": asdict(codec.rules),
    }
