"""Picture files to COCO results and overlays: what is found, matched, skipped and written."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_network import FOUR, blobs

from posefabric.deploy.box_file import read_boxes
from posefabric.deploy.persons import PosePrediction
from posefabric.deploy.prediction_files import collect_pictures, predict_files
from posefabric.structures import DataError


class Corners:
    """Predicts the corners of every box, with scores 0.9, 0.5, 0.1 and 0.3."""

    source = "corners of boxes"
    skeleton = FOUR
    batch_size = 3

    def __init__(self) -> None:
        self.calls: list[int] = []

    def predict(self, images, boxes=None, flip=False) -> list[PosePrediction]:
        self.calls.append(len(images))
        return [self._one(image, own) for image, own in zip(images, boxes, strict=True)]

    def _one(self, image: np.ndarray, boxes: np.ndarray | None) -> PosePrediction:
        if image.shape[0] == 13:
            raise DataError("picture 0: unlucky")
        if boxes is None:
            boxes = np.array([[0, 0, image.shape[1], image.shape[0]]], dtype=np.float32)
        x, y, w, h = boxes.T
        corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
        keypoints = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
        scores = np.tile(np.array([0.9, 0.5, 0.1, 0.3], np.float32), (len(boxes), 1))
        return PosePrediction(keypoints.astype(np.float32), scores, boxes)


def write(path: Path, height: int = 40, width: int = 50, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), blobs(seed, height, width)[..., ::-1])
    return path


def read_results(folder: Path) -> list[dict]:
    return json.loads((folder / "predictions.json").read_text())


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_files_folders_and_patterns_are_collected(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.webp", "d.bmp", "deep/e.jpeg", "odd[1].png"):
        write(tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert names(collect_pictures(tmp_path)) == ["a.png", "b.JPG", "c.webp", "d.bmp", "odd[1].png"]
    assert names(collect_pictures(str(tmp_path / "**" / "*"))) == [
        *("a.png", "b.JPG", "c.webp", "d.bmp", "e.jpeg", "odd[1].png")
    ]
    assert names(collect_pictures([tmp_path / "c.webp", tmp_path / "*.png", tmp_path])) == [
        *("c.webp", "a.png", "odd[1].png", "b.JPG", "d.bmp")
    ]
    assert names(collect_pictures(tmp_path / "odd[1].png")) == ["odd[1].png"]


def test_what_matches_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "sub" / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    for entry, message in [
        (tmp_path / "nowhere", "nowhere: no such file or folder"),
        (tmp_path / "*.jpg", r"\*\.jpg: the pattern matches nothing \(jpg, "),
        (tmp_path / "*.txt", r"\*\.txt: the pattern matches 1 entries, none a picture"),
        (tmp_path, r"no picture .*its subfolders have some: use '.*/\*\*/\*'"),
        ([], "no input"),
    ]:
        with pytest.raises(DataError, match=message):
            collect_pictures(entry)
    with pytest.raises(DataError, match="no such file"):
        predict_files(Corners(), [tmp_path / "sub", tmp_path / "gone.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_pictures_are_said_to_be_whole(tmp_path: Path) -> None:
    for number in (785, 12):
        write(tmp_path / "in" / f"{number:012d}.jpg")
    summary = predict_files(Corners(), tmp_path / "in", tmp_path / "out")
    assert summary["pictures"] == summary["persons"] == summary["whole_pictures"] == 2
    assert summary["boxes"] == "none given: every picture as a whole is one box"
    assert summary["image_ids"] == "the numbers in the file names"
    assert summary["source"] == "corners of boxes"
    first, second = read_results(tmp_path / "out")
    assert (first["image_id"], second["image_id"]) == (12, 785)
    assert first["file_name"] == "000000000012.jpg" and first["category_id"] == 1
    assert first["bbox"] == [0, 0, 50, 40] and first["box_source"] == "whole picture"
    assert first["keypoints"] == [0, 0, 0.9, 50, 0, 0.5, 50, 40, 0.1, 0, 40, 0.3]
    # The mean of the scores above 0.2, times 1 for the box.
    assert first["score"] == pytest.approx((0.9 + 0.5 + 0.3) / 3)


def test_names_without_numbers_get_running_ones(tmp_path: Path) -> None:
    for name in ("7.png", "b.png"):
        write(tmp_path / "in" / name)
    summary = predict_files(Corners(), tmp_path / "in", tmp_path / "out", overlays=False)
    assert [entry["image_id"] for entry in read_results(tmp_path / "out")] == [1, 2]
    assert summary["image_ids"] == "running numbers"
    assert summary["overlays"] == 0 and not (tmp_path / "out" / "overlays").exists()


def test_bad_pictures_are_counted_and_the_rest_is_done(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "in"
    for number in range(7):
        write(folder / f"{number}.jpg", height=13 if number == 4 else 40)
    whole = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "6.jpg").write_bytes(b"")
    steps: list[tuple[int, int]] = []
    summary = predict_files(
        Corners(),
        folder,
        tmp_path / "out",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert summary["pictures"] == 4
    reasons = {Path(path).name: reason for path, reason in summary["unreadable"].items()}
    assert set(reasons) == {"1.jpg", "4.jpg", "6.jpg"}
    assert "truncated" in reasons["1.jpg"] and "unlucky" in reasons["4.jpg"]
    assert len(caplog.records) == 3
    assert [entry["image_id"] for entry in read_results(tmp_path / "out")] == [0, 2, 3, 5]
    assert steps == [(number, 7) for number in range(1, 8)]


def test_finished_pictures_survive_the_end_of_a_run(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "in" / f"{number}.jpg")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(Corners(), tmp_path / "in", tmp_path / "out", progress=stop)
    assert [entry["image_id"] for entry in read_results(tmp_path / "out")] == [0, 1, 2]


def test_pictures_of_one_batch_are_predicted_together(tmp_path: Path) -> None:
    for number in range(7):
        write(tmp_path / "in" / f"{number}.jpg")
    estimator = Corners()
    predict_files(estimator, tmp_path / "in", tmp_path / "out", overlays=False)
    assert estimator.calls == [3, 3, 1]


def test_overlays_show_the_pose_and_keep_apart(tmp_path: Path) -> None:
    for number, folder in enumerate(("one", "two")):
        write(tmp_path / folder / "a.png", seed=number)
    write(tmp_path / "one" / "A.jpg")
    inputs = [tmp_path / "one" / "a.png", tmp_path / "two", tmp_path / "one" / "A.jpg"]
    summary = predict_files(Corners(), inputs, tmp_path / "out", threshold=0.2)
    made = sorted(path.name for path in (tmp_path / "out" / "overlays").iterdir())
    assert made == ["a.png", "one-A.png", "two-a.png"] and summary["overlays"] == 3
    before = cv2.imread(str(tmp_path / "two" / "a.png")).astype(int)
    after = cv2.imread(str(tmp_path / "out" / "overlays" / "two-a.png")).astype(int)
    changed = np.abs(before - after).max(axis=-1) > 20
    assert changed[0, 5:45].mean() > 0.8  # the limb along the top
    assert not changed[15:25, 15:35].any()
    assert not changed[15:25, :3].any()  # no limb there, and no box about a whole picture


def test_boxes_come_from_annotations_by_file_name(tmp_path: Path) -> None:
    for name in ("x.png", "y.png", "z.png"):
        write(tmp_path / "in" / name)
    tree = {
        "images": [{"id": 40, "file_name": "in/x.png"}, {"id": 41, "file_name": "in/y.png"}],
        "annotations": [
            {"id": 1, "image_id": 40, "category_id": 7, "bbox": [1, 2, 10, 20]},
            {"id": 2, "image_id": 40, "category_id": 7, "bbox": [5, 5, 0, 20]},
            {"id": 3, "image_id": 40, "category_id": 7, "bbox": [0, 0, 5, 5], "iscrowd": 1},
            {"id": 4, "image_id": 40, "category_id": 7, "bbox": [3, 4, 30, 30]},
        ],
    }
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(tree))
    summary = predict_files(
        Corners(), tmp_path / "in", tmp_path / "out", boxes_json=file, category_id=7
    )
    results = read_results(tmp_path / "out")
    assert [(entry["image_id"], entry["bbox"]) for entry in results] == [
        (40, [1, 2, 10, 20]),
        (40, [3, 4, 30, 30]),
        (42, [0, 0, 50, 40]),
    ]
    assert [entry["box_source"] for entry in results] == ["file", "file", "whole picture"]
    assert {entry["category_id"] for entry in results} == {7}
    assert summary["boxes_left_out"] == {"with an empty box": 1, "crowd": 1}
    assert (summary["without_persons"], summary["whole_pictures"]) == (1, 1)
    assert summary["boxes"].endswith("1 pictures are not in it and were taken whole")
    assert summary["image_ids"] == f"those of {file}, else running numbers"


def test_boxes_come_from_detections_by_image_id(tmp_path: Path) -> None:
    write(tmp_path / "in" / "000000000785.jpg")
    write(tmp_path / "in" / "000000000786.jpg")
    detections = [
        {"image_id": 785, "category_id": 1, "bbox": [1, 2, 10, 20], "score": 0.5},
        {"image_id": 785, "category_id": 1, "bbox": [1, 2, 10, 21], "score": 0.1},
        {"image_id": 785, "category_id": 18, "bbox": [1, 2, 10, 22], "score": 0.9},
        {"image_id": 786, "category_id": 1, "bbox": [1, 2, "NaN", 22], "score": 0.9},
        {"image_id": 786, "category_id": 1, "bbox": [1, 2, 4, 22], "score": 0.9},
    ]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(detections))
    summary = predict_files(
        Corners(), tmp_path / "in", tmp_path / "out", boxes_json=file, box_score_threshold=0.2
    )
    results = read_results(tmp_path / "out")
    assert [(entry["image_id"], entry["bbox"]) for entry in results] == [
        (785, [1, 2, 10, 20]),
        (786, [1, 2, 4, 22]),
    ]
    assert results[0]["score"] == pytest.approx(0.5 * (0.9 + 0.5 + 0.3) / 3)
    assert summary["boxes_left_out"] == {
        "below the score threshold": 1,
        "of another category": 1,
        "without four finite numbers in bbox": 1,
    }
    assert summary["image_ids"] == f"those of {file}"
    assert summary["whole_pictures"] == 0


def test_the_longest_common_end_of_a_path_decides(tmp_path: Path) -> None:
    entries = [
        {"file_name": f"{folder}/a.png", "bbox": [number, 0, 5, 5]}
        for number, folder in enumerate(("train/one", "val/two", "val/one"))
    ]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(entries))
    boxes = read_boxes(file)
    found = boxes.find(Path("/somewhere/val/one/a.png"))
    assert found is not None and found.boxes == [[2, 0, 5, 5]]
    assert boxes.find(Path("/somewhere/b.png")) is None
    with pytest.raises(DataError, match=r"a\.png is there 3 times, in train/one, val/two"):
        boxes.find(Path("/somewhere/else/a.png"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON at line 1"),
        ("3", "expected COCO detections"),
        ('{"images": []}', "expected COCO detections"),
        ('[{"bbox": [1, 2, 3, 4]}]', "entry 1 reads .*expected bbox and image_id"),
        ('[["x"]]', "entry 1 reads"),
        ('[{"image_id": 1, "bbox": [1, 2, 0, 4]}]', r"no box to use .*1 with an empty box"),
        ("[]", "no box to use among 0"),
        ('{"images": [{}], "annotations": []}', "an entry of `images` has no id"),
        ('[{"image_id": 99, "bbox": [1, 2, 3, 4]}]', r"none of the 1 pictures \(7.png.* 99"),
    ],
)
def test_wrong_box_files_are_said_before_the_run(tmp_path: Path, content, message) -> None:
    write(tmp_path / "7.png")
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(DataError, match=rf"boxes\.json: .*{message}|boxes\.json: {message}"):
        predict_files(Corners(), tmp_path / "7.png", tmp_path / "out", boxes_json=file)
    assert not (tmp_path / "out").exists()


def test_pycocotools_reads_the_results(tmp_path: Path, shared: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    folder = shared / "data" / "coco_sample"
    predict_files(
        PoseOfTruth(folder), folder, tmp_path, boxes_json=folder / "test_coco.json", overlays=False
    )
    truth = coco.COCO(str(folder / "test_coco.json"))
    results = truth.loadRes(str(tmp_path / "predictions.json"))
    measured = evaluation.COCOeval(truth, results, "keypoints")
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    assert measured.stats[0] > 0.99


class PoseOfTruth:
    """Answers with the annotations, told apart by their boxes."""

    source = "annotations"
    batch_size = 2

    def __init__(self, folder: Path) -> None:
        from posefabric.skeletons import load_skeleton

        self.skeleton = load_skeleton("coco17")
        self.poses = {}
        for entry in json.loads((folder / "test_coco.json").read_text())["annotations"]:
            box = np.float32(entry["bbox"])
            pose = np.reshape(entry["keypoints"], (17, 3))
            # A person without any keypoint is ignored only if the prediction is in its box.
            self.poses[tuple(box)] = np.where(pose[:, 2:] > 0, pose[:, :2], box[:2] + box[2:] / 2)

    def predict(self, images, boxes=None, flip=False) -> list[PosePrediction]:
        found = []
        for own in boxes:
            poses = np.array([self.poses[tuple(box)] for box in own], np.float32).reshape(-1, 17, 2)
            scores = np.ones(poses.shape[:2], np.float32)
            found.append(PosePrediction(poses, scores, own))
        return found
