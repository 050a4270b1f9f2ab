"""Poses from pictures in torch: the same as the evaluation's, and clear words for bad input."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from networks import make_compact, make_supernet, shake
from tiny_network import FOUR, FOUR_YAML, TinyNetwork, blobs, tiny_config

from posefabric.config import Config
from posefabric.data.crop import CropGeometry
from posefabric.data.pipeline import make_codec
from posefabric.deploy.predictor import PoseEstimator
from posefabric.derive.prune import prune
from posefabric.evaluate.runner import predict_dataset
from posefabric.models.build import build_supernet
from posefabric.run import RunFolder
from posefabric.structures import DataError, Person, PersonDataset, PosefabricError
from posefabric.train.checkpoint import save_weights

PICTURES = [blobs(1, 120, 90), blobs(2, 70, 160), blobs(3, 200, 200)]
BOXES = [
    np.array([[5, 10, 60, 90], [20, 30.5, 33.3, 41]]),
    np.zeros((0, 4)),
    np.array([[-20, 40, 150, 100]]),
]


def make_estimator(preset: str = "hrnet", **options) -> PoseEstimator:
    network = TinyNetwork()
    return PoseEstimator(
        network=network,
        skeleton=FOUR,
        codec=make_codec(tiny_config(preset).data),
        normalisation=network.normalisation,
        **options,
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("preset", ["hrnet", "udp"])
def test_it_predicts_what_the_evaluation_predicts(preset: str, flip: bool) -> None:
    estimator = make_estimator(preset)
    persons = [
        Person(
            image_id=image,
            annotation_id=0,
            file=str(image),
            box_xywh=box.astype(np.float32),
            keypoints=np.zeros((4, 2), dtype=np.float32),
            visibility=np.zeros(4, dtype=np.uint8),
        )
        for image, boxes in enumerate(BOXES)
        for box in boxes
    ]
    expected = predict_dataset(
        TinyNetwork(),
        PersonDataset("made", FOUR, persons, lambda person: PICTURES[person.image_id]),
        geometry=CropGeometry(input_wh=(64, 96), preset=preset),  # type: ignore[arg-type]
        codec=estimator.codec,
        normalisation=TinyNetwork.normalisation,
        flip=flip,
    )
    found = estimator.predict(PICTURES, BOXES, flip=flip)
    assert [len(prediction) for prediction in found] == [2, 0, 1]
    assert found[1].keypoints.shape == (0, 4, 2) and found[1].scores.shape == (0, 4)
    keypoints = np.concatenate([prediction.keypoints for prediction in found])
    np.testing.assert_allclose(keypoints, expected.keypoints, atol=2e-3)
    scores = np.concatenate([prediction.scores for prediction in found])
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    np.testing.assert_array_equal(found[2].boxes, BOXES[2].astype(np.float32))


def test_the_flip_test_changes_something() -> None:
    estimator = make_estimator()
    plain, flipped = (estimator.predict(PICTURES[0], flip=flip)[0] for flip in (False, True))
    assert np.abs(plain.scores - flipped.scores).max() > 1e-3


def test_every_way_to_say_the_same_gives_the_same(tmp_path: Path) -> None:
    estimator = make_estimator()
    file = tmp_path / "one.png"
    cv2.imwrite(str(file), cv2.cvtColor(PICTURES[0], cv2.COLOR_RGB2BGR))
    boxes = BOXES[0]
    expected = estimator.predict([PICTURES[0]], [boxes])[0]
    for images, own in [
        (PICTURES[0], boxes),
        (PICTURES[0], [boxes]),
        (PICTURES[0], boxes.tolist()),
        (PICTURES[0][None], boxes[None]),
        ([PICTURES[0]], boxes),
        (file, boxes),
        ([str(file)], [boxes]),
    ]:
        found = estimator.predict(images, own)
        assert len(found) == 1
        np.testing.assert_array_equal(found[0].keypoints, expected.keypoints)
        np.testing.assert_array_equal(found[0].scores, expected.scores)
    one_by_one = make_estimator(batch_size=1).predict(PICTURES, BOXES)
    together = estimator.predict(PICTURES, BOXES)
    for found, wanted in zip(one_by_one, together, strict=True):
        np.testing.assert_allclose(found.keypoints, wanted.keypoints, atol=1e-3)


def test_without_a_box_the_whole_picture_is_one() -> None:
    estimator = make_estimator()
    whole = estimator.predict(PICTURES[1])[0]
    np.testing.assert_array_equal(whole.boxes, [[0, 0, 160, 70]])
    given = estimator.predict(PICTURES[1], np.array([[0, 0, 160, 70]]))[0]
    np.testing.assert_array_equal(whole.keypoints, given.keypoints)
    mixed = estimator.predict(PICTURES[:2], [BOXES[0], None])
    assert [len(prediction) for prediction in mixed] == [2, 1]
    assert whole.scores.min() >= 0 and whole.scores.max() <= 1


def test_nothing_gives_nothing() -> None:
    assert make_estimator().predict([]) == []
    assert make_estimator().predict([], []) == []
    assert len(make_estimator().predict(PICTURES[0], [])[0]) == 0


BAD = {
    "grey": (PICTURES[0][..., 0], None, r"picture 0: .*grey.*COLOR_GRAY2RGB"),
    "one channel": (PICTURES[0][..., :1], None, "picture 0: .*grey"),
    "alpha": (np.zeros((5, 5, 4), np.uint8), None, "drop alpha"),
    "float": (PICTURES[0] / 255, None, "picture 0: .*float64.*astype"),
    "second of two": ([PICTURES[0], PICTURES[1].astype(int)], None, "picture 1: .*int64"),
    "empty": (np.zeros((0, 5, 3), np.uint8), None, r"picture 0: .*\(0, 5, 3\)"),
    "a number": (5, None, "images: .*int"),
    "none inside": ([None], None, "picture 0: .*NoneType"),
    "no file": (["nowhere.png"], None, "nowhere.png: no such picture"),
    "no area": (PICTURES[:2], [None, [[1, 2, 3, 4], [5, 6, 0, 8]]], "picture 1, box 1: .*positive"),
    "nan": (PICTURES[0], [[1, 2, np.nan, 4]], "picture 0, box 0: .*finite"),
    "three numbers": (PICTURES[0], [[1, 2, 3]], r"picture 0: boxes of shape \(1, 3\)"),
    "words": (PICTURES[0], [["a", "b", "c", "d"]], "picture 0: boxes must be"),
    "one array for two": (PICTURES[:2], BOXES[0], "for 2 pictures"),
    "too few": (PICTURES, [None], r"one entry a picture \(3\).*got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    images, boxes, message = BAD[case]
    with pytest.raises(DataError, match=message):
        make_estimator().predict(images, boxes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished search and a compact child, of untrained networks."""
    folder = tmp_path_factory.mktemp("runs")
    skeleton = folder / "four.yaml"
    skeleton.write_text(FOUR_YAML)
    config = Config.model_validate(
        {
            "data": {"skeleton": str(skeleton), "input_wh": (64, 64)},
            "model": {
                "backbone": "test_efficientnet",
                "weights": "none",
                "parts": 1,
                "channel_factor": 2,
            },
        }
    )
    search = RunFolder.create(folder / "search", config=config, kind="search")
    mixture = build_supernet(config)
    shake(mixture, 0)
    save_weights(search.weights_path, mixture)
    search.set_state("finished")
    child = search.new_child("derive", config)
    graph = prune(make_supernet(relaxation="sparsemax").architecture())
    compact = make_compact(graph)
    shake(compact, 5)
    child.write_text("architecture.json", graph.to_json())
    save_weights(child.weights_path, compact)
    child.set_state("finished")
    return search


def test_a_run_gives_its_newest_compact_network_folded(run: RunFolder) -> None:
    estimator = PoseEstimator.load(run.path, device="cpu")
    assert "compact network" in estimator.source and "01-derive" in estimator.source
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in estimator.network.modules())
    child = run.resolve("compact")
    compact = make_compact(estimator.network.architecture())
    from posefabric.train.checkpoint import load_weights

    load_weights(child.weights_path, compact)
    unfolded = PoseEstimator(
        network=compact,
        skeleton=estimator.skeleton,
        codec=estimator.codec,
        normalisation=compact.normalisation,
    )
    found, expected = (e.predict(PICTURES, BOXES) for e in (estimator, unfolded))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-3)


def test_the_mixture_can_be_asked_for(run: RunFolder) -> None:
    estimator = PoseEstimator.load(str(run.path), which="mixture", device="cpu")
    assert estimator.source.startswith("mixture of")
    assert estimator.predict(PICTURES[0])[0].keypoints.shape == (1, 4, 2)
    with pytest.raises(PosefabricError, match="09-derive"):
        PoseEstimator.load(run.path, which="09-derive", device="cpu")
    with pytest.raises(PosefabricError, match="device"):
        PoseEstimator.load(run.path, device="quantum")


def test_another_skeleton_than_the_trained_one_is_refused(run: RunFolder) -> None:
    skeleton = Path(RunFolder.open(run.path).resolve("auto").config.data.skeleton)
    text = skeleton.read_text()
    try:
        skeleton.write_text(text.replace("[a, b, c, d]", "[a, b, c, e]"))
        with pytest.raises(PosefabricError, match=r"skeleton\.yaml.*a, b, c, d; restore"):
            PoseEstimator.load(run.path, device="cpu")
    finally:
        skeleton.write_text(text)
