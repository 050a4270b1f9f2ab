"""From the data options to persons, codecs and seeded training batches."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import make_config, people

from posefabric.config import AugmentConfig, Config, DataConfig, OptimConfig
from posefabric.data.batch import Normalisation, prepare_batch
from posefabric.data.pipeline import TrainingData, make_codec, open_dataset
from posefabric.data.synthetic import write_coco
from posefabric.structures import DataError, PersonDataset, PoseBatch, PosefabricError

FIELDS = ("images", "heatmaps", "weights", "input_to_image", "index")


def make_data(
    seed: int = 0, config: Config | None = None, batch_size: int = 4, **optim: Any
) -> TrainingData:
    return TrainingData.open(
        config or make_config(),
        optim=OptimConfig(batch_size=batch_size, **optim),
        normalisation=Normalisation(),
        seed=seed,
        device=torch.device("cpu"),
        dataset=people(),
    )


def equal(a: PoseBatch, b: PoseBatch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def batches(data: TrainingData, start: int, count: int) -> list[PoseBatch]:
    steps = itertools.islice(data.crops(start), count)
    return [data.prepare(crops, step) for step, crops in steps]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    data = make_data()
    assert data.steps_per_epoch == 4
    whole = batches(data, 0, 10)
    torch.manual_seed(123)
    resumed = batches(make_data(), 6, 4)
    assert all(equal(a, b) for a, b in zip(whole[6:], resumed, strict=True))
    rows = [np.concatenate([b.index for b in whole[4 * e : 4 * e + 4]]) for e in (0, 1)]
    for row in rows:
        assert sorted(row) == list(range(16)), "every person once an epoch"
    assert list(rows[0]) != list(rows[1])


def test_steps_are_numbered_over_epochs() -> None:
    steps = [step for step, _ in itertools.islice(make_data().crops(3), 7)]
    assert steps == list(range(3, 10))


@pytest.mark.parametrize("other", [1, 2**31, 2**32 - 1])
def test_augmentation_follows_the_seed(other: int) -> None:
    """A CPU generator takes 32 bits: a seed in the upper half of a number would have no say."""
    first, second = make_data(), make_data(other)
    step, crops = next(first.crops(0))
    a, b = first.prepare(crops, step), second.prepare(crops, step)
    assert torch.equal(a.index, b.index)
    assert not torch.equal(a.input_to_image, b.input_to_image)
    assert equal(a, first.prepare(crops, step))
    assert not torch.equal(a.input_to_image, first.prepare(crops, step + 1).input_to_image)


def test_batches_are_prepared_with_the_options() -> None:
    config = make_config(
        data=dict(preset="udp", sigma=1.0, input_wh=[64, 96]),
        augment=dict(scale=0, rotation=0, flip=0, colour=0, half_body=0),
    )
    data = make_data(config=config)
    step, crops = next(data.crops(0))
    found = data.prepare(crops, step)
    expected = prepare_batch(
        crops,
        geometry=data.geometry,
        codec=make_codec(config.data),
        normalisation=Normalisation(),
        skeleton=people().skeleton,
        augment=None,
        generator=None,
        device="cpu",
    )
    assert found.images.shape == (4, 3, 96, 64) and found.heatmaps.shape == (4, 17, 24, 16)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.heatmaps, expected.heatmaps, rtol=0, atol=1e-3)
    assert data.augment == AugmentConfig(scale=0, rotation=0, flip=0, colour=0, half_body=0)


@pytest.mark.parametrize("preset", ["hrnet", "udp"])
def test_the_first_steps_may_have_a_smaller_input(preset: str) -> None:
    """Shrunk by the same warp: half the pixels show, and the labels mark, the same points."""
    still = dict(scale=0, rotation=0, flip=0, colour=0, half_body=0)
    config = make_config(data=dict(preset=preset, input_wh=[128, 192]), augment=still)
    data = make_data(config=config, epochs=2, small_input_wh=(64, 96), small_input_until=0.5)
    small, whole = batches(data, 3, 2)
    assert small.images.shape == (4, 3, 96, 64) and small.heatmaps.shape == (4, 17, 24, 16)
    assert whole.images.shape == (4, 3, 192, 128) and whole.heatmaps.shape == (4, 17, 48, 32)
    plain = make_data(config=config).prepare(next(data.crops(3))[1], 3)
    corners = torch.tensor([[0.0, 0.0], [63.0, 95.0]]), torch.tensor([[0.0, 0.0], [127.0, 191.0]])
    ends = [
        points @ batch.input_to_image[0, :, :2].T + batch.input_to_image[0, :, 2]
        for points, batch in zip(corners, (small, plain), strict=True)
    ]
    pixel = 2 * float(plain.input_to_image[0, 0, 0])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-3 if preset == "udp" else pixel)
    seen = small.weights[..., 0] if small.weights.ndim == 3 else small.weights
    for person, keypoint in torch.nonzero(seen > 0).tolist():
        peaks = [
            np.array(np.unravel_index(int(b.heatmaps[person, keypoint].argmax()), (rows, columns)))
            for b, rows, columns in ((small, 24, 16), (plain, 48, 32))
        ]
        assert np.abs(peaks[0] - peaks[1] / 2).max() <= 1


def test_a_small_data_set_makes_one_smaller_batch() -> None:
    data = make_data(batch_size=64)
    assert data.steps_per_epoch == 1 and data.loader.batch_size == 16
    assert make_data(batch_size=5).steps_per_epoch == 3, "a last, smaller batch is left out"


def open_split(
    share: float, seed: int = 0, dataset: PersonDataset | None = None
) -> tuple[TrainingData, TrainingData | None]:
    return TrainingData.open_split(
        make_config(),
        share=share,
        optim=OptimConfig(batch_size=4),
        normalisation=Normalisation(),
        seed=seed,
        device=torch.device("cpu"),
        dataset=dataset or people(),
    )


def crowd(pictures: int) -> PersonDataset:
    """The 16 people, several on a picture."""
    persons = [
        dataclasses.replace(person, image_id=1 + row % pictures)
        for row, person in enumerate(people().persons)
    ]
    return dataclasses.replace(people(), persons=persons)


def test_persons_are_held_out_by_picture_and_seed() -> None:
    dataset = crowd(6)
    found = []
    for seed in range(4):
        data, held_out = open_split(0.5, seed=seed, dataset=dataset)
        assert held_out is not None
        rows = [set(side.loader.rows.tolist()) for side in (data, held_out)]
        assert rows[0] | rows[1] == set(range(16)) and not rows[0] & rows[1]
        pictures = [{dataset.persons[row].image_id for row in side} for side in rows]
        assert not pictures[0] & pictures[1]
        assert abs(len(rows[1]) - 8) <= 2
        for side, own, again in zip(
            (data, held_out), rows, open_split(0.5, seed=seed, dataset=dataset), strict=True
        ):
            assert again is not None
            assert again.loader.rows.tolist() == side.loader.rows.tolist() == sorted(own)
            seen = [row for batch in batches(side, 0, 3) for row in batch.index.tolist()]
            assert len(seen) == 12 and set(seen) <= own
        found.append(tuple(sorted(rows[1])))
    assert len(set(found)) > 1, "the seed decides"


def test_without_a_share_nothing_is_held_out() -> None:
    data, held_out = open_split(0.0)
    assert held_out is None and data.loader.rows.tolist() == list(range(16))
    assert equal(batches(data, 0, 1)[0], batches(make_data(), 0, 1)[0])


def test_both_sides_are_augmented_by_draws_of_their_own() -> None:
    data, held_out = open_split(0.5)
    assert held_out is not None
    step, crops = next(data.crops(0))
    a, b = data.prepare(crops, step), held_out.prepare(crops, step)
    assert torch.equal(a.index, b.index) and not torch.equal(a.input_to_image, b.input_to_image)


@pytest.mark.parametrize(("pictures", "share"), [(1, 0.5), (16, 0.01), (16, 0.99)])
def test_too_few_pictures_to_hold_some_out(pictures: int, share: float) -> None:
    with pytest.raises(
        PosefabricError,
        match=rf"16 persons in {pictures} pictures.*architecture_share={share}.*each side.*synchro",
    ):
        open_split(share, dataset=crowd(pictures))


def test_synthetic_splits_are_apart_and_seeded() -> None:
    config = DataConfig(format="synthetic", synthetic_train=3, synthetic_val=2)
    splits = [open_dataset(config, split) for split in ("train", "val", "test")]
    assert [len(s) for s in splits] == [3, 2, 2]
    others = config.model_copy(update={"synthetic_seed": 1})
    splits += [open_dataset(others, split) for split in ("train", "val", "test")]
    poses = {s.persons[0].keypoints.tobytes() for s in splits}
    assert len(poses) == 6
    again = open_dataset(config, "train").persons[1]
    np.testing.assert_array_equal(again.keypoints, splits[0].persons[1].keypoints)


def test_without_a_data_set_at_hand_the_options_say_which() -> None:
    config = make_config()
    data = TrainingData.open(
        config,
        optim=OptimConfig(batch_size=8),
        normalisation=Normalisation(),
        seed=0,
        device=torch.device("cpu"),
    )
    assert len(data.dataset) == 16 and data.skeleton.name == "coco17"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco") / "people"
    for split, seed in (("train", 0), ("val", 1)):
        write_coco(people(4, seed=seed), root, split)
    return root


def test_coco_splits(coco: Path, tmp_path: Path) -> None:
    config = DataConfig(root=str(coco))
    train, val = open_dataset(config, "train"), open_dataset(config, "val")
    assert (train.name, val.name) == ("people train", "people val")
    for found, seed in ((train, 0), (val, 1)):
        expected = people(4, seed=seed).persons[2]
        np.testing.assert_allclose(found.persons[2].keypoints, expected.keypoints, atol=1e-4)
        assert found[2].image.shape == (64, 64, 3)
    boxes = tmp_path / "boxes.json"
    boxes.write_text(
        '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.9},'
        ' {"image_id": 2, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.2}]'
    )
    strict = config.model_copy(update={"box_score_threshold": 0.5})
    detected = open_dataset(strict, "val", boxes=str(boxes))
    assert [p.image_id for p in detected.persons] == [1]
    assert detected.persons[0].score == pytest.approx(0.9)
    (coco / "found.json").write_text(boxes.read_text())
    assert len(open_dataset(config, "val", boxes="found.json")) == 2
    with pytest.raises(DataError, match=r"elsewhere\.json"):
        open_dataset(config, "val", boxes="elsewhere.json")


@pytest.mark.parametrize(
    ("options", "split", "message"),
    [
        (dict(), "train", r"data\.root is not set.*command line: data\.root=DIR"),
        (dict(root="/nonexistent/x"), "val", r"data\.root=/nonexistent/x: no such folder"),
        (dict(root="."), "test", r"data\.test_annotations is not set"),
    ],
)
def test_missing_roots_and_splits(options: dict, split: str, message: str) -> None:
    with pytest.raises(PosefabricError, match=message):
        open_dataset(DataConfig(**options), split)  # type: ignore[arg-type]


def test_a_root_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations/train\.json"):
        open_dataset(DataConfig(root=str(tmp_path)), "train")


def test_the_codec_of_the_options() -> None:
    codec = make_codec(DataConfig(input_wh=(192, 256), preset="udp"))
    assert (codec.heatmap_wh, codec.sigma, codec.preset) == ((48, 64), 2.0, "udp")
    assert make_codec(DataConfig(sigma=1.25)).sigma == 1.25
