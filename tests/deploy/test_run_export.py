"""A run becomes files for each runtime, each measured; what loses too much is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import command, shake
from trainings import make_config

from posefabric.data.pipeline import open_dataset
from posefabric.deploy import export_table, quantize, run_export
from posefabric.deploy.export_table import Variant
from posefabric.deploy.export_text import printable
from posefabric.deploy.exported_evaluation import evaluate_exported, predict_exported
from posefabric.deploy.onnx_predictor import OnnxPoseEstimator
from posefabric.deploy.predictor import PoseEstimator
from posefabric.deploy.run_crops import person_crops
from posefabric.deploy.run_export import Export, export_run
from posefabric.deploy.run_report import build_report, predict, shipped_network
from posefabric.models.build import build_supernet
from posefabric.models.weights import save_weights
from posefabric.run import RunFolder
from posefabric.structures import PosefabricError
from posefabric.train.phase import evaluate

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def make_run(path: Path, **sections: Any) -> RunFolder:
    """A finished search of a random network, its output layers far from flat."""
    config = make_config(**sections)
    network = build_supernet(config)
    shake(network, 0)
    run = RunFolder.create(path, config=config, kind="search")
    save_weights(run.weights_path, network)
    run.write_text(run.architecture_path.name, network.architecture().to_json())
    run.set_state("finished")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("run") / "run", model=dict(first_layer=4))


@pytest.fixture(scope="module")
def with_openvino() -> bool:
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def exported(run: RunFolder, with_openvino: bool) -> Export:
    """Every file, whatever it loses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_table, "REPEATS", 2)
        patch.setattr(quantize, "RECIPES", quantize.RECIPES[:2])
        return export_run(
            run, run.onnx_path, quantize="int8", openvino=with_openvino, max_loss=100.0
        )


def test_every_file_is_there_and_in_the_table(run, exported: Export, with_openvino: bool) -> None:
    names = {path.name for path in exported.files}
    variants = ["torch eager", "onnxruntime fp32", "onnxruntime int8"]
    assert {"model.onnx", "model.int8.onnx", "model.json"} <= names
    if with_openvino:
        variants[2:2] = ["openvino fp32"]
        variants += ["openvino int8"]
        assert {"model.xml", "model.bin", "model.int8.xml", "model.int8.bin"} <= names
    assert all(path.is_file() and path.parent == run.path for path in exported.files)
    table = json.loads((run.path / "model.json").read_text())
    assert [row["variant"] for row in table["rows"]] == variants
    assert table["machine"]["cpu"] and table["conditions"]["persons"] == 8
    for row in table["rows"]:
        assert list(row["latency"]) == ["1", "4", "16"]
        assert all(t["low"] <= t["ms"] <= t["high"] for t in row["latency"].values())
    for row in table["rows"][1:]:
        place = run.path / row["file"]
        size = place.stat().st_size
        if place.suffix == ".xml":
            size += place.with_suffix(".bin").stat().st_size
        assert row["bytes"] == size and row["written"]
    assert exported.refused == []


def test_a_float_file_is_measured_as_the_run_was(run, exported: Export) -> None:
    """The same persons, flip test, NMS and thresholds, through another runtime."""
    assert exported.table is not None
    expected = evaluate(shipped_network(run), run.config, open_dataset(run.config.data, "val"))
    for row in exported.table["rows"][1:]:
        if row["variant"].endswith("fp32"):
            assert row["PCK"] == pytest.approx(100 * expected["pck"]["PCK"], abs=0.01)
            assert row["AP"] == pytest.approx(100 * expected["oks"]["AP"], abs=0.01)
            assert row["check"]["score_maps_difference"] < 1e-4 * row["check"]["largest_score"]
        else:
            assert row["check"]["score_maps_difference"] > 1e-3 * row["check"]["largest_score"]


@pytest.mark.parametrize("flip", [False, True])
def test_a_data_set_through_a_file_is_the_networks(run, exported: Export, flip: bool) -> None:
    estimator = OnnxPoseEstimator(run.onnx_path, threads=1, batch_size=3)
    dataset = open_dataset(run.config.data, "val")
    config = run.config.model_copy(deep=True)
    config.evaluation.flip_test = flip
    found = predict_exported(estimator, dataset, flip=flip)
    expected = predict(shipped_network(run), config, dataset)
    assert found.index.tolist() == expected.index.tolist() == list(range(8))
    np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=0.05)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


def test_the_options_of_the_run_decide_how_a_file_is_measured(run, exported: Export) -> None:
    estimator = OnnxPoseEstimator(run.onnx_path, threads=1)
    dataset = open_dataset(run.config.data, "val")
    config = run.config.model_copy(deep=True)
    config.evaluation.nms_threshold, config.evaluation.pck_threshold = None, 5.0
    result = evaluate_exported(estimator, config, dataset)
    assert result["oks"]["nms_threshold"] is None and result["pck"]["threshold"] == 5.0
    assert result["pck"]["PCK"] > evaluate_exported(estimator, run.config, dataset)["pck"]["PCK"]


def test_the_table_is_in_the_report_and_readable(run, exported: Export) -> None:
    from rich.console import Console

    console = Console(width=250)
    with console.capture() as captured:
        console.print(printable(exported.table or {}))
    text = " ".join(captured.get().split())
    page = build_report(run).read_text()
    for word in ("onnxruntime int8", "ms, batch 16", "loss, points", "flip test on"):
        assert word in text and word in page, word
    assert "Shipped" in page


def test_calibration_persons_are_those_of_training(run) -> None:
    config = run.config
    drawn = person_crops(config, "train", 5, seed=3)
    again = person_crops(config, "train", 5, seed=3)
    first = person_crops(config, "train", 16, seed=None)
    assert drawn.shape == (5, 64, 64, 3) and np.array_equal(drawn, again)
    assert all(any(np.array_equal(crop, other) for other in first) for crop in drawn)
    validation = person_crops(config, "val", 8, seed=None)
    assert not any(np.array_equal(crop, other) for crop in drawn for other in validation)


def worse_in_int8(estimator: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """An evaluation in which int8 loses 0.8 points of PCK and wins AP."""
    low = estimator.metadata["precision"] == "int8"
    return {
        "pck": {"PCK": 0.492 if low else 0.5},
        "oks": {"AP": 0.3 if low else 0.2},
        "pckh": None,
    }


def test_what_loses_too_much_is_not_written(run, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_export, "evaluate_exported", worse_in_int8)
    monkeypatch.setattr(export_table, "REPEATS", 1)
    monkeypatch.setattr(quantize, "RECIPES", quantize.RECIPES[:1])
    out = tmp_path / "model.onnx"
    line = ("export", run.path, "--quantize", "int8", "--out", out)
    assert command(monkeypatch, *line, "--max-loss", "0.5") == 1
    said = capsys.readouterr()
    assert "model.int8.onnx: not written: onnxruntime int8 loses 0.80 points of PCK" in said.err
    assert "--max-loss 0.5" in said.err and f"written: {out}" in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.onnx"]
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert [row["written"] for row in rows] == [True, True, False]
    assert rows[2]["loss"] == pytest.approx({"PCK": 0.8, "AP": -10.0})
    assert "+0.80" in said.out


def test_a_loss_that_cannot_be_measured_is_too_much(exported: Export, run) -> None:
    estimator = OnnxPoseEstimator(run.onnx_path, threads=1)
    plain, quantised = (
        Variant(name=name, path=Path(name), estimator=estimator, bytes=1, check={})
        for name in ("onnxruntime fp32", "onnxruntime int8")
    )
    refused = run_export._refused([plain, quantised], 0.5)
    assert "no keypoints to measure the loss" in refused["onnxruntime int8"]
    plain.measures, quantised.measures = {"PCK": 0.5}, {"PCK": 0.492}
    assert not run_export._refused([plain, quantised], 0.9)
    quantised.measures = {"PCK": float("nan")}
    assert "loses nan points" in run_export._refused([plain, quantised], 0.5)["onnxruntime int8"]


def test_without_measuring_there_is_the_checked_file_alone(run, tmp_path: Path) -> None:
    found = export_run(run, tmp_path / "model.onnx", measure=False)
    assert found.table is None and found.files == [tmp_path / "model.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_free_size_is_the_networks_at_every_size(run, tmp_path: Path) -> None:
    """Through the predictor, which decodes, against torch at that size."""
    path = tmp_path / "free.onnx"
    check = export_run(run, path, dynamic_size=True, measure=False).check
    assert check["size"] == "dynamic in steps of 32, checked with 64 x 64 and 96 x 128"
    assert check["outputs"] == "heatmaps"
    pictures = [np.random.default_rng(k).integers(0, 255, (90, 70, 3), np.uint8) for k in (1, 2)]
    network = shipped_network(run)
    for size in ((64, 64), (128, 96)):
        config = run.config.model_copy(deep=True)
        config.data.input_wh = size
        from posefabric.data.pipeline import make_codec

        expected = PoseEstimator(
            network=network,
            skeleton=open_dataset(config.data, "val").skeleton,
            codec=make_codec(config.data),
            normalisation=network.normalisation,
        ).predict(pictures)
        found = OnnxPoseEstimator(path, threads=1, input_wh=size).predict(pictures)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours.keypoints, theirs.keypoints, atol=0.05)
    with pytest.raises(PosefabricError, match=r"input_wh=\(70, 64\): expected .* multiples of 32"):
        OnnxPoseEstimator(path, input_wh=(70, 64))


def test_what_is_asked_in_vain_is_said_before_anything_is_written(
    run, tmp_path: Path, monkeypatch, capsys
) -> None:
    def refused(*options: str) -> str:
        assert command(monkeypatch, "export", *options, "--out", tmp_path / "m.onnx") == 1
        assert list(tmp_path.glob("*.onnx")) == []
        return capsys.readouterr().err

    path = str(run.path)
    assert "onnxruntime has no convolutions in bf16" in refused(path, "--quantize", "bf16")
    assert "leave out --no-measure" in refused(path, "--quantize", "int8", "--no-measure")
    assert "max_loss: expected points of 0 or more" in refused(path, "--max-loss", "-1")
    assert "needs training pictures to calibrate on" in refused(
        path, "--quantize", "int8", "data.format=coco"
    )
    missing = "data.root=nowhere"
    assert "nowhere: no such folder" in refused(
        path, "--quantize", "int8", "data.format=coco", missing
    )
    assert str(tmp_path / "none") in refused(str(tmp_path / "none"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text("{")
    assert "run.json" in refused(str(tmp_path / "torn"))


def test_a_missing_openvino_is_named(run, tmp_path: Path, monkeypatch, capsys) -> None:
    import builtins

    real = builtins.__import__

    def refusing(name, *args, **kwargs):
        if name.split(".")[0] == "openvino":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    line = ("export", run.path, "--openvino", "--out", tmp_path / "m.onnx")
    assert command(monkeypatch, *line) == 1
    assert 'pip install "posefabric[openvino]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
