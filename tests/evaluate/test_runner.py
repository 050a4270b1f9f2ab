"""From picture to measured keypoints, with networks whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from posefabric.data.batch import Normalisation
from posefabric.data.codec import Codec
from posefabric.data.crop import CropGeometry, Preset, transform_points
from posefabric.evaluate.runner import evaluate_network, predict_dataset, table
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError, Person, PersonDataset, PosefabricError

LSP = load_skeleton("lsp14")
INPUT_WH = (96, 128)
PICTURE_WH = (160, 120)


def _people(count: int = 10, *, skeleton: Any = LSP, spoiled: tuple[int, ...] = ()) -> Any:
    """Noise pictures, two persons in each, keypoints well inside their boxes."""
    rng = np.random.default_rng(3)
    persons = []
    for row in range(count):
        box = rng.uniform((0, 0, 50, 50), (60, 40, 100, 80)).astype(np.float32)
        inside = rng.uniform(0.1, 0.9, (skeleton.num_keypoints, 2))
        visibility = np.full(skeleton.num_keypoints, 2, np.uint8)
        visibility[6] = row % 2
        persons.append(
            Person(
                image_id=row // 2,
                annotation_id=row,
                file=f"picture {row // 2}",
                box_xywh=box,
                keypoints=(box[:2] + inside * box[2:]).astype(np.float32),
                visibility=visibility,
                area=float(box[2] * box[3] / 2),
            )
        )

    def read(person: Person) -> np.ndarray:
        if person.image_id in spoiled:
            raise DataError(f"{person.file}: truncated")
        noise = np.random.default_rng(person.image_id).integers(0, 256, (*PICTURE_WH[::-1], 3))
        return noise.astype(np.uint8)

    return PersonDataset("made", skeleton, persons, read_image=read)


def _parts(preset: Preset = "hrnet", sigma: float = 1.5) -> dict[str, Any]:
    return {
        "geometry": CropGeometry(INPUT_WH, preset, margin=1.5),
        "codec": Codec(preset, INPUT_WH, (INPUT_WH[0] // 4, INPUT_WH[1] // 4), sigma),
        "normalisation": Normalisation(),
        "batch_size": 4,
    }


class _Oracle(nn.Module):
    """Returns the encoded truth, of the mirrored person in every second call with ``flip``."""

    def __init__(self, dataset: PersonDataset, codec: Codec, *, flip: bool) -> None:
        super().__init__()
        self.dataset, self.codec, self.flip = dataset, codec, flip
        self.row, self.mirrored = 0, False
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        geometry = CropGeometry(self.codec.input_wh, self.codec.preset)
        persons = self.dataset.persons[self.row : self.row + len(images)]
        points = np.stack(
            [transform_points(geometry.image_to_input(p.box_xywh), p.keypoints) for p in persons]
        )
        if self.mirrored:
            points[..., 0] = self.codec.input_wh[0] - 1 - points[..., 0]
            points = points[:, self.dataset.skeleton.flip_index]
        if not self.flip or self.mirrored:
            self.row += len(images)
        self.mirrored = self.flip and not self.mirrored
        everything = torch.ones(points.shape[:2])
        return self.codec.encode(torch.from_numpy(points), everything)[0]

    def score_maps(self, outputs: Tensor) -> Tensor:
        return outputs


class _Conv(nn.Module):
    """A random network whose scores depend on the whole picture; its mode changes them."""

    def __init__(self, count: int = 14) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(3, 8, 7, stride=4, padding=3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, count, 3, padding=1)
        self.seen: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        outputs = self.head(self.norm(self.backbone(images)).relu())
        self.seen.append(outputs.dtype)
        return outputs

    def score_maps(self, outputs: Tensor) -> Tensor:
        assert outputs.dtype == torch.float32
        return outputs.sigmoid()

    def architecture(self) -> Any:
        parts = [
            SimpleNamespace(name="legs", keypoints=(0, 1, 2, 3, 4, 5)),
            SimpleNamespace(name="rest", keypoints=tuple(range(6, 14))),
        ]
        return SimpleNamespace(parts=parts)


@pytest.mark.parametrize(("preset", "worst_px"), [("hrnet", 3.0), ("udp", 0.3)])
@pytest.mark.parametrize("flip", [False, True])
def test_the_oracle_is_found_again(preset: Preset, worst_px: float, flip: bool) -> None:
    dataset, parts = _people(), _parts(preset)
    oracle = _Oracle(dataset, parts["codec"], flip=flip)
    predictions = predict_dataset(oracle, dataset, flip=flip, **parts)
    truth = np.stack([person.keypoints for person in dataset.persons])
    assert predictions.index.tolist() == list(range(10))
    assert predictions.keypoints.dtype == predictions.scores.dtype == np.float32
    errors = np.linalg.norm(predictions.keypoints - truth, axis=-1)
    assert errors.max() < worst_px
    assert errors.mean() < 0.6 * worst_px
    assert predictions.scores.min() > 0.8
    assert predictions.scores.max() <= 1


def test_oracle_scores_full_marks() -> None:
    dataset, parts = _people(), _parts("udp")
    result = evaluate_network(_Oracle(dataset, parts["codec"], flip=True), dataset, **parts)
    assert result["pck"]["PCK"] == 1.0
    assert result["pck"]["joints"] == 10 * 14 - 5
    assert result["oks"]["AP"] == pytest.approx(1.0)
    assert result["oks"]["AR"] == pytest.approx(1.0)
    assert result["persons"] == result["predicted"] == 10
    assert result["flip"] is True
    assert result["box_source"] == "ground truth"
    assert result["sigmas_source"] == LSP.sigmas_source
    assert result["pckh"] is None
    assert result["unreadable"] == {}
    json.dumps(result, allow_nan=False)


def test_flip_test_averages_probabilities() -> None:
    dataset, parts = _people(4), _parts("hrnet")
    network = _Conv()
    seen: list[Tensor] = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    predictions = predict_dataset(network, dataset, flip=True, **parts)
    plain, mirrored = seen
    assert torch.equal(mirrored, plain.flip(3))
    network.eval()
    codec, order = parts["codec"], torch.from_numpy(LSP.flip_index)
    with torch.no_grad():
        first = network(plain).sigmoid()
        second = network(plain.flip(3)).sigmoid().flip(3)[:, order]
    second = torch.cat([second[..., :1], second[..., :-1]], dim=3)  # hrnet: one pixel right
    _, scores = codec.decode((first + second) / 2)
    np.testing.assert_allclose(predictions.scores, scores.numpy(), rtol=1e-5)
    without = predict_dataset(network, dataset, flip=False, **parts)
    np.testing.assert_allclose(without.scores, codec.decode(first)[1].numpy(), rtol=1e-5)


def test_batch_size_workers_and_mode_change_nothing() -> None:
    dataset, parts = _people(7), _parts()
    network = _Conv().train()
    network.norm.eval()
    running = network.norm.running_mean
    assert isinstance(running, Tensor)
    before = running.clone()
    once = predict_dataset(network, dataset, **parts)
    again = predict_dataset(network, dataset, **{**parts, "batch_size": 7, "workers": 1})
    np.testing.assert_allclose(again.keypoints, once.keypoints, atol=1e-3)
    np.testing.assert_array_equal(again.index, once.index)
    assert network.training
    assert network.backbone.training
    assert not network.norm.training
    assert torch.equal(before, running)
    network.head.weight.requires_grad_(True)
    assert torch.is_grad_enabled()


def test_mode_is_put_back_after_an_error() -> None:
    dataset, parts = _people(4, spoiled=(1,)), _parts()
    network = _Conv().train()
    with pytest.raises(DataError, match="picture 1: truncated"):
        predict_dataset(network, dataset, **parts)
    assert network.training


def test_unreadable_pictures_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    whole, spoiled, parts = _people(10), _people(10, spoiled=(1, 4)), _parts()
    full = predict_dataset(_Conv(), whole, **parts)
    with caplog.at_level(logging.WARNING):
        result = evaluate_network(_Conv(), spoiled, on_bad_image="skip", **parts)
        rest = predict_dataset(_Conv(), spoiled, on_bad_image="skip", **parts)
    assert "4 persons left out" in caplog.text
    assert rest.index.tolist() == [0, 1, 4, 5, 6, 7]
    np.testing.assert_array_equal(rest.keypoints, full.keypoints[rest.index])
    assert result["predicted"] == 6
    assert result["pck"]["persons"] == 6
    assert set(result["unreadable"]) == {"picture 1", "picture 4"}
    assert result["oks"]["images"] == 5  # what cannot be read counts as missed in AR


def test_every_picture_unreadable_gives_a_result() -> None:
    dataset, parts = _people(4, spoiled=(0, 1)), _parts()
    result = evaluate_network(_Conv(), dataset, on_bad_image="skip", **parts)
    assert (result["predicted"], result["pck"], result["oks"]["AR"]) == (0, None, 0.0)
    table(result)


def test_bf16_runs_low_and_scores_high() -> None:
    dataset, parts = _people(4), _parts()
    network = _Conv()
    low = predict_dataset(network, dataset, precision="bf16", **parts)
    assert set(network.seen) == {torch.bfloat16}
    network.seen.clear()
    high = predict_dataset(network, dataset, **parts)
    assert set(network.seen) == {torch.float32}
    np.testing.assert_allclose(low.scores, high.scores, atol=0.02)
    with pytest.raises(PosefabricError, match="precision"):
        predict_dataset(network, dataset, precision="fp16", **parts)  # type: ignore[arg-type]


def test_progress_reaches_the_end() -> None:
    steps: list[tuple[int, int]] = []
    predict_dataset(
        _Conv(), _people(10), progress=lambda done, total: steps.append((done, total)), **_parts()
    )
    assert steps == [(4, 10), (8, 10), (10, 10)]


def test_a_network_of_another_skeleton_is_refused() -> None:
    with pytest.raises(PosefabricError, match=r"\(4, 17, 32, 24\), expected \(4, 14, 32, 24\)"):
        predict_dataset(_Conv(17), _people(4), **_parts())


def test_parts_come_from_the_network_and_reach_the_table() -> None:
    dataset, parts = _people(), _parts()
    result = evaluate_network(_Conv(), dataset, keep_predictions=True, flip=False, **parts)
    legs = result["pck"]["per_part"]["legs"]
    joints = [result["pck"]["per_joint"][name] for name in LSP.keypoints[:6]]
    assert legs["count"] == sum(joint["count"] for joint in joints) == 60
    assert len(result["predictions"]) == 10
    json.dumps(result, allow_nan=False)
    text = " ".join(_rendered(result).split())
    for word in ("legs", "right_ankle", "AP50", "flip test: no", "boxes: ground truth", "PCK@0.2"):
        assert word in text, word


def _rendered(result: dict[str, Any]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(result))
    return captured.get()


def test_pckh_needs_mpii() -> None:
    mpii = load_skeleton("mpii16")
    dataset, parts = _people(6, skeleton=mpii), _parts("udp")
    oracle = _Oracle(dataset, parts["codec"], flip=True)
    headboxes = np.tile(np.array([[10.0, 10.0], [30.0, 30.0]]), (6, 1, 1))
    result = evaluate_network(oracle, dataset, headboxes=headboxes, **parts)
    assert result["pckh"]["Mean"] == 100.0
    assert "PCKh Ankle" in _rendered(result)
    with pytest.raises(PosefabricError, match="mpii16"):
        evaluate_network(_Conv(), _people(6), headboxes=headboxes, **parts)
    with pytest.raises(PosefabricError, match="6 persons"):
        evaluate_network(_Conv(16), dataset, headboxes=headboxes[:4], parts={}, **parts)


def test_without_ground_truth_nothing_is_measured() -> None:
    dataset = _people(4)
    detections = [
        dataclasses.replace(
            person,
            annotation_id=-1,
            keypoints=np.zeros((14, 2), np.float32),
            visibility=np.zeros(14, np.uint8),
        )
        for person in dataset.persons
    ]
    result = evaluate_network(_Conv(), dataclasses.replace(dataset, persons=detections), **_parts())
    assert result["pck"] is None
    assert result["oks"] is None
    assert result["predicted"] == 4
    table(result)


def test_synthetic_people_end_to_end() -> None:
    """The project's own pictures through reading, cropping, encoding and decoding."""
    synthetic = pytest.importorskip("posefabric.data.synthetic")
    coco17 = load_skeleton("coco17")
    dataset = synthetic.synthetic_people(count=6, seed=5, skeleton=coco17)
    parts = _parts("udp")
    result = evaluate_network(_Oracle(dataset, parts["codec"], flip=True), dataset, **parts)
    assert result["pck"]["PCK"] > 0.97  # a keypoint far outside its box is outside the map
    assert result["oks"]["AR"] > 0.9
