"""Int8 files have int8 weights where they should, and find nearly what the float file finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_network import FOUR, TinyNetwork, blobs, tiny_config

from posefabric.deploy import quantize
from posefabric.deploy.export import export_onnx
from posefabric.deploy.onnx_graph import get_metadata
from posefabric.deploy.onnx_predictor import OnnxPoseEstimator
from posefabric.deploy.quantize import RECIPES, Recipe, choose_int8, quantize_int8
from posefabric.structures import PosefabricError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CROPS = np.stack([blobs(seed, 96, 64) for seed in range(6)])
ALL, HEAD, FIRST_AND_LAST = RECIPES[0], RECIPES[1], RECIPES[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """UDP's decoder blurs by convolutions, which have to stay float."""
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(TinyNetwork(), path, config=tiny_config("udp"), skeleton=FOUR, crops=CROPS)
    return path.read_bytes()


@pytest.fixture(scope="module")
def int8(model: bytes) -> bytes:
    return quantize_int8(model, CROPS, recipe=ALL)


def int8_weights(data: bytes) -> list[np.ndarray]:
    """The weights of the convolutions that are quantised."""
    graph = onnx.load_from_string(data).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    dequantised = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    found = []
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in dequantised:
            source = dequantised[node.input[1]]
            weight, scale, zero = (constants[name] for name in source.input)
            assert scale.shape == (len(weight),), "a scale a channel"
            assert not np.any(zero), "symmetric"
            found.append(weight)
    return found


def test_the_networks_convolutions_are_int8_and_the_decoders_are_not(model, int8) -> None:
    convolutions = [n for n in onnx.load_from_string(model).graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 4, "two of the network, two of the decoder's blur"
    weights = int8_weights(int8)
    assert [weight.shape for weight in weights] == [(8, 3, 8, 8), (4, 8, 5, 5)]
    assert all(weight.dtype == np.int8 for weight in weights)
    # Seven bits: 64 and no more, and the largest of each channel is used.
    assert {int(np.abs(channel).max()) for weight in weights for channel in weight} == {64}


@pytest.mark.parametrize(("recipe", "count"), [(ALL, 2), (HEAD, 1), (FIRST_AND_LAST, 0)])
def test_a_recipe_says_what_stays_float(model, recipe: Recipe, count: int) -> None:
    weights = int8_weights(quantize_int8(model, CROPS, recipe=recipe))
    assert len(weights) == count
    assert [weight.shape for weight in weights] == [(8, 3, 8, 8), (4, 8, 5, 5)][:count]


def test_the_file_predicts_nearly_the_same_and_says_what_it_is(model, int8, tmp_path: Path) -> None:
    estimators = {}
    for name, data in (("float", model), ("int8", int8)):
        (tmp_path / f"{name}.onnx").write_bytes(data)
        estimators[name] = OnnxPoseEstimator(tmp_path / f"{name}.onnx", threads=1)
    pictures = [blobs(seed, 90, 70) for seed in range(20, 26)]
    for flip in (False, True):
        exact, rough = (
            np.concatenate([p.keypoints for p in estimators[name].predict(pictures, flip=flip)])
            for name in ("float", "int8")
        )
        distance = np.linalg.norm(exact - rough, axis=-1)
        # A few of the random network's flat maps have two peaks.
        assert 0 < np.median(distance) < 1.0
    metadata = estimators["int8"].metadata
    assert metadata["precision"] == "int8" and metadata["quantisation"]["calibration_crops"] == 6
    assert metadata["quantisation"]["recipe"] == ALL.name
    before = get_metadata(onnx.load_from_string(model))
    assert before["precision"] == "fp32"
    assert all(metadata[key] == before[key] for key in before if key != "precision")


def test_the_most_int8_of_what_agrees_best_is_taken(model, monkeypatch) -> None:
    file, rows = choose_int8(model, CROPS[:4], CROPS[4:])
    assert [row["recipe"] for row in rows] == [recipe.name for recipe in RECIPES]
    assert [row["chosen"] for row in rows].count(True) == 1
    moved = [row["moved_cells"] for row in rows]
    assert moved[3] == 0, "nothing of this network is left to quantise"
    taken = next(row["recipe"] for row in rows if row["chosen"])
    metadata = get_metadata(onnx.load_from_string(file))
    assert metadata["quantisation"]["recipe"] == taken
    # With a wide tolerance the first recipe is as good as any.
    monkeypatch.setattr(quantize, "AS_GOOD", 1.0)
    monkeypatch.setattr(quantize, "RECIPES", (HEAD, ALL, Recipe("head again", head=True)))
    _, rows = choose_int8(model, CROPS[:4], CROPS[4:])
    assert rows[0]["moved_cells"] == rows[2]["moved_cells"]
    assert not rows[2]["chosen"], "of equals the first"


def test_no_calibration_data_is_said(model) -> None:
    with pytest.raises(PosefabricError, match=r"calibrate on, got none.*data\.root=DIR"):
        quantize_int8(model, CROPS[:0])


def test_what_onnxruntime_cannot_quantise_is_said(model) -> None:
    with pytest.raises(PosefabricError, match="onnxruntime could not quantise this network"):
        quantize_int8(model, CROPS[:, :, :, :1])
