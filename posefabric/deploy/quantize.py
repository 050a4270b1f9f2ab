"""An ONNX file in int8: static quantisation by onnxruntime, calibrated on crops.

Weights are symmetric with a scale a channel, activations have a zero point of their own. What
surrounds the network in the graph, normalisation and decoder, stays float.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posefabric.deploy.export import open_bytes
from posefabric.deploy.onnx_graph import get_metadata, set_metadata
from posefabric.structures import PosefabricError

BATCH = 8
# Int8 kernels exist for these; what lies between two convolutions need not leave int8.
OPERATORS = ("Conv", "Add", "Relu", "Clip", "Resize", "Concat", "MaxPool", "AveragePool")


@dataclass(frozen=True)
class Recipe:
    """What is left in float.

    Attributes:
        name: for tables and the file's metadata.
        head: the last convolutions, one a part, whose maps are compared and decoded.
        stem: the first convolution, which reads pixels.
        joins: sums and resizing between convolutions (only convolutions are int8 then).
    """

    name: str
    head: bool = False
    stem: bool = False
    joins: bool = False


# From the most in int8 to the least; `choose` takes the first that is as good as the best.
RECIPES = (
    Recipe("all in int8"),
    Recipe("last convolutions in float", head=True),
    Recipe("last convolutions and sums in float", head=True, joins=True),
    Recipe("first and last convolutions and sums in float", head=True, stem=True, joins=True),
)
AS_GOOD = 1.05  # times the smallest disagreement


def quantize_int8(model: bytes, calibration: np.ndarray, *, recipe: Recipe = RECIPES[1]) -> bytes:
    """The file's network with int8 weights and activations (QDQ format), and its metadata.

    Weights keep to seven bits: on processors without VNNI the int8 products of two are summed in
    16 bits, which eight-bit weights overflow (onnxruntime's ``reduce_range``).

    Args:
        model: an ONNX file of export_onnx.
        calibration: (N, H, W, 3) uint8 crops like those to come, for the activations' ranges
            (the smallest and largest values).
        recipe: what stays float.

    Raises PosefabricError without crops, or when onnxruntime cannot quantise the graph.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not len(calibration):
        raise PosefabricError(
            "int8 needs pictures to calibrate on, got none; give the run's data: data.root=DIR"
        )
    source = onnx.load_from_string(model)
    metadata = get_metadata(source)
    # Root, since its advice on a missing preparation and the like is not for the user.
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            given, prepared, written = (
                Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "int8")
            )
            given.write_bytes(model)
            # Without sympy's shape inference, which wants every operation known to it.
            quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
            graph = onnx.load(str(prepared)).graph
            operators = ("Conv",) if recipe.joins else OPERATORS
            quantize_static(
                str(prepared),
                str(written),
                _Reader(calibration),  # type: ignore[arg-type]
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(operators),
                nodes_to_exclude=_left_float(graph, recipe),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
            result = onnx.load(str(written))
    except PosefabricError:
        raise
    # Its errors have no common base class but Exception.
    except Exception as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        raise PosefabricError(
            f"onnxruntime could not quantise this network ({type(error).__name__}: {first})"
        ) from error
    finally:
        root.setLevel(level)
    metadata["precision"] = "int8"
    metadata["quantisation"] = {
        "recipe": recipe.name,
        "weights": "int8 symmetric, a scale a channel, seven bits",
        "activations": "uint8, smallest to largest value",
        "calibration_crops": len(calibration),
    }
    set_metadata(result, metadata)
    result.producer_name, result.producer_version = source.producer_name, source.producer_version
    result.doc_string = source.doc_string
    return result.SerializeToString()


def choose_int8(
    model: bytes, calibration: np.ndarray, held_out: np.ndarray
) -> tuple[bytes, list[dict[str, Any]]]:
    """The int8 file that leaves least in float among those that agree best with the float file.

    Each recipe is made and compared on ``held_out`` crops, of which the calibration saw none;
    no annotation is looked at. The measure is the mean, over crops and keypoints, of how far the
    score map's maximum moves, in heatmap cells, at most 4 a keypoint (a maximum that jumps to
    another place is one mistake, however far away).

    Returns the file, and of each recipe its name, moved_cells and whether it was chosen.
    """
    expected = _maxima(model, held_out)
    files, rows = [], []
    for recipe in RECIPES:
        file = quantize_int8(model, calibration, recipe=recipe)
        distance = np.linalg.norm(_maxima(file, held_out) - expected, axis=-1)
        files.append(file)
        moved = float(np.minimum(distance, 4.0).mean())
        rows.append({"recipe": recipe.name, "moved_cells": moved, "chosen": False})
    best = min(row["moved_cells"] for row in rows)
    chosen = next(k for k, row in enumerate(rows) if row["moved_cells"] <= AS_GOOD * best)
    rows[chosen]["chosen"] = True
    return files[chosen], rows


def _maxima(model: bytes, crops: np.ndarray) -> np.ndarray:
    """(N, K, 2) x and y of the largest score, heatmap cells."""
    session = open_bytes(model)
    found = []
    for start in range(0, len(crops), BATCH):
        (maps,) = session.run(["heatmaps"], {"images": crops[start : start + BATCH]})
        y, x = np.divmod(maps.reshape(*maps.shape[:2], -1).argmax(-1), maps.shape[-1])
        found.append(np.stack([x, y], axis=-1))
    return np.concatenate(found).astype(np.float64)


class _Reader:
    """Batches of crops as onnxruntime's calibration reads them."""

    def __init__(self, crops: np.ndarray) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter(
            [{"images": crops[k : k + BATCH]} for k in range(0, len(crops), BATCH)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _left_float(graph: Any, recipe: Recipe) -> list[str]:
    """Names of the nodes that are not quantised."""
    network = {node.name for node in _ancestors(graph, "heatmaps")}
    left = [node.name for node in graph.node if node.name not in network]
    for node in _ancestors(graph, "heatmaps", behind="Conv"):
        # The maps of the parts are summed and squashed in float.
        if node.op_type != "Conv" or recipe.head:
            left.append(node.name)
    if recipe.stem:
        left.append(next(node.name for node in graph.node if node.op_type == "Conv"))
    return left


def _ancestors(graph: Any, output: str, *, behind: str | None = None) -> list[Any]:
    """The nodes that an output depends on; those behind an operator of that type left out."""
    producers = {name: node for node in graph.node for name in node.output}
    found: dict[str, Any] = {}
    pending = [output]
    while pending:
        node = producers.get(pending.pop())
        if node is None or node.name in found:
            continue
        found[node.name] = node
        if node.op_type != behind:
            pending += node.input
    return list(found.values())
