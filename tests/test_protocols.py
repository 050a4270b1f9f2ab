"""The protocols from the command line: MPII, COCO's test server, and each evaluation option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat
from test_end_to_end import command
from trainings import make_config, people

from posefabric.config import Config
from posefabric.models.build import build_supernet
from posefabric.run import RunFolder
from posefabric.train.checkpoint import save_weights
from posefabric.train.phase import evaluate


def untrained(folder: Path, **sections: Any) -> Path:
    """A run whose network has random weights, as it would be after its search."""
    config = make_config(**sections)
    run = RunFolder.create(folder, config=config, kind="search")
    network = build_supernet(config).eval()
    save_weights(run.weights_path, network)
    run.write_text(run.architecture_path.name, network.architecture().to_json())
    run.set_state("finished")
    return folder


@pytest.fixture(scope="module")
def mpii(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = dict(
        format="mpii",
        skeleton="mpii16",
        root=str(shared / "data" / "mpii_sample"),
        val_annotations="test_mpii.json",
        val_images=".",
        test_annotations="test_mpii.json",
        test_images=".",
        headboxes=str(shared / "reference" / "mpii_eval" / "mpii_val_ground_truth.npz"),
    )
    return untrained(tmp_path_factory.mktemp("mpii") / "run", data=sample)


@pytest.mark.slow
def test_mpii_prints_pckh_by_name_and_writes_a_submission(
    mpii: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    path = tmp_path / "pred.mat"
    assert command(monkeypatch, "eval", mpii, "--submission", path) == 0
    said = capsys.readouterr().out
    for name in ("PCKh@0.5", "PCKh@0.1 ", "PCKh@0.1 legacy (0.11)", "PCKh Ankle"):
        assert name in said
    assert "centre and scale of the annotation" in said and "persons 5, of 5" in said
    pred: Any = loadmat(path, struct_as_record=False)["pred"]
    assert pred.shape == (1, 5)
    assert pred[0, 0].annorect[0, 0].annopoints[0, 0].point.shape == (1, 16)
    result = json.loads((mpii / "evaluation-val.json").read_text())
    assert result["oks"] is None and result["pckh"]["persons"] == 5
    options = ["evaluation.pckh_threshold=100", "evaluation.legacy_pckh=false"]
    assert command(monkeypatch, "eval", mpii, *options) == 0
    said = capsys.readouterr().out
    assert "PCKh@100" in said and "legacy" not in said
    assert json.loads((mpii / "evaluation-val.json").read_text())["pckh"]["Mean"] == 100
    assert command(monkeypatch, "eval", mpii, "--submission", tmp_path / "x.json") == 1
    assert "expected a file that ends in .mat" in capsys.readouterr().err


@pytest.mark.slow
def test_coco_test_split_without_keypoints(
    shared: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    sample = shared / "data" / "coco_sample"
    tree = json.loads((sample / "test_coco.json").read_text())
    info = tmp_path / "image_info.json"
    info.write_text(
        json.dumps({"images": tree["images"], "categories": [{"id": 1, "name": "person"}]})
    )
    data = dict(format="coco", root=str(sample), test_annotations=str(info), test_images=".")
    run = untrained(tmp_path / "run", data=data)
    out = tmp_path / "person_keypoints_test-dev2017_mine_results.json"
    chosen = ["data.boxes=test_coco_det_AP_H_56.json", "data.box_score_threshold=0.3"]
    arguments = ["eval", run, *chosen, "--split", "test", "--submission", out, "--no-flip"]
    assert command(monkeypatch, *arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the annotations have no keypoints: nothing to measure" in said
    assert "detections of test_coco_det_AP_H_56.json with score >= 0.3" in said
    written = json.loads(out.read_text())
    assert written and {len(row["keypoints"]) for row in written} == {51}
    assert {row["image_id"] for row in written} <= {image["id"] for image in tree["images"]}
    assert command(monkeypatch, "eval", run, "--split", "test", "--submission", out) == 1
    assert "data.boxes=FILE" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """An evaluation under each changed option, all of one network on the same people."""
    plain = make_config()
    network, dataset = build_supernet(plain).eval(), people(8, seed=1)
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "flip_test": {"evaluation": {"flip_test": False}},
        "flip_shift": {"data": {"flip_shift": False}},
        "rescore_threshold": {"evaluation": {"rescore_threshold": None}},
        "nms_threshold": {"evaluation": {"nms_threshold": None}},
        "nms_area": {"evaluation": {"nms_area": "box"}},
        "pck_threshold": {"evaluation": {"pck_threshold": 5.0}},
        "box_padding": {"data": {"box_padding": 1.5}},
        "posenfs": {"data": {"preset": "posenfs"}},
    }

    def run(config: Config) -> dict[str, Any]:
        return evaluate(network, config, dataset, keep_predictions=True)

    return {name: run(make_config(**change)) for name, change in changes.items()}


def keypoints(result: dict[str, Any]) -> np.ndarray:
    return np.array([row["keypoints"] for row in result["predictions"]])


@pytest.mark.parametrize("name", ["flip_test", "flip_shift", "box_padding", "posenfs"])
def test_options_that_move_keypoints(measured: dict, name: str) -> None:
    assert np.abs(keypoints(measured[name]) - keypoints(measured["plain"])).max() > 0.1


def test_what_an_evaluation_says_of_its_options(measured: dict) -> None:
    assert measured["plain"]["conventions"] == {} and measured["plain"]["flip"] is True
    assert measured["flip_test"]["flip"] is False
    assert measured["flip_shift"]["conventions"] == {"flip_shift": False}
    assert measured["box_padding"]["conventions"] == {"box_padding": 1.5}
    oks = {name: result["oks"] for name, result in measured.items()}
    assert (oks["plain"]["nms_threshold"], oks["nms_threshold"]["nms_threshold"]) == (0.9, None)
    assert [oks[name]["nms_area"] for name in ("plain", "nms_area", "posenfs")] == [
        "crop",
        "box",
        "box",
    ]
    assert (oks["plain"]["score_threshold"], oks["rescore_threshold"]["score_threshold"]) == (
        0.2,
        None,
    )
    assert measured["plain"]["pck"]["threshold"] == 0.2
    assert measured["pck_threshold"]["pck"]["threshold"] == 5.0
    assert measured["pck_threshold"]["pck"]["PCK"] > measured["plain"]["pck"]["PCK"]
