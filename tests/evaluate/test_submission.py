"""Files for the test servers, read back and scored by pycocotools and by scipy."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpii_release import write_release
from scipy.io import loadmat

from posefabric.data.coco import read_coco
from posefabric.data.mpii import read_mpii
from posefabric.evaluate.measures import evaluate_predictions
from posefabric.evaluate.oks import METRICS, oks_evaluate
from posefabric.evaluate.pck import mpii_pckh
from posefabric.evaluate.submission import write_submission
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError, PersonDataset, PosefabricError, Predictions

MPII, COCO17 = load_skeleton("mpii16"), load_skeleton("coco17")


def noised(dataset: PersonDataset, pixels: float = 5.0) -> Predictions:
    rng = np.random.default_rng(0)
    truth = np.stack([person.keypoints for person in dataset.persons])
    return Predictions(
        keypoints=(truth + rng.normal(0, pixels, truth.shape)).astype(np.float32),
        scores=rng.uniform(0.3, 0.9, truth.shape[:2]).astype(np.float32),
        index=np.arange(len(truth)),
    )


def test_coco_s_server_would_score_the_same(shared: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    folder = shared / "data" / "coco_sample"
    dataset = read_coco(folder / "test_coco.json", folder, COCO17)
    # Every person twice: the doubles have to go before the file is written.
    twice = PersonDataset(
        dataset.name,
        COCO17,
        dataset.persons * 2,
        dataset.read_image,
        annotations_path=dataset.annotations_path,
    )
    once = noised(dataset)
    predictions = Predictions(
        keypoints=np.tile(once.keypoints, (2, 1, 1)),
        scores=np.concatenate([once.scores, 0.5 * once.scores]),
        index=np.arange(len(twice)),
    )
    path = tmp_path / "out" / "person_keypoints_test.json"
    facts = write_submission(twice, predictions, path, input_wh=(192, 256))
    written = json.loads(path.read_text())
    assert facts == {"persons": len(written), "of": len(twice)}
    assert len(written) == len(dataset)
    assert set(written[0]) == {"image_id", "category_id", "keypoints", "score"}
    assert len(written[0]["keypoints"]) == 51
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "test_coco.json"))
        scored = COCOeval(truth, truth.loadRes(str(path)), "keypoints")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    expected = oks_evaluate(twice, predictions, input_wh=(192, 256))
    assert [expected[name] for name in METRICS] == pytest.approx(list(scored.stats), abs=1e-12)
    assert 0.1 < expected["AP"] < 1


def image_info(shared: Path, tmp_path: Path) -> Path:
    """COCO's test files have pictures and categories, and no annotations."""
    tree = json.loads((shared / "data" / "coco_sample" / "test_coco.json").read_text())
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
    path = tmp_path / "image_info_test-dev2017.json"
    path.write_text(json.dumps({"images": tree["images"], "categories": categories}))
    return path


def test_a_test_split_without_keypoints(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "coco_sample"
    boxes = folder / "test_coco_det_AP_H_56.json"
    path = image_info(shared, tmp_path)
    dataset = read_coco(path, folder, COCO17, boxes=boxes)
    known = read_coco(folder / "test_coco.json", folder, COCO17, boxes=boxes)
    assert not dataset.ground_truth and known.ground_truth
    predictions = noised(dataset)
    assert write_submission(dataset, predictions, tmp_path / "a.json")["persons"] > 0
    write_submission(known, predictions, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    result = evaluate_predictions(dataset, predictions)
    assert result["oks"] is None and result["pck"] is None and not result["ground_truth"]
    assert evaluate_predictions(known, predictions)["oks"] is not None
    with pytest.raises(DataError, match=r"`annotations`"):
        read_coco(path, folder, COCO17)


def points_of(path: Path) -> list[tuple[str, int, np.ndarray]]:
    """(picture, person's place, points (16, 3): x, y, id) of an MPII submission."""
    found = []
    pred: Any = loadmat(path, struct_as_record=False)["pred"]
    assert pred.shape[0] == 1
    for picture in pred[0]:
        for place, rect in enumerate(picture.annorect.ravel(), 1):
            assert rect.scale.item() > 0 and rect.objpos[0, 0].x.item() > 0
            if rect.annopoints.size:
                points = rect.annopoints[0, 0].point[0]
                values = [[p.x.item(), p.y.item(), p.id.item()] for p in points]
                found.append((picture.image[0, 0].name.item(), place, np.array(values)))
    return found


def test_mpii_s_file_has_the_test_pictures_in_their_places(tmp_path: Path) -> None:
    release = write_release(tmp_path)
    dataset = read_mpii(release, tmp_path / "images", MPII, split="test")
    predictions = noised(dataset, 30.0)
    # The second picture of one person cannot be read: its person has no points.
    predictions = Predictions(
        predictions.keypoints[[0, 2]], predictions.scores[[0, 2]], predictions.index[[0, 2]]
    )
    facts = write_submission(dataset, predictions, tmp_path / "pred.mat")
    assert facts == {"persons": 2, "of": 3}
    pred: Any = loadmat(tmp_path / "pred.mat", struct_as_record=False)["pred"]
    names = [picture.image[0, 0].name.item() for picture in pred[0]]
    assert names == ["e1.jpg", "e2.jpg", "e3.jpg"], "img_train == 0, in order, e2 without persons"
    assert [picture.annorect.size for picture in pred[0]] == [2, 0, 2]
    first, second = points_of(tmp_path / "pred.mat")
    assert (first[:2], second[:2]) == (("e1.jpg", 2), ("e3.jpg", 2))
    np.testing.assert_allclose(first[2][:, :2], predictions.keypoints[0] + 1, atol=1e-5)
    assert second[2][:, 2].tolist() == list(range(16))


def test_an_mpii_file_scores_as_the_evaluation_does(shared: Path, tmp_path: Path) -> None:
    folder, path = shared / "data" / "mpii_sample", tmp_path / "pred.mat"
    heads = shared / "reference" / "mpii_eval" / "mpii_val_ground_truth.npz"
    dataset = read_mpii(folder / "test_mpii.json", folder, MPII, split="val", headboxes=heads)
    predictions = noised(dataset, 25.0)
    write_submission(dataset, predictions, path)
    with np.load(heads) as truth:
        joints, visible, boxes = (truth[k][:5] for k in ("joints", "visible", "headboxes"))
    points = np.stack([values[:, :2] for _, _, values in points_of(path)])
    expected = mpii_pckh(points, joints, visible, boxes, legacy=True)
    found = evaluate_predictions(dataset, predictions)["pckh"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert 20 < found["Mean"] < 95 and found["Mean@0.1"] < found["Mean@0.1 legacy"]
    assert (found["persons"], found["left_out"], found["threshold"]) == (5, 0, 0.5)


def test_the_file_has_to_fit_the_data(tmp_path: Path) -> None:
    release = write_release(tmp_path)
    dataset = read_mpii(release, tmp_path / "images", MPII, split="test")
    with pytest.raises(PosefabricError, match=r"ends in \.mat: .* is MPII data"):
        write_submission(dataset, noised(dataset), tmp_path / "pred.json")
