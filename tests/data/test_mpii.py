"""MPII: persons by centre and scale out of both kinds of file, and their head boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mpii_release import JOINTS, write_release
from scipy.io import savemat

from posefabric.config import DataConfig
from posefabric.data.crop import CropGeometry
from posefabric.data.mpii import person_box, read_mpii
from posefabric.data.pipeline import open_dataset
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError, PersonDataset, PosefabricError

MPII = load_skeleton("mpii16")


@pytest.fixture(scope="module")
def truth(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "reference" / "mpii_eval" / "mpii_val_ground_truth.npz") as content:
        return {name: content[name] for name in content}


def sample(shared: Path, **options) -> PersonDataset:
    folder = shared / "data" / "mpii_sample"
    return read_mpii(folder / "test_mpii.json", folder, MPII, split="val", **options)


def official(tmp_path: Path, split: str) -> PersonDataset:
    return read_mpii(write_release(tmp_path), tmp_path / "images", MPII, split=split)  # type: ignore[arg-type]


def test_a_person_is_the_centre_and_the_scale(shared: Path) -> None:
    """CONVENTIONS: y + 15 x scale, size scale x 200 px, x 1.25, centre and joints - 1."""
    dataset = sample(shared)
    entries = json.loads((shared / "data" / "mpii_sample" / "test_mpii.json").read_text())
    assert len(dataset) == len(entries) == 5
    assert dataset.box_source == "centre and scale of the annotation"
    assert dataset.headboxes is None and dataset.ground_truth and not dataset.has_areas
    for person, entry in zip(dataset.persons, entries, strict=True):
        assert person.file.endswith(entry["image"])
        scale, (x, y) = entry["scale"], entry["center"]
        zoom = 256 / (200 * scale * 1.25)
        matrix = CropGeometry((256, 256), "hrnet").image_to_input(person.box_xywh)
        found = matrix[:, :2] @ np.array([x - 1, y + 15 * scale - 1]) + matrix[:, 2]
        np.testing.assert_allclose(found, [128, 128], atol=1e-2)
        np.testing.assert_allclose(matrix[:, :2], np.eye(2) * zoom, rtol=1e-5)
        seen = np.array(entry["joints_vis"]) > 0
        np.testing.assert_allclose(
            person.keypoints[seen], np.array(entry["joints"])[seen] - 1, atol=1e-3
        )
        assert (person.visibility == np.where(seen, 2, 0)).all()
    assert dataset[1].image.ndim == 3


def test_the_box_of_a_small_person_by_hand() -> None:
    assert person_box(np.array([101.0, 51.0]), 0.5).tolist() == [50.0, 7.5, 100.0, 100.0]


def test_head_boxes_are_those_of_the_rows(shared: Path, truth: dict, tmp_path: Path) -> None:
    path = shared / "reference" / "mpii_eval" / "mpii_val_ground_truth.npz"
    dataset = sample(shared, headboxes=path)
    assert dataset.headboxes is not None
    np.testing.assert_allclose(dataset.headboxes, truth["headboxes"][:5] - 1)
    # The HRNet family's gt_valid.mat has the same numbers with the persons last.
    savemat(
        tmp_path / "gt_valid.mat",
        {
            "headboxes_src": np.moveaxis(truth["headboxes"][:7], 0, -1),
            "pos_gt_src": np.moveaxis(truth["joints"][:7], 0, -1),
        },
    )
    again = sample(shared, headboxes=tmp_path / "gt_valid.mat")
    np.testing.assert_allclose(np.asarray(again.headboxes), dataset.headboxes)


def test_head_boxes_of_other_persons_are_refused(shared: Path, truth: dict, tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    np.savez(path, headboxes=truth["headboxes"][1:9], joints=truth["joints"][1:9])
    with pytest.raises(DataError, match=r"heads\.npz: row 1 has other joints than person 1"):
        sample(shared, headboxes=path)
    np.savez(path, headboxes=truth["headboxes"][:3])
    with pytest.raises(DataError, match=r"3 head boxes, but .* has a person 5"):
        sample(shared, headboxes=path)
    np.savez(path, joints=truth["joints"])
    with pytest.raises(DataError, match=r"heads\.npz: expected head boxes"):
        sample(shared, headboxes=path)


def test_the_official_file_s_training_persons(tmp_path: Path) -> None:
    dataset = official(tmp_path, "train")
    first, second = dataset.persons
    assert (Path(first.file).name, first.image_id, first.annotation_id) == ("t1.jpg", 1, 1)
    assert (Path(second.file).name, second.image_id, second.annotation_id) == ("t2.jpg", 3, 1)
    assert dataset.skipped == {"without centre or scale": 1, "without an annotated keypoint": 1}
    assert {k: int(v) for k, v in enumerate(first.visibility) if v} == {0: 2, 7: 2, 15: 1}
    np.testing.assert_allclose(first.keypoints[15], JOINTS[0, 15] - 1, atol=1e-4)
    assert second.visibility.tolist() == [1, 2, 2, 1, 2, 2, 2, 2, 2, 2, 2, 2, 1, 2, 2, 1]
    np.testing.assert_allclose(second.box_xywh, person_box(np.array([53, 60]), 0.7), rtol=1e-6)
    assert dataset.headboxes is not None
    np.testing.assert_allclose(dataset.headboxes, [[[39, 9], [51, 25]]] * 2)


def test_the_official_file_s_single_test_persons(tmp_path: Path) -> None:
    dataset = official(tmp_path, "test")
    found = [(Path(p.file).name, p.image_id, p.annotation_id) for p in dataset.persons]
    assert found == [("e1.jpg", 2, 2), ("e3.jpg", 6, 1), ("e3.jpg", 6, 2)]
    assert not dataset.ground_truth and dataset.headboxes is None
    assert not any(p.visibility.any() for p in dataset.persons)
    with pytest.raises(DataError, match=r"no validation split; give .*valid\.json"):
        official(tmp_path, "val")


def test_a_test_list_has_no_joints(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text('[{"image": "a.jpg", "center": [50, 60], "scale": 0.5}]')
    dataset = read_mpii(path, tmp_path, MPII, split="test")
    assert len(dataset) == 1 and not dataset.ground_truth
    with pytest.raises(DataError, match="no person has a joint; only a test set may be so"):
        read_mpii(path, tmp_path, MPII, split="val")


def test_the_options_reach_it(shared: Path) -> None:
    options = dict(
        format="mpii",
        skeleton="mpii16",
        root=str(shared / "data" / "mpii_sample"),
        val_annotations="test_mpii.json",
        val_images=".",
        headboxes=str(shared / "reference" / "mpii_eval" / "mpii_val_ground_truth.npz"),
    )
    dataset = open_dataset(DataConfig(**options), "val")  # type: ignore[arg-type]
    assert (dataset.name, len(dataset)) == ("mpii_sample val", 5)
    assert dataset.headboxes is not None
    with pytest.raises(PosefabricError, match=r"data\.boxes=b\.json: MPII's persons come with"):
        open_dataset(DataConfig(**options), "val", boxes="b.json")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"choose data\.skeleton=mpii16"):
        open_dataset(DataConfig(**{**options, "skeleton": "lsp14"}), "val")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected MPII as the HRNet family has it"),
        ('[{"image": "a.jpg", "scale": 1}]', r"person 1: .*KeyError: 'center'"),
        (
            '[{"image": "a.jpg", "center": [1, 2], "scale": 1, "joints": [[1, 2]]}]',
            r"person 1: expected image, center .*ValueError",
        ),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "valid.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_mpii(path, tmp_path, MPII, split="val")


def test_other_mat_files_are_refused(tmp_path: Path) -> None:
    savemat(tmp_path / "joints.mat", {"joints": np.zeros((3, 14, 2))})
    with pytest.raises(DataError, match=r"joints\.mat: expected RELEASE with annolist"):
        read_mpii(tmp_path / "joints.mat", tmp_path, MPII, split="train")
    with pytest.raises(DataError, match=r"none\.mat: no such annotation file"):
        read_mpii(tmp_path / "none.mat", tmp_path, MPII, split="train")
