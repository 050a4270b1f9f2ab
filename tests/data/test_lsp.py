import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from posefabric import cli
from posefabric.data.coco import read_coco
from posefabric.data.image import read_image
from posefabric.data.lsp import convert_lsp, crop_of_person, ids_by_split, read_ids, shipped_ids
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared"
LSPET = SHARED / "data/lspet"


def joints_in(low, high):
    """(14, 2): the corners of an upright box and points inside it."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    share = np.random.default_rng(1).random((14, 2))
    share[:2] = [[0, 0], [1, 1]]
    return low + share * (high - low)


@pytest.fixture
def public(tmp_path):
    """Four pictures of 300 x 240 with a coordinate ramp, and their joints (4, 14, 3)."""
    folder = tmp_path / "public"
    (folder / "images").mkdir(parents=True)
    ramp = np.zeros((240, 300, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(300)[None] * 0.8
    ramp[..., 1] = np.arange(240)[:, None]
    joints = np.zeros((4, 14, 3))
    joints[0, :, :2] = joints_in((100.5, 80.25), (150.5, 140.25))
    joints[1, :, :2] = joints_in((4, 20), (204, 220))  # reaches over the border
    joints[2, :, :2] = joints_in((140, 120), (150, 130))  # smaller than 40 px
    joints[3, :, :2] = joints_in((100, 100), (180, 200))
    return folder, ramp, joints


def write(folder, ramp, joints, flags, layout):
    array = np.concatenate([joints[..., :2], flags[..., None]], axis=2)
    digits = 5 if layout == "lspet" else 4
    axes = (1, 2, 0) if layout == "lspet" else (2, 1, 0)
    savemat(str(folder / "joints.mat"), {"joints": array.transpose(axes)})
    for number in range(1, len(joints) + 1):
        cv2.imwrite(str(folder / "images" / f"im{number:0{digits}d}.jpg"), ramp[..., ::-1])


def test_extended(tmp_path, public):
    folder, ramp, joints = public
    flags = np.ones((4, 14))
    flags[0, 5] = 0
    joints[0, 6, :2] = [-3, 90]  # annotated outside the picture: does not count
    flags[3, 5:] = 0  # five joints left
    write(folder, ramp, joints, flags, "lspet")
    seen = []
    counts = convert_lsp(
        folder, tmp_path / "out", ids={"train": [1, 3], "val": [2, 4]},
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert counts == {
        "train": {"persons": 2, "fewer than 6 joints": 0},
        "val": {"persons": 1, "fewer than 6 joints": 1},
    }
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    skeleton = load_skeleton("lsp14")
    out = tmp_path / "out"
    train = read_coco(out / "annotations/train.json", out / "train", skeleton)
    assert [(p.image_id, Path(p.file).name) for p in train.persons] == [
        (1, "im00001.jpg"), (3, "im00003.jpg"),
    ]  # fmt: skip
    first = train[0]
    assert first.person.visibility.tolist() == [2] * 5 + [0, 0] + [2] * 7
    # By hand: extent (100.5, 80.25)-(150.5, 140.25), centre (125.5, 110.25), half side 51.
    assert first.image.shape[:2] == (int(np.ceil(161.25)) - 59, int(np.ceil(176.5)) - 74)
    place = joints[0, 0, :2] - [74, 59]
    assert np.allclose(first.person.keypoints[0], place, atol=0.006)
    tree = json.loads((out / "annotations/train.json").read_text())
    assert np.allclose(tree["annotations"][0]["bbox"], [19.5, 13.25, 64, 76], atol=0.006)
    # The ramp tells where the crop was taken: red is 0.8 x, green is y.
    x, y = (round(float(v)) for v in place)
    pixel = first.image[y, x].astype(float)
    assert np.allclose(pixel[:2], [0.8 * 100.5, 80.25], atol=4)
    small = train[1]
    assert small.image.shape[:2] == (68, 68)
    val = read_coco(out / "annotations/val.json", out / "val", skeleton)
    assert val[0].image.shape[:2] == (240, 274)  # x -66..274 and y -50..290, inside the picture


def test_original_marks_occluded(tmp_path, public):
    folder, ramp, joints = public
    flags = np.zeros((4, 14))
    flags[3, 2] = 1
    write(folder, ramp, joints, flags, "lsp")
    convert_lsp(folder, tmp_path / "out", ids={"all": [1, 4]})
    out = tmp_path / "out"
    dataset = read_coco(out / "annotations/all.json", out / "all", load_skeleton("lsp14"))
    assert Path(dataset.persons[1].file).name == "im0004.jpg"
    assert dataset.persons[0].visibility.tolist() == [2] * 14
    assert dataset.persons[1].visibility.tolist() == [2, 2, 1] + [2] * 11


def test_mistakes_are_named(tmp_path, public):
    folder, ramp, joints = public
    with pytest.raises(DataError, match=r"joints\.mat: no such file"):
        convert_lsp(folder, tmp_path / "out")
    savemat(str(folder / "joints.mat"), {"joints": np.zeros((2, 3, 4))})
    with pytest.raises(DataError, match=r"expected `joints` of shape.*got \(2, 3, 4\)"):
        convert_lsp(folder, tmp_path / "out")
    write(folder, ramp, joints, np.ones((4, 14)), "lspet")
    with pytest.raises(DataError, match="picture 51 is not in the set, which has 1 to 4"):
        convert_lsp(folder, tmp_path / "out")
    (folder / "images/im00002.jpg").unlink()
    with pytest.raises(DataError, match=r"im00002\.jpg: no such picture \(split a\)"):
        convert_lsp(folder, tmp_path / "out", ids={"a": [1, 2]})
    assert not (tmp_path / "out").exists()


def test_id_lists(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("# header\n3-5\n\n9  # one\n")
    assert read_ids(path) == [3, 4, 5, 9]
    path.write_text("1\n2 to 4\n")
    with pytest.raises(DataError, match="line 2 reads '2 to 4'"):
        read_ids(path)
    ids = shipped_ids()
    assert {split: len(numbers) for split, numbers in ids.items()} == {
        "train": 7194, "val": 997, "test": 800,
    }  # fmt: skip
    together = [number for numbers in ids.values() for number in numbers]
    assert len(set(together)) == len(together)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_shipped_ids_are_the_shared_splits(split):
    if not LSPET.is_dir():
        pytest.skip("needs ../shared/data/lspet")
    tree = json.loads((LSPET / f"annotations/{split}.json").read_text())
    assert shipped_ids()[split] == sorted(entry["id"] for entry in tree["images"])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_converting_the_shared_crops_again_finds_their_boxes(split):
    """The rules, applied to the published crops' own joints, give the published geometry."""
    if not LSPET.is_dir():
        pytest.skip("needs ../shared/data/lspet")
    tree = json.loads((LSPET / f"annotations/{split}.json").read_text())
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in tree["images"]}
    moved = 0
    for entry in tree["annotations"]:
        values = np.asarray(entry["keypoints"], dtype=float).reshape(14, 3)
        width, height = sizes[entry["image_id"]]
        person = crop_of_person(
            np.empty((height, width, 3), np.uint8), values[:, :2], values[:, 2].astype(np.uint8)
        )
        assert person is not None
        crop, keypoints, visibility, box = person
        assert visibility.tolist() == values[:, 2].tolist()
        # Half a hundredth of rounding on each end of the extent, and on the box.
        box[:2] += values[visibility > 0][0, :2] - keypoints[visibility > 0][0]
        assert np.abs(box - entry["bbox"]).max() < 0.021
        # The crop is already cut: the same rule must leave it as it is, but where the joints'
        # rounding moves an edge of the square over a whole pixel.
        lost = width - crop.shape[1], height - crop.shape[0]
        assert max(lost) <= 2
        moved += lost != (0, 0)
    assert moved < 0.03 * len(tree["annotations"])


def test_shared_pictures_have_the_stated_sizes():
    if not LSPET.is_dir():
        pytest.skip("needs ../shared/data/lspet")
    dataset = read_coco(LSPET / "annotations/val.json", LSPET / "val", load_skeleton("lsp14"))
    tree = json.loads((LSPET / "annotations/val.json").read_text())
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in tree["images"]}
    for person in dataset.persons[::100]:
        assert read_image(person.file).shape[:2] == sizes[person.image_id]


def test_the_command_takes_a_list_and_says_what_it_wrote(tmp_path, public, capsys):
    folder, ramp, joints = public
    write(folder, ramp, joints, np.ones((4, 14)), "lspet")
    lists = tmp_path / "my_val.txt"
    lists.write_text("# two persons\n1-2\n")
    cli.data_app(["convert", "lsp", str(folder), "--ids", str(lists)], result_action="return_value")
    said = capsys.readouterr().out
    assert "val: persons 2" in said
    dataset = read_coco(
        folder / "coco" / "annotations" / "val.json",
        folder / "coco" / "val",
        load_skeleton("lsp14"),
    )
    assert [person.image_id for person in dataset.persons] == [1, 2]
    with pytest.raises(DataError, match=r"expected a \.txt list"):
        ids_by_split(tmp_path / "nowhere.txt")
