"""A network as one ONNX file, checked against torch before it takes its place."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from posefabric.config import Config
from posefabric.deploy.export_check import (
    BATCHES,
    check_crops,
    differences,
    require_same,
    resized,
    run_torch,
)
from posefabric.deploy.exported import SIZE_STEP
from posefabric.deploy.onnx_graph import deployable_network, exported_network, make_onnx
from posefabric.models.network import PoseNetwork
from posefabric.run import write_atomic
from posefabric.skeletons import Skeleton
from posefabric.structures import PosefabricError


def export_onnx(
    network: nn.Module,
    path: str | os.PathLike[str],
    *,
    config: Config,
    skeleton: Skeleton,
    decode: bool = True,
    opset: int = 18,
    crops: np.ndarray | None = None,
    dynamic_size: bool = False,
) -> dict[str, Any]:
    """Write a network as one self-contained ONNX file with a dynamic batch.

    Input ``images`` (B, H, W, 3) uint8 RGB crops; the normalisation is in the graph. Outputs
    ``heatmaps`` (B, K, h, w) float32 score maps and, with ``decode``, ``keypoints`` (B, K, 2)
    in input pixels and ``scores`` (B, K) in 0..1. A compact network is folded; a mixture
    becomes the compact network that computes the same (pruned without loss, then folded).
    The metadata tells all that a program needs to use the file, as JSON strings.

    Before the file takes its place it is compared, in onnxruntime on the CPU and in batches of
    1, 3 and 8, with the network as given; with ``dynamic_size`` at a second size too.

    Args:
        network: compact or mixture, on any device; it is left as it is.
        config: of its run; input_wh, preset and sigma are used.
        crops: (N, H, W, 3) uint8 RGB to compare on; None: seeded noise, which says less.
        dynamic_size: height and width are free, in steps of 32. ``decode`` must be off, since the
            decoder's strides and map are of one size; the predictors decode.

    Returns:
        Facts to show: path, bytes, opset, batch, size, outputs, checked_on, and what
        :func:`posefabric.deploy.export_check.differences` says (of the worse size).

    Raises PosefabricError when the extra is missing, the skeleton or the crops do not fit, the
    exporter fails, the place cannot be written, or score maps differ by more than 1e-3 of the
    largest score.
    """
    onnxruntime = require_export()
    target = Path(path)
    if decode and dynamic_size:
        raise PosefabricError(
            "dynamic_size: the decoder in the graph is made for one size; export with decode=False "
            "(--no-decode), and the predictors decode"
        )
    given = copy.deepcopy(network).cpu().eval()
    graph = given.architecture() if isinstance(given, PoseNetwork) else None
    if graph is not None and graph.keypoint_names != skeleton.keypoints:
        raise PosefabricError(
            f"skeleton {skeleton.name} has the keypoints {', '.join(skeleton.keypoints)}, the "
            f"network was made for {', '.join(graph.keypoint_names)}; export with that skeleton"
        )
    pixels, checked_on = check_crops(crops, config.data.input_wh)
    reference = exported_network(given, config, decode=decode)
    expected = run_torch(reference, pixels)
    heatmap_wh = reference.codec.heatmap_wh
    if tuple(expected[0].shape[1:]) != (skeleton.num_keypoints, *reversed(heatmap_wh)):
        raise PosefabricError(
            f"the network gives score maps {tuple(expected[0].shape[1:])}, expected "
            f"{skeleton.num_keypoints} keypoints of {heatmap_wh}; export with the "
            "configuration and skeleton it was trained with"
        )
    model = make_onnx(
        exported_network(deployable_network(given), config, decode=decode),
        pixels,
        config=config,
        skeleton=skeleton,
        digest=graph.digest() if graph is not None else None,
        opset=opset,
        dynamic_size=dynamic_size,
    )
    data = model.SerializeToString()
    session = open_bytes(data)

    def run(images: np.ndarray) -> list[np.ndarray]:
        return session.run(reference.outputs, {"images": images})

    found = differences(run, pixels, expected, reference.outputs)
    what = f"{target}: not written: onnxruntime {onnxruntime.__version__}"
    require_same(found, what=what)
    size = "fixed, {} x {}".format(*config.data.input_wh)
    if dynamic_size:
        other = second_size(config.data.input_wh)
        images = resized(pixels, other)
        second = differences(run, images, run_torch(reference, images), reference.outputs)
        require_same(second, what=f"{what} at {other[0]} x {other[1]}")
        found = max(found, second, key=lambda one: one["score_maps_difference"])
        checked = " and ".join(f"{w} x {h}" for w, h in (config.data.input_wh, other))
        size = f"dynamic in steps of {SIZE_STEP}, checked with {checked}"
    write_atomic(target, data)
    return {
        "path": str(target),
        "bytes": len(data),
        "opset": opset,
        "batch": f"dynamic, checked with {', '.join(map(str, BATCHES))}",
        "size": size,
        "outputs": ", ".join(reference.outputs),
        "checked_on": checked_on,
        **found,
    }


def second_size(input_wh: tuple[int, int]) -> tuple[int, int]:
    """Another input than the trained one, of another shape too, to check a free size with."""
    return input_wh[0] + SIZE_STEP, input_wh[1] + 2 * SIZE_STEP


def require_export() -> Any:
    """The module onnxruntime; PosefabricError where something of the extra is missing."""
    try:
        import onnx
        import onnx.checker  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PosefabricError(
            f'{error.name} is not installed; export needs: pip install "posefabric[export]"'
        ) from error
    return onnxruntime


def open_bytes(model: bytes, *, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU; ``threads``: none: as onnxruntime chooses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
