import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from posefabric.data.coco import clip_box, read_coco
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared"
COCO = load_skeleton("coco17")


def person(identity, image=1, **changes):
    keypoints = [v for k in range(17) for v in (10 + k, 20 + k, 2)]
    entry = {
        "id": identity, "image_id": image, "category_id": 1, "iscrowd": 0, "num_keypoints": 17,
        "keypoints": keypoints, "bbox": [5, 6, 30, 40], "area": 700.5,
    }  # fmt: skip
    return {**entry, **changes}


def tree(*annotations, **changes):
    images = [
        {"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 80}
        for number in (7, 1, 3)
    ]
    category = {"id": 1, "name": "person", "keypoints": list(COCO.keypoints)}
    return {"images": images, "annotations": list(annotations), "categories": [category], **changes}


def read(tmp_path, content, skeleton=COCO, **options):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(path, tmp_path, skeleton, **options)


def test_a_person(tmp_path):
    dataset = read(tmp_path, tree(person(12)))
    assert (dataset.name, dataset.box_source, len(dataset)) == ("a", "ground truth", 1)
    assert dataset.annotations_path == str(tmp_path / "a.json")
    found = dataset.persons[0]
    assert (found.image_id, found.annotation_id, found.area) == (1, 12, 700.5)
    assert found.file == str(tmp_path / "1.jpg")
    assert found.keypoints.dtype == np.float32
    assert found.visibility.dtype == np.uint8
    assert found.keypoints[3].tolist() == [13, 23]
    assert found.box_xywh.tolist() == [5, 6, 29, 39]
    pickle.loads(pickle.dumps(dataset.read_image))
    with pytest.raises(DataError, match=r"1\.jpg: no such picture"):
        dataset[0]


def test_order_is_pictures_then_ids(tmp_path):
    dataset = read(tmp_path, tree(person(5, 3), person(9, 1), person(2, 3), person(1, 7)))
    assert [p.annotation_id for p in dataset.persons] == [1, 9, 2, 5]


def test_boxes_are_clipped_as_hrnet_does():
    # By hand: x2 = min(W - 1, x1 + w - 1), so the second box ends at 63 and the third is empty.
    boxes = np.array([[5, 6, 30, 40], [-4, 70, 100, 30], [64, 0, 5, 5]], dtype=float)
    clipped = clip_box(boxes, np.array([[64, 80]] * 3))
    assert clipped[:2].tolist() == [[5, 6, 29, 39], [0, 70, 63, 9]]
    assert clipped[2, 2] <= 0


def test_who_is_left_out_is_counted(tmp_path):
    dataset = read(
        tmp_path,
        tree(
            person(1),
            person(2, iscrowd=1, keypoints=[], segmentation={"counts": [1]}),
            person(3, keypoints=[0] * 51, num_keypoints=0),
            person(4, bbox=[70, 10, 20, 20]),
            person(5, bbox=[10, 10, 0, 20]),
            person(6, category_id=18),
        ),
    )
    assert [p.annotation_id for p in dataset.persons] == [1]
    assert dataset.skipped == {
        "crowd": 1,
        "without an annotated keypoint": 1,
        "with an empty box": 2,
        "of another category": 1,
    }


def test_area_falls_back_to_the_box(tmp_path):
    entry = person(1)
    del entry["area"]
    assert read(tmp_path, tree(entry)).persons[0].area == 30 * 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tree(person(12, keypoints=[1, 1, 2] * 16)),
         "annotation 12: 48 numbers in keypoints, expected 51 = 3 x 17.*coco17.*data.skeleton="),
        (tree(person(12, image=99)), "annotation 12 belongs to image 99"),
        (tree(), "`annotations` is empty"),
        (tree(person(1), person(1)), "annotation 1 is there twice"),
        (tree(person(1, bbox=[1, 2, 3])), r"annotation 1 has the bbox \[1, 2, 3\]"),
        (tree(person(1, bbox=[1, 2, None, 3])), "bbox of annotation 1 in image 1"),
        (tree(person(1), person(8, bbox=[1, 2, float("nan"), 3])), "bbox of annotation 8"),
        (tree(person(1, keypoints=[1, 1, 3] * 17)), "annotation 1 has the visibilities"),
        (tree(person(1, keypoints=["a"] * 51)), "keypoints of annotation 1"),
        (tree({k: v for k, v in person(1).items() if k != "keypoints"}), "instances file"),
        (tree(person(1, iscrowd=1)), "no person to use; left out: 1 crowd"),
        (tree(person(1), images=[{"id": 1, "file_name": "1.jpg"}]), "image 1 has no 'width'"),
        (tree(person(1), images=tree()["images"] * 2), "image id 7 is there twice"),
        ({"images": [{}]}, "list `annotations`"),
        ([1], "expected COCO annotations"),
        ('{"images": [\n1, ]}', r"a\.json: not valid JSON at line 2, column"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_names_must_be_the_skeletons(tmp_path):
    with pytest.raises(DataError) as raised:
        read(tmp_path, tree(person(1)), load_skeleton("lsp14"))
    text = str(raised.value)
    assert "nose, left_eye" in text
    assert "neck, head_top" in text
    assert text.endswith("data.skeleton=coco17")
    swapped = [COCO.keypoints[1], COCO.keypoints[0], *COCO.keypoints[2:]]
    other = tree(person(1), categories=[{"id": 1, "name": "person", "keypoints": swapped}])
    with pytest.raises(DataError, match="the same names in another order"):
        read(tmp_path, other)


def test_names_are_not_needed(tmp_path):
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
    dataset = read(tmp_path, tree(person(1), person(2, category_id=2), categories=categories))
    assert len(dataset) == 1
    assert len(read(tmp_path, tree(person(1), person(2, category_id=2), categories=[]))) == 2


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="no such annotation file"):
        read_coco(tmp_path / "none.json", tmp_path, COCO)
    (tmp_path / "a.json").write_text(json.dumps(tree(person(1))))
    with pytest.raises(DataError, match="no such folder of pictures"):
        read_coco(tmp_path / "a.json", tmp_path / "none", COCO)


def test_detections(tmp_path):
    def found(image, score, box=(1, 2, 100, 4), category=1):
        return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}

    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([
        found(3, 0.9), found(7, 0.5), found(7, 0.1), found(99, 0.9), found(1, 0.9, category=3),
        found(1, 0.9, box=(1, 2, 0, 4)),
    ]))  # fmt: skip
    dataset = read(tmp_path, tree(person(1)), boxes=boxes, box_score_threshold=0.2)
    assert [(p.image_id, p.score) for p in dataset.persons] == [(7, 0.5), (3, 0.9)]
    assert {p.annotation_id for p in dataset.persons} == {-1}
    assert dataset.persons[0].box_xywh.tolist() == [1, 2, 100, 4]
    assert dataset.persons[0].area == 400
    assert not dataset.persons[0].visibility.any()
    assert dataset.box_source == "detections of boxes.json with score >= 0.2"
    assert dataset.skipped == {
        "below the score threshold": 1,
        "in a picture that is not annotated": 1,
        "of another category": 1,
        "with an empty box": 1,
    }
    boxes.write_text(json.dumps([found(3, 0.9), {"image_id": 3, "bbox": [1, 2, 3, 4]}]))
    with pytest.raises(DataError, match=r"boxes\.json: detection 2 reads"):
        read(tmp_path, tree(person(1)), boxes=boxes)


@pytest.mark.parametrize(("split", "count"), [("train2017", 86), ("val2017", 68)])
def test_official_files_as_pycocotools_reads_them(split, count):
    from pycocotools.coco import COCO as Api

    root = SHARED / "data/coco_mini"
    if not root.is_dir():
        pytest.skip("needs ../shared/data/coco_mini")
    path = root / f"annotations/person_keypoints_{split}.json"
    dataset = read_coco(path, root / split, COCO)
    assert len(dataset) == count
    api = Api(str(path))
    usable = [a for a in api.anns.values() if a["num_keypoints"] > 0 and not a["iscrowd"]]
    assert {p.annotation_id for p in dataset.persons} == {a["id"] for a in usable}
    for found in dataset.persons:
        theirs = api.anns[found.annotation_id]
        values = np.concatenate([found.keypoints, found.visibility[:, None]], axis=1)
        assert values.ravel().tolist() == theirs["keypoints"]
        assert found.area == theirs["area"]
        assert np.abs(found.box_xywh - theirs["bbox"])[:2].max() < 1e-3
        assert (np.asarray(theirs["bbox"][2:]) - found.box_xywh[2:]).min() > 0.99
    info = api.imgs[dataset.persons[0].image_id]
    assert dataset[0].image.shape == (info["height"], info["width"], 3)


def test_detector_boxes_of_the_field():
    root = SHARED / "data/coco_sample"
    if not root.is_dir():
        pytest.skip("needs ../shared/data/coco_sample")
    boxes = root / "test_coco_det_AP_H_56.json"
    dataset = read_coco(root / "test_coco.json", root, COCO, boxes=boxes)
    assert len(dataset) == len(json.loads(boxes.read_text())) == 118
