"""PCK and PCKh, proven on published predictions and on small cases counted by hand."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from posefabric.data.coco import read_coco
from posefabric.evaluate.measures import evaluate_predictions, table
from posefabric.evaluate.pck import mpii_pckh, pck, pck_box, pck_torso
from posefabric.skeletons import load_skeleton
from posefabric.structures import PosefabricError, Predictions

SHARED = Path(__file__).resolve().parents[3] / "shared"
LSP = load_skeleton("lsp14")


@pytest.fixture(scope="module")
def mpii() -> dict[str, np.ndarray]:
    folder = SHARED / "reference" / "mpii_eval"
    if not folder.is_dir():
        pytest.skip("needs ../shared/reference/mpii_eval")
    arrays: dict[str, np.ndarray] = {}
    for file in ("mpii_val_ground_truth.npz", "predictions.npz"):
        with np.load(folder / file) as loaded:
            arrays.update({name: loaded[name] for name in loaded.files})
    return arrays


def _mpii_arguments(mpii: dict[str, np.ndarray], model: str) -> tuple[np.ndarray, ...]:
    return mpii[model], mpii["joints"], mpii["visible"], mpii["headboxes"]


@pytest.mark.parametrize("model", ["hourglass_s2", "tompson"])
def test_pckh_is_the_published_one(mpii: dict[str, np.ndarray], model: str) -> None:
    expected = json.loads((SHARED / "reference/mpii_eval/expected.json").read_text())[model]
    result = mpii_pckh(*_mpii_arguments(mpii, model))
    assert set(result) == set(expected)
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=5e-3), name


def test_the_skeleton_file_has_mpii_order(mpii: dict[str, np.ndarray]) -> None:
    short = {"right_ankle": "rank", "pelvis": "pelv", "head_top": "head", "left_wrist": "lwri"}
    skeleton = load_skeleton("mpii16")
    for name, expected in short.items():
        assert mpii["joint_names"][skeleton.keypoints.index(name)] == expected


def test_legacy_threshold_is_0_11(mpii: dict[str, np.ndarray]) -> None:
    arguments = _mpii_arguments(mpii, "hourglass_s2")
    result = mpii_pckh(*arguments, legacy=True)
    predictions, joints, visible, headboxes = arguments
    sizes = 0.6 * np.hypot(*(headboxes[:, 1] - headboxes[:, 0]).T)
    near = np.hypot(*(predictions - joints).transpose(2, 0, 1)) <= 0.11 * sizes[:, None]
    rest = np.delete(np.arange(16), [6, 7])
    assert result["Mean@0.1 legacy"] == pytest.approx(
        100 * near[:, rest][visible[:, rest]].mean(), abs=1e-9
    )
    assert result["Mean@0.1 legacy"] > result["Mean@0.1"] + 1


def test_pckh_refuses_what_does_not_fit(mpii: dict[str, np.ndarray]) -> None:
    predictions, joints, visible, headboxes = _mpii_arguments(mpii, "tompson")
    with pytest.raises(PosefabricError, match="headboxes"):
        mpii_pckh(predictions, joints, visible, headboxes[:5])
    with pytest.raises(PosefabricError, match=r"predictions: expected shape"):
        mpii_pckh(predictions[:, :14], joints, visible, headboxes)
    flat = headboxes.copy()
    flat[3, 1] = flat[3, 0]
    with pytest.raises(PosefabricError, match="row 3"):
        mpii_pckh(predictions, joints, visible, flat)


def _people(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth twice, with a torso of exactly 100 px, everything annotated."""
    joints = np.random.default_rng(0).uniform(0, 200, (count, 14, 2))
    joints[:, LSP.keypoints.index("left_shoulder")] = (0, 0)
    joints[:, LSP.keypoints.index("right_hip")] = (60, 80)
    return joints.copy(), joints, np.full((count, 14), 2, np.uint8)


def test_torso_threshold_counts_the_border() -> None:
    predictions, joints, visible = _people(1)
    wrist, knee = LSP.keypoints.index("left_wrist"), LSP.keypoints.index("left_knee")
    joints[0, wrist] = (100, 100)
    predictions[0, wrist] = (120, 100)
    predictions[0, knee] = joints[0, knee] + (20.001, 0)
    result = pck_torso(predictions, joints, visible, LSP)
    assert result["per_joint"]["left_wrist"] == {"value": 1.0, "count": 1}
    assert result["per_joint"]["left_knee"] == {"value": 0.0, "count": 1}
    assert result["PCK"] == 13 / 14
    assert result["limbs"] == 11 / 12
    assert result["limb_joints"] == 12
    assert "left_shoulder to right_hip" in result["normaliser"]


def test_micro_mean_and_persons_without_torso() -> None:
    predictions, joints, visible = _people(4)
    ankle = LSP.keypoints.index("right_ankle")
    visible[0, LSP.keypoints.index("right_hip")] = 0  # left out: everything of it is unseen
    predictions[0] += 1000
    visible[1, 4:8] = 0  # four joints of person 1 do not count
    predictions[1, 4:8] += 1000
    predictions[2, ankle] += 1000
    joints[3, LSP.keypoints.index("right_hip")] = 0  # torso without length: left out too
    result = pck_torso(predictions, joints, visible, LSP)
    assert (result["persons"], result["left_out"], result["joints"]) == (2, 2, 24)
    assert result["PCK"] == 23 / 24
    assert result["per_joint"]["right_ankle"] == {"value": 0.5, "count": 2}


def test_lsp_s_protocol_on_lspet(shared: Path) -> None:
    """PCK@0.2, micro mean; the persons without an annotated torso are left out, and said."""
    folder = shared / "data" / "lspet"
    dataset = read_coco(folder / "annotations" / "val.json", folder / "val", LSP)
    truth = np.stack([person.keypoints for person in dataset.persons])
    visible = np.stack([person.visibility for person in dataset.persons])
    torso = np.linalg.norm(truth[:, 9] - truth[:, 2], axis=-1)
    seen = (visible[:, 9] > 0) & (visible[:, 2] > 0)
    assert seen.sum() == 704
    predictions = truth + (0.21 * torso[:, None] * (np.arange(14) == 0))[..., None] * [1.0, 0.0]
    found = Predictions(predictions, np.ones(truth.shape[:2]), np.arange(len(truth)))
    result = evaluate_predictions(dataset, found)
    pck = result["pck"]
    assert (pck["persons"], pck["left_out"], pck["threshold"]) == (704, 293, 0.2)
    counted = visible[seen] > 0
    assert pck["PCK"] == pytest.approx(counted[:, 1:].sum() / counted.sum())
    assert pck["per_joint"]["right_ankle"]["value"] == 0
    console = Console(width=120, file=StringIO())
    console.print(table(result))
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "293 persons left out" in said


def test_subset_and_parts() -> None:
    predictions, joints, visible = _people(3)
    predictions[:, :3] += 1000
    parts = {"leg": (0, 1, 2, 3), "arm": (9, 10, 11)}
    result = pck_torso(predictions, joints, visible, LSP, subset=(2, 3), parts=parts)
    assert result["PCK"] == 0.5
    assert result["joints"] == 6
    assert result["per_part"] == {
        "leg": {"value": 0.25, "count": 12},
        "arm": {"value": 1.0, "count": 9},
    }
    with pytest.raises(PosefabricError, match="keypoint 14"):
        pck_torso(predictions, joints, visible, LSP, parts={"leg": (14,)})


def test_not_a_number_is_a_miss() -> None:
    predictions, joints, visible = _people(2)
    predictions[0] = np.nan
    result = pck_torso(predictions, joints, visible, LSP)
    assert result["PCK"] == 0.5
    json.dumps(result, allow_nan=False)


def test_nothing_annotated_gives_none() -> None:
    predictions, joints, visible = _people(2)
    result = pck_torso(predictions, joints, np.zeros_like(visible), LSP)
    assert result["PCK"] is None
    assert result["left_out"] == 2
    json.dumps(result, allow_nan=False)


def test_box_for_skeletons_without_torso() -> None:
    animal = dataclasses.replace(LSP, name="animal", torso=None)
    predictions, joints, visible = _people(2)
    boxes = np.array([[0, 0, 100, 50], [0, 0, 40, 80]], np.float32)
    predictions[:, 0] = joints[:, 0] + (4.5, 0)
    result = pck(predictions, joints, visible, animal, boxes_xywh=boxes)
    assert result["per_joint"]["right_ankle"]["value"] == 0.5  # 5 px and 4 px
    assert "box" in result["normaliser"]
    assert result == pck_box(predictions, joints, visible, boxes, animal, 0.05)
    with pytest.raises(PosefabricError, match="no torso"):
        pck_torso(predictions, joints, visible, animal)
    with pytest.raises(PosefabricError, match="boxes_xywh"):
        pck(predictions, joints, visible, animal)


def test_dispatch_takes_the_torso_when_there_is_one() -> None:
    predictions, joints, visible = _people(2)
    predictions[:, 0] += 15
    boxes = np.full((2, 4), 100.0)
    assert pck(predictions, joints, visible, LSP, boxes_xywh=boxes) == pck_torso(
        predictions, joints, visible, LSP
    )
    by_box = pck(predictions, joints, visible, LSP, boxes_xywh=boxes, normaliser="box")
    assert by_box["PCK"] == 13 / 14
