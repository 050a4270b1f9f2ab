import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from posefabric.data.check import check_coco, draw_contact_sheet
from posefabric.data.coco import read_coco
from posefabric.data.crop import CropGeometry
from posefabric.data.sides import check_sides, neighbouring_pairs
from posefabric.skeletons import load_skeleton

SHARED = Path(__file__).resolve().parents[3] / "shared"
COCO, LSP = load_skeleton("coco17"), load_skeleton("lsp14")
FIELDS = ("area", "iscrowd", "num_keypoints")


def standing(generator):
    """(17, 2): a person seen from the front, a little shaken, in a picture of 100 x 120."""
    half = [0, 3, 3, 5, 5, 12, 12, 16, 16, 18, 18, 9, 9, 10, 10, 10, 10]
    down = [15, 13, 13, 14, 14, 30, 30, 45, 45, 58, 58, 60, 60, 80, 80, 100, 100]
    side = np.array([1] + [1, -1] * 8)
    points = np.stack([50 + side * np.array(half), np.array(down, float)], axis=1)
    return points + generator.normal(0, 0.3, points.shape)


def entry(identity, image, keypoints, **changes):
    flat = [v for x, y in keypoints.tolist() for v in (round(x, 2), round(y, 2), 2)]
    return {
        "id": identity, "image_id": image, "category_id": 1, "iscrowd": 0, "area": 3000.0,
        "num_keypoints": 17, "keypoints": flat, "bbox": [25, 5, 50, 105], **changes,
    }  # fmt: skip


@pytest.fixture
def good(tmp_path):
    """A data set of 20 persons in 20 pictures without a mistake."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 21):
        picture = generator.integers(0, 255, (120, 100, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), picture)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 120})
        annotations.append(entry(number, number, standing(generator)))
    category = {"id": 1, "name": "person", "keypoints": list(COCO.keypoints)}
    return {"images": images, "annotations": annotations, "categories": [category]}


def check(tmp_path, tree, **options):
    path = tmp_path / "a.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return check_coco(path, tmp_path, COCO, **options)


def test_a_good_data_set(tmp_path, good):
    seen = []
    report = check(tmp_path, good, progress=lambda *counts: seen.append(counts))
    assert report.ok
    assert report.problems == []
    assert report.counts["persons with keypoints"] == 20
    assert report.counts["pictures read"] == 20
    assert seen[-1] == (20, 20)
    assert report.lines()[-1] == "0 errors, 0 warnings"


def test_everything_is_found_at_once(tmp_path, good):
    images, annotations = good["images"], good["annotations"]
    (tmp_path / "1.jpg").unlink()
    data = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(data[: len(data) // 2])
    images[2]["width"] = 101
    images.append(dict(images[3]))
    annotations[4]["keypoints"] = annotations[4]["keypoints"][:48]
    annotations[5]["keypoints"][0] = 130
    annotations[6]["bbox"] = [100, 5, 20, 20]
    annotations[7]["image_id"] = 999
    annotations[8]["id"] = 10
    annotations[10]["keypoints"][2] = 3
    annotations[11]["keypoints"][:3] = [0, 0, 2]
    annotations[12]["num_keypoints"] = 4
    del annotations[13]["area"]
    annotations[14]["bbox"] = [1, 2, 3]
    annotations[15]["keypoints"] = [0] * 51
    annotations[15]["num_keypoints"] = 0
    report = check(tmp_path, good)
    found = {(p.kind, p.annotation_id or Path(p.file).name) for p in report.problems}
    assert found == {
        ("unreadable picture", "1.jpg"),
        ("unreadable picture", "2.jpg"),
        ("picture size", "3.jpg"),
        ("duplicate image id", "a.json"),
        ("picture listed twice", "4.jpg"),
        ("keypoint count", 5),
        ("keypoint outside the picture", 6),
        ("empty box", 7),
        ("unknown image id", 8),
        ("duplicate annotation id", 10),
        ("keypoint values", 11),
        ("annotated at (0, 0)", 12),
        ("num_keypoints", 13),
        ("missing field", 14),
        ("box", 15),
    }
    assert not report.ok
    assert report.counts["persons without an annotated keypoint"] == 1
    text = "\n".join(report.lines())
    assert "48 numbers in keypoints, expected 51 = 3 x 17" in text
    assert "nose at (130, " in text
    assert text.index("ERROR") < text.index("WARNING")


def test_many_findings_are_shortened(tmp_path, good):
    for annotation in good["annotations"]:
        annotation["num_keypoints"] = 1
    report = check(tmp_path, good, read_pictures=False)
    assert report.ok
    assert "    ... and 17 more" in report.lines(examples=3)
    assert "pictures read" not in report.counts


def test_missing_pictures_are_found_without_decoding(tmp_path, good):
    (tmp_path / "4.jpg").unlink()
    report = check(tmp_path, good, read_pictures=False)
    assert [(p.kind, Path(p.file).name) for p in report.problems] == [
        ("unreadable picture", "4.jpg")
    ]


def test_unusable_files_are_a_report(tmp_path, good):
    report = check(tmp_path, '{"images": [')
    assert [p.kind for p in report.problems] == ["unusable file"]
    good["categories"][0]["keypoints"][0] = "beak"
    report = check(tmp_path, good)
    assert [p.kind for p in report.problems] == ["keypoint names"]
    assert report.counts["persons with keypoints"] == 20
    report = check_coco(tmp_path / "a.json", tmp_path / "none", COCO)
    assert {p.kind for p in report.problems} == {"keypoint names", "missing folder"}


def test_neighbours_come_from_limbs_and_torso():
    def names(skeleton):
        first = [skeleton.keypoints[left].removeprefix("left_") for left, _ in skeleton.flip_pairs]
        return {frozenset((first[a], first[b])) for a, b in neighbouring_pairs(skeleton)}

    body = {("ankle", "knee"), ("knee", "hip"), ("hip", "shoulder"), ("shoulder", "elbow"),
            ("elbow", "wrist")}  # fmt: skip
    assert names(LSP) == {frozenset(pair) for pair in body}
    assert names(load_skeleton("mpii16")) == names(LSP)
    assert names(COCO) == names(LSP) | {frozenset(("eye", "ear")), frozenset(("ear", "shoulder"))}


def exchanged(keypoints, visible, skeleton, share, seed):
    """The same persons, one pair of a share of them exchanged; and who they are."""
    generator = np.random.default_rng(seed)
    keypoints, visible = keypoints.copy(), visible.copy()
    chosen = generator.random(len(keypoints)) < share
    for row in np.flatnonzero(chosen):
        pairs = [list(p) for p in skeleton.flip_pairs if visible[row, list(p)].all()]
        if pairs:
            pair = pairs[generator.integers(len(pairs))]
            keypoints[row, pair] = keypoints[row, pair[::-1]]
    return keypoints, visible, chosen


def test_exchanged_sides_on_made_up_persons():
    generator = np.random.default_rng(0)
    keypoints = np.stack([standing(generator) for _ in range(400)])
    visible = np.ones((400, 17), dtype=bool)
    clean = check_sides(keypoints, visible, COCO)
    assert clean.persons.opposed == 0
    keypoints, visible, chosen = exchanged(keypoints, visible, COCO, 0.1, 1)
    report = check_sides(keypoints, visible, COCO)
    assert report.persons.suspicious
    assert not (report.opposed & ~chosen).any()


def shared_persons(name):
    root = SHARED / "data" / name
    if not root.is_dir():
        pytest.skip(f"needs ../shared/data/{name}")
    if name == "lspet":
        files = [(LSP, f"annotations/{s}.json", s) for s in ("train", "val")]
    else:
        files = [(COCO, f"annotations/person_keypoints_{s}2017.json", f"{s}2017")
                 for s in ("train", "val")]  # fmt: skip
    persons = [p for s, a, i in files for p in read_coco(root / a, root / i, s).persons]
    return (
        np.stack([p.keypoints for p in persons]),
        np.stack([p.visibility > 0 for p in persons]),
        files[0][0],
    )


@pytest.mark.parametrize("name", ["lspet", "coco_mini"])
def test_real_data_are_not_suspected(name):
    report = check_sides(*shared_persons(name))
    assert not report.persons.suspicious
    assert not any(rate.suspicious for rate in report.couples)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_real_data_with_every_tenth_person_exchanged_are(seed):
    keypoints, visible, skeleton = shared_persons("lspet")
    report = check_sides(*exchanged(keypoints, visible, skeleton, 0.1, seed)[:2], skeleton)
    assert report.persons.suspicious
    few = slice(0, 800)
    report = check_sides(
        *exchanged(keypoints[few], visible[few], skeleton, 0.1, seed)[:2], skeleton
    )
    assert report.persons.suspicious


def test_a_pair_named_the_wrong_way_round_is_named(tmp_path, good):
    for annotation in good["annotations"]:
        values = np.asarray(annotation["keypoints"]).reshape(17, 3)
        values[[9, 10]] = values[[10, 9]]
        annotation["keypoints"] = values.ravel().tolist()
    report = check(tmp_path, good)
    assert report.ok
    texts = [p.text for p in report.problems if p.kind == "left and right exchanged"]
    assert any("left_elbow/right_elbow and left_wrist/right_wrist" in text for text in texts)
    assert not any("hip" in text for text in texts)
    assert report.suspects == list(range(1, 21))
    assert "look at annotations 1, 2, 3" in texts[0]


def test_contact_sheet(tmp_path, good):
    (tmp_path / "a.json").write_text(json.dumps(good))
    dataset = read_coco(tmp_path / "a.json", tmp_path, COCO)
    geometry = CropGeometry(input_wh=(96, 128), preset="hrnet", margin=1.25)
    first = draw_contact_sheet(dataset, geometry, tmp_path / "new/sheet.png", count=6, seed=3)
    again = draw_contact_sheet(dataset, geometry, tmp_path / "again.png", count=6, seed=3)
    other = draw_contact_sheet(dataset, geometry, tmp_path / "other.png", count=6, seed=4)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    # Of persons facing us, the left side (orange) is to the right of the right side (blue).
    sheet = cv2.imread(str(draw_contact_sheet(dataset, geometry, tmp_path / "one.png", count=1)))
    orange = np.argwhere((sheet == (0, 140, 255)).all(axis=2))
    blue = np.argwhere((sheet == (255, 160, 0)).all(axis=2))
    whole = sheet.shape[1] - 6 - geometry.crop_wh[0]
    for part in (lambda x: x < whole, lambda x: x >= whole):
        left, right = (spots[part(spots[:, 1]), 1] for spots in (orange, blue))
        assert len(left) > 20
        assert left.min() > right.max()


def test_contact_sheet_survives_bad_pictures(tmp_path, good):
    (tmp_path / "a.json").write_text(json.dumps(good))
    dataset = read_coco(tmp_path / "a.json", tmp_path, COCO)
    for number in range(1, 21):
        (tmp_path / f"{number}.jpg").unlink()
    geometry = CropGeometry(input_wh=(96, 128), preset="hrnet")
    sheet = draw_contact_sheet(dataset, geometry, tmp_path / "sheet.png", count=100)
    assert cv2.imread(str(sheet)) is not None
