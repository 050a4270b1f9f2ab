"""OKS, NMS and AP against pycocotools, which this project did not write."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posefabric.data.coco import read_coco
from posefabric.evaluate.oks import (
    METRICS,
    coco_results,
    oks_evaluate,
    write_coco_results,
)
from posefabric.evaluate.similarity import crop_area, oks_nms, rescored, similarity
from posefabric.skeletons import Skeleton, load_skeleton
from posefabric.structures import DataError, Person, PersonDataset, PosefabricError, Predictions

COCO_FILES = Path(__file__).resolve().parents[3] / "shared" / "data"
COCO17 = load_skeleton("coco17")


def _dataset(annotations: str, images: str, skeleton: Skeleton, **options: Any) -> PersonDataset:
    path = COCO_FILES / annotations
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/{annotations}")
    return read_coco(path, COCO_FILES / images, skeleton, **options)


@pytest.fixture(scope="module")
def mini() -> PersonDataset:
    return _dataset(
        "coco_mini/annotations/person_keypoints_val2017.json", "coco_mini/val2017", COCO17
    )


@pytest.fixture(scope="module")
def lsp() -> PersonDataset:
    return _dataset("lspet/annotations/val.json", "lspet/val", load_skeleton("lsp14"))


def _noised(dataset: PersonDataset, seed: int = 0, share: float = 0.04) -> Predictions:
    """Ground truth moved by a share of the box, more for some persons; random scores."""
    rng = np.random.default_rng(seed)
    keypoints, scores = [], []
    for person in dataset.persons:
        size = np.sqrt(np.prod(person.box_xywh[2:]))
        sigma = share * size * rng.uniform(0.1, 3)
        truth = np.where(person.visibility[:, None] > 0, person.keypoints, person.box_xywh[:2])
        keypoints.append(truth + rng.normal(0, sigma, truth.shape))
        scores.append(rng.uniform(0, 1, len(truth)))
    return Predictions(
        keypoints=np.asarray(keypoints, np.float32),
        scores=np.asarray(scores, np.float32),
        index=np.arange(len(dataset.persons)),
    )


def _pycocotools(
    annotations: str | Path, results: Path, sigmas: np.ndarray | None = None
) -> tuple[np.ndarray, Any]:
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "keypoints")
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation


def _numbers(result: dict[str, Any]) -> list[float]:
    return [result[name] for name in METRICS]


def test_equal_to_pycocotools_on_noised_ground_truth(mini: PersonDataset, tmp_path: Path) -> None:
    predictions = _noised(mini)
    results = coco_results(mini, predictions, input_wh=(192, 256))
    stats, _ = _pycocotools(
        str(mini.annotations_path), write_coco_results(results, tmp_path / "results.json")
    )
    result = oks_evaluate(mini, predictions, input_wh=(192, 256))
    assert _numbers(result) == stats.tolist()
    assert 0.1 < result["AP"] < 0.9
    assert result["sigmas_source"] == COCO17.sigmas_source
    assert result["box_source"] == "ground truth"
    assert result["filled"] == {}
    json.dumps(result, allow_nan=False)


def test_equal_to_pycocotools_on_detections(tmp_path: Path) -> None:
    dataset = _dataset(
        "coco_sample/test_coco.json",
        "coco_sample",
        COCO17,
        boxes=COCO_FILES / "coco_sample/test_coco_det_AP_H_56.json",
    )
    truth = _dataset("coco_sample/test_coco.json", "coco_sample", COCO17)
    # Each detection predicts the true person nearest to it, so that many repeat one another.
    nearest = []
    for person in dataset.persons:
        centre = person.box_xywh[:2] + person.box_xywh[2:] / 2
        same = [p for p in truth.persons if p.image_id == person.image_id]
        gaps = [np.abs(p.box_xywh[:2] + p.box_xywh[2:] / 2 - centre).sum() for p in same]
        nearest.append(same[int(np.argmin(gaps))])
    guessed = _noised(dataclasses.replace(dataset, persons=nearest), share=0.02)
    results = coco_results(dataset, guessed, input_wh=(192, 256))
    assert 0 < len(results) < len(dataset.persons)
    stats, _ = _pycocotools(
        COCO_FILES / "coco_sample/test_coco.json", write_coco_results(results, tmp_path / "r.json")
    )
    result = oks_evaluate(dataset, guessed, input_wh=(192, 256))
    assert _numbers(result) == stats.tolist()
    assert result["AP"] > 0.1
    assert result["results"] == len(results)
    assert "det_AP_H_56" in result["box_source"]


def test_equal_to_pycocotools_with_other_sigmas(lsp: PersonDataset, tmp_path: Path) -> None:
    subset = dataclasses.replace(lsp, persons=lsp.persons[:300])
    predictions = _noised(subset)
    results = coco_results(subset, predictions)
    assert len(results[0]["keypoints"]) == 42
    tree = json.loads(Path(str(lsp.annotations_path)).read_text())
    images = {person.image_id for person in subset.persons}
    for key, name in (("images", "id"), ("annotations", "image_id")):
        tree[key] = [entry for entry in tree[key] if entry[name] in images]
    (tmp_path / "part.json").write_text(json.dumps(tree))
    stats, _ = _pycocotools(
        tmp_path / "part.json",
        write_coco_results(results, tmp_path / "results.json"),
        lsp.skeleton.sigmas,
    )
    result = oks_evaluate(subset, predictions)
    assert _numbers(result) == stats.tolist()
    assert result["images"] == 300 < result["images_in_file"]
    assert "fallback" in result["sigmas_source"]
    tight = oks_evaluate(subset, predictions, sigmas=lsp.skeleton.sigmas / 2)
    assert tight["AP"] < result["AP"]
    assert tight["sigmas_source"] == "given"


def test_perfect_predictions_have_ap_1_and_missed_images_cost(lsp: PersonDataset) -> None:
    subset = dataclasses.replace(lsp, persons=lsp.persons[:40])
    points = np.stack([person.keypoints for person in subset.persons])
    perfect = Predictions(points, np.ones(points.shape[:2], np.float32), np.arange(40))
    assert oks_evaluate(subset, perfect)["AP"] == pytest.approx(1)
    half = Predictions(points[:20], perfect.scores[:20], np.arange(20))
    assert oks_evaluate(subset, half)["AR"] == 0.5
    everything = [int(person.image_id) for person in lsp.persons]
    assert oks_evaluate(subset, perfect, image_ids=everything)["AR"] == pytest.approx(40 / 997)
    with pytest.raises(DataError, match="not in this file"):
        oks_evaluate(subset, perfect, image_ids=[10**9])


def test_ground_truth_from_memory_is_the_files(mini: PersonDataset, tmp_path: Path) -> None:
    """Without crowds and bare persons in the file, both ground truths must say the same."""
    tree = json.loads(Path(str(mini.annotations_path)).read_text())
    kept = {person.annotation_id for person in mini.persons}
    tree["annotations"] = [entry for entry in tree["annotations"] if entry["id"] in kept]
    (tmp_path / "kept.json").write_text(json.dumps(tree))
    predictions = _noised(mini)
    from_file = dataclasses.replace(mini, annotations_path=str(tmp_path / "kept.json"))
    from_memory = dataclasses.replace(mini, annotations_path=None)
    assert _numbers(oks_evaluate(from_memory, predictions)) == _numbers(
        oks_evaluate(from_file, predictions)
    )
    detections = [dataclasses.replace(person, annotation_id=-1) for person in mini.persons]
    with pytest.raises(DataError, match="needs ground truth"):
        oks_evaluate(dataclasses.replace(from_memory, persons=detections), predictions)


def test_missing_area_and_count_are_filled(lsp: PersonDataset, tmp_path: Path) -> None:
    tree = json.loads(Path(str(lsp.annotations_path)).read_text())
    for entry in tree["annotations"]:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    (tmp_path / "full.json").write_text(json.dumps(tree))
    for entry in tree["annotations"]:
        del entry["area"], entry["num_keypoints"], entry["iscrowd"]
    (tmp_path / "bare.json").write_text(json.dumps(tree))
    predictions = _noised(lsp)
    bare, full = (
        oks_evaluate(dataclasses.replace(lsp, annotations_path=str(tmp_path / name)), predictions)
        for name in ("bare.json", "full.json")
    )
    assert _numbers(bare) == _numbers(full)
    assert bare["filled"] == {"area": 997, "num_keypoints": 997}


def test_similarity_is_pycocotools_oks(mini: PersonDataset, tmp_path: Path) -> None:
    predictions = _noised(mini)
    results = coco_results(mini, predictions, nms_threshold=None)
    assert len(results) == len(mini.persons)
    path = write_coco_results(results, tmp_path / "results.json")
    _, evaluation = _pycocotools(str(mini.annotations_path), path)
    compared = 0
    for (image_id, category_id), expected in evaluation.ious.items():
        if not len(expected):
            continue
        truth = [t for t in evaluation._gts[image_id, category_id]]
        found = sorted(evaluation._dts[image_id, category_id], key=lambda d: -d["score"])
        reference = np.array([t["keypoints"] for t in truth], float).reshape(len(truth), 17, 3)
        guess = np.array([d["keypoints"] for d in found]).reshape(len(found), 17, 3)
        ours = similarity(
            guess[..., :2],
            reference[..., :2],
            np.array([t["area"] for t in truth])[None],
            COCO17.sigmas,
            reference[..., 2],
        )
        seen = (reference[..., 2] > 0).any(axis=1)
        np.testing.assert_allclose(ours[:, seen], np.asarray(expected)[:, seen], atol=1e-12)
        assert not ours[:, ~seen].any()
        compared += ours[:, seen].size
    assert compared > 100


def test_nms_drops_the_worse_double_only() -> None:
    rng = np.random.default_rng(1)
    first, other = rng.uniform(0, 100, (2, 17, 2))
    points = np.stack([first, first + 0.5, other, first])
    scores = np.array([0.5, 0.9, 0.1, 0.9])
    areas = np.full(4, 1e4)
    assert oks_nms(points, scores, areas, COCO17.sigmas).tolist() == [1, 2]
    # A pair just at the threshold stays: only a higher OKS goes.
    level = float(similarity(points[:1], points[1:2], areas[:1, None], COCO17.sigmas)[0, 0])
    assert oks_nms(points[:2], scores[:2], areas[:2], COCO17.sigmas, level).tolist() == [1, 0]
    assert oks_nms(points[:2], scores[:2], areas[:2], COCO17.sigmas, level - 1e-9).tolist() == [1]


def test_nms_area_is_the_mean_of_both() -> None:
    points = np.zeros((2, 17, 2))
    points[1, :, 0] = 10
    sigmas = np.full(17, 0.1)
    areas = np.array([1000.0, 3000.0])
    expected = np.exp(-100 / (2 * 2000 * 0.04))
    for threshold, kept in ((expected - 1e-6, 1), (expected + 1e-6, 2)):
        assert len(oks_nms(points, np.array([1.0, 0.5]), areas, sigmas, threshold)) == kept


def test_crop_area_and_rescoring() -> None:
    box = np.array([5, 5, 30, 120])
    assert crop_area(box, None) == 30 * 120 * 1.5625
    assert crop_area(box, (192, 256)) == 90 * 120 * 1.5625  # widened to 3:4
    assert crop_area(np.array([0, 0, 90, 30]), (192, 256)) == 90 * 120 * 1.5625
    assert rescored(0.5, np.array([0.2, 0.6, 0.8, 0.1])) == pytest.approx(0.35)
    assert rescored(0.5, np.array([0.2, 0.1])) == 0.0
    assert rescored(0.5, np.array([0.2, 0.6, 0.8, 0.1]), 0.7) == pytest.approx(0.4)
    assert rescored(0.5, np.array([0.2, 0.6, 0.8, 0.1]), None) == 0.5


def test_options_of_the_nms_decide_who_stays() -> None:
    """A second person 4 px beside the first: one in a large area, two in a small one."""
    dataset, predictions = _two_people()
    beside = predictions.keypoints[:1] + np.array([4.0, 0.0], np.float32)
    both = np.concatenate([predictions.keypoints[:1], beside])
    doubled = Predictions(both, predictions.scores, predictions.index)
    level = {
        area: float(similarity(both[:1], both[1:], np.array([[area]]), COCO17.sigmas)[0, 0])
        for area in (100.0**2, 125.0**2, 150.0**2)
    }
    small, usual, large = level.values()
    assert small < usual < large

    def count(threshold: float | None, **options: Any) -> int:
        return len(coco_results(dataset, doubled, nms_threshold=threshold, **options))

    assert (count(None), count(usual - 1e-6), count(usual + 1e-6)) == (2, 1, 2)
    assert count((small + usual) / 2) == 1
    assert count((small + usual) / 2, nms_area="box") == 2
    assert count((usual + large) / 2, box_padding=1.5) == 1
    scores = [row["score"] for row in coco_results(dataset, doubled, score_threshold=None)]
    assert scores == [1.0]


def _two_people() -> tuple[PersonDataset, Predictions]:
    points = np.random.default_rng(0).uniform(10, 90, (2, 17, 2)).astype(np.float32)
    persons = [
        Person(
            image_id=7,
            annotation_id=row,
            file="made.jpg",
            box_xywh=np.array([0, 0, 100, 100], np.float32),
            keypoints=points[row],
            visibility=np.full(17, 2, np.uint8),
            area=5000.0,
        )
        for row in range(2)
    ]
    dataset = PersonDataset("made", COCO17, persons, read_image=lambda person: np.zeros((1, 1, 3)))
    return dataset, Predictions(points, np.ones((2, 17), np.float32), np.arange(2))


def test_an_annotation_id_of_0_counts(tmp_path: Path) -> None:
    dataset, predictions = _two_people()
    assert oks_evaluate(dataset, predictions)["AP"] == pytest.approx(1)
    result = coco_results(dataset, predictions)
    assert [type(value) for value in result[0].values()] == [int, int, list, float]
    assert json.loads(write_coco_results(result, tmp_path / "a" / "r.json").read_text()) == result


def test_diverged_and_missing_predictions_are_misses() -> None:
    dataset, predictions = _two_people()
    broken = predictions.keypoints.copy()
    broken[1, 3] = np.nan
    result = oks_evaluate(dataset, dataclasses.replace(predictions, keypoints=broken))
    assert (result["not_finite"], result["AR"]) == (1, 0.5)
    none = Predictions(
        np.zeros((0, 17, 2), np.float32), np.zeros((0, 17), np.float32), np.zeros(0, np.int64)
    )
    result = oks_evaluate(dataset, none)
    assert (result["AP"], result["AR"], result["results"]) == (0, 0, 0)


def test_errors_name_what_does_not_fit() -> None:
    dataset, predictions = _two_people()
    with pytest.raises(PosefabricError, match=r"predictions\.keypoints"):
        oks_evaluate(
            dataset, dataclasses.replace(predictions, keypoints=predictions.keypoints[:, :14])
        )
    with pytest.raises(PosefabricError, match=r"predictions\.index"):
        oks_evaluate(dataset, dataclasses.replace(predictions, index=np.array([0, 2])))
    with pytest.raises(PosefabricError, match="sigmas"):
        oks_evaluate(dataset, predictions, sigmas=np.ones(3))


def test_every_animal_keeps_its_category(tmp_path: Path) -> None:
    """A file with several categories of one skeleton: results carry the annotation's own."""
    dataset, predictions = _two_people()
    tree = {
        "images": [{"id": 7}],
        "categories": [
            {"id": number, "name": str(number), "keypoints": list(COCO17.keypoints)}
            for number in (3, 5)
        ],
        "annotations": [
            {
                "id": person.annotation_id,
                "image_id": 7,
                "category_id": 3 + 2 * person.annotation_id,
                "bbox": [0, 0, 100, 100],
                "area": 5000,
                "keypoints": np.column_stack([person.keypoints, person.visibility])
                .ravel()
                .tolist(),
            }
            for person in dataset.persons
        ],
    }
    path = tmp_path / "animals.json"
    path.write_text(json.dumps(tree))
    dataset = dataclasses.replace(dataset, annotations_path=str(path))
    assert [r["category_id"] for r in coco_results(dataset, predictions)] == [3, 5]
    assert oks_evaluate(dataset, predictions)["AP"] == pytest.approx(1)
    detected = [dataclasses.replace(person, annotation_id=-1) for person in dataset.persons]
    with pytest.raises(DataError, match="tells none"):
        coco_results(dataclasses.replace(dataset, persons=detected), predictions)
