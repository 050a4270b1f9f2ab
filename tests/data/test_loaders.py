"""Loading: the same batches whoever reads them, and bad pictures that say so."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from posefabric.data import reader
from posefabric.data.crop import CropGeometry, crop_person
from posefabric.data.loaders import CropLoader, split_by_image
from posefabric.structures import CropBatch, DataError, Person, PersonDataset, PosefabricError

GEOMETRY = CropGeometry((32, 32), "hrnet", margin=1.25)
FIELDS = ("crops", "image_to_crop", "keypoints", "visibility", "index", "unreadable")


def picture(person: Person) -> np.ndarray:
    rng = np.random.default_rng(person.image_id)
    return rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def people(
    count: int, read_image: Callable[[Person], np.ndarray] = picture, per_image: int = 2
) -> PersonDataset:
    skeleton: Any = None
    persons = [
        Person(
            image_id=row // per_image,
            annotation_id=1000 + row,
            file=f"picture{row // per_image}.jpg",
            box_xywh=np.array([5 + row % 7, 4, 30, 38], dtype=np.float32),
            keypoints=np.full((3, 2), row, dtype=np.float32),
            visibility=np.array([0, 1, 2], dtype=np.uint8),
        )
        for row in range(count)
    ]
    return PersonDataset("people", skeleton, persons, read_image)


class Counting:
    """Counts reads over all processes and fails on chosen pictures."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.reads = multiprocessing.Value("i", 0)
        self.bad = bad

    def __call__(self, person: Person) -> np.ndarray:
        with self.reads.get_lock():
            self.reads.value += 1
        if person.image_id in self.bad:
            raise DataError(f"{person.file}: truncated, expected a whole JPEG; download it again")
        return picture(person)


def equal(first: list[CropBatch], second: list[CropBatch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in FIELDS
    )


def rows_of(batches: list[CropBatch]) -> list[int]:
    return torch.cat([batch.index for batch in batches]).tolist()


def test_a_batch_holds_what_crop_person_gives() -> None:
    dataset = people(5)
    loader = CropLoader(dataset, GEOMETRY, batch_size=3)
    batches = list(loader.batches())
    assert [len(batch.index) for batch in batches] == [3, 2]
    assert rows_of(batches) == [0, 1, 2, 3, 4]
    for place, row in enumerate((3, 4)):
        person = dataset.persons[row]
        crop, matrix = crop_person(picture(person), person.box_xywh, GEOMETRY)
        np.testing.assert_array_equal(batches[1].crops[place].numpy(), crop)
        np.testing.assert_array_equal(batches[1].image_to_crop[place].numpy(), matrix)
        np.testing.assert_array_equal(batches[1].keypoints[place].numpy(), person.keypoints)
        assert batches[1].visibility[place].tolist() == [0, 1, 2]
    assert batches[0].crops.dtype == torch.uint8
    assert not batches[0].unreadable.any()


def test_the_order_is_that_of_seed_and_epoch() -> None:
    loader = CropLoader(people(20), GEOMETRY, batch_size=6, rows=range(2, 20), seed=7)
    for epoch in (0, 3):
        expected = np.random.default_rng([7, epoch]).permutation(np.arange(2, 20))
        assert rows_of(list(loader.batches(epoch))) == expected.tolist()
    assert rows_of(list(loader.batches(0))) != rows_of(list(loader.batches(3)))


def test_length_counts_the_batches() -> None:
    for count, drop, expected in ((12, False, 3), (13, False, 4), (13, True, 3)):
        loader = CropLoader(people(count), GEOMETRY, batch_size=4, seed=0, drop_last=drop)
        assert len(loader) == expected == len(list(loader.batches()))


@pytest.mark.parametrize("cache", [False, True])
def test_workers_give_the_same_batches_over_epochs(cache) -> None:
    dataset = people(14)
    alone = CropLoader(dataset, GEOMETRY, batch_size=4, seed=1)
    helped = CropLoader(dataset, GEOMETRY, batch_size=4, seed=1, workers=2, cache=cache)
    for epoch in range(3):
        expected = list(alone.batches(epoch))
        assert equal(list(helped.batches(epoch)), expected)
        assert equal(list(helped.batches(epoch, start=2)), expected[2:])


def test_start_skips_without_reading() -> None:
    counting = Counting()
    loader = CropLoader(people(12, counting, per_image=1), GEOMETRY, batch_size=4, seed=5)
    whole = list(loader.batches(epoch=2))
    counting.reads.value = 0
    assert equal(list(loader.batches(epoch=2, start=2)), whole[2:])
    assert counting.reads.value == 4
    assert list(loader.batches(start=3)) == []


def test_without_workers_a_thread_reads_a_batch_ahead() -> None:
    counting, before = Counting(), set(threading.enumerate())
    loader = CropLoader(people(12, counting, per_image=1), GEOMETRY, batch_size=4, seed=5)
    batches = loader.batches()
    next(batches)
    assert set(threading.enumerate()) - before
    until = time.monotonic() + 30
    while counting.reads.value < 8 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert counting.reads.value == 8
    batches.close()
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_abandoned_epoch_leaves_no_trace(workers: int) -> None:
    loader = CropLoader(people(16), GEOMETRY, batch_size=2, seed=1, workers=workers)
    expected = list(CropLoader(people(16), GEOMETRY, batch_size=2, seed=1).batches(1))
    first = loader.batches(0)
    next(first)
    assert equal(list(loader.batches(1)), expected)
    with pytest.raises(PosefabricError, match="earlier iteration"):
        next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_reads_each_picture_once(workers) -> None:
    counting = Counting()
    dataset = people(10, counting, per_image=1)
    loader = CropLoader(dataset, GEOMETRY, batch_size=3, seed=1, workers=workers, cache=True)
    for epoch in range(3):
        assert len(list(loader.batches(epoch))) == 4
    assert counting.reads.value == 10


def test_a_cache_for_some_rows_holds_only_those() -> None:
    loader = CropLoader(people(10), GEOMETRY, batch_size=2, rows=[9, 4, 9, 6], cache=True)
    plain = list(CropLoader(people(10), GEOMETRY, batch_size=2, rows=[9, 4, 9, 6]).batches())
    assert equal(list(loader.batches()), plain)
    assert equal(list(loader.batches()), plain)
    cache = reader.make_cache(people(10), np.array([9, 4, 9, 6]), GEOMETRY, workers=0)
    assert cache is not None
    assert cache.crops.shape == (3, 40, 40, 3)


def test_a_cache_over_a_quarter_of_the_memory_is_refused(monkeypatch, caplog) -> None:
    crops = 10 * 40 * 40 * 3
    dataset = people(10)
    monkeypatch.setattr(reader, "available_memory", lambda: 4 * crops)
    assert reader.make_cache(dataset, np.arange(10), GEOMETRY, workers=0) is not None
    monkeypatch.setattr(reader, "available_memory", lambda: 4 * crops - 4)
    with caplog.at_level(logging.WARNING):
        loader = CropLoader(dataset, GEOMETRY, batch_size=5, cache=True)
    assert "people: 10 crops of 40x40" in caplog.text
    assert "cache=false" in caplog.text
    assert len(list(loader.batches())) == 2


def test_persons_of_a_picture_share_its_reading() -> None:
    counting = Counting()
    list(CropLoader(people(12, counting, per_image=3), GEOMETRY, batch_size=5).batches())
    assert counting.reads.value == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_ends_with_its_own_message(workers) -> None:
    dataset = people(8, Counting(bad=(2,)))
    loader = CropLoader(dataset, GEOMETRY, batch_size=2, workers=workers)
    message = "picture2.jpg: truncated, expected a whole JPEG; download it again"
    found = []
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        found.extend(loader.batches())
    assert rows_of(found) == [0, 1, 2, 3]
    assert rows_of(list(loader.batches(start=3))) == [6, 7]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [False, True])
def test_a_bad_picture_can_be_skipped(workers, cache) -> None:
    options: dict[str, Any] = {"workers": workers, "cache": cache, "on_bad_image": "skip"}
    loader = CropLoader(people(8, Counting(bad=(2,))), GEOMETRY, batch_size=3, **options)
    for _ in range(2):
        batches = list(loader.batches())
        assert torch.cat([batch.unreadable for batch in batches]).nonzero().flatten().tolist() == [
            4,
            5,
        ]
        assert not batches[1].crops[1:].any()
        assert batches[1].crops[0].any()
        assert not batches[1].visibility[1:].any()
        assert batches[1].visibility[0].any()
        assert torch.isfinite(torch.linalg.inv(batches[1].image_to_crop[:, :, :2])).all()
    assert list(loader.unreadable) == ["picture2.jpg"]
    assert "truncated" in loader.unreadable["picture2.jpg"]


def test_a_bad_box_names_file_and_annotation() -> None:
    dataset = people(4)
    dataset.persons[3].box_xywh[2] = 0
    with pytest.raises(DataError, match=r"picture1\.jpg: annotation 1003: box .*positive sides"):
        list(CropLoader(dataset, GEOMETRY, batch_size=4).batches())


def test_loading_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(CropLoader(people(4), GEOMETRY, batch_size=2, seed=0).batches())
    assert torch.equal(torch.get_rng_state(), before)


def test_split_keeps_pictures_together() -> None:
    dataset = people(60, per_image=3)
    first, second = split_by_image(dataset, 0.25, seed=1)
    assert sorted([*first, *second]) == list(range(60))
    images = [{dataset.persons[row].image_id for row in rows} for rows in (first, second)]
    assert not images[0] & images[1]
    assert len(images[0]) == 5
    again, _ = split_by_image(dataset, 0.25, seed=1)
    np.testing.assert_array_equal(first, again)
    other, _ = split_by_image(dataset, 0.25, seed=2)
    assert first.tolist() != other.tolist()
    one, rest = split_by_image(people(4), 0.01, seed=0)
    assert len(one) == len(rest) == 2


def test_a_split_counts_persons_not_pictures() -> None:
    """Pictures of one to twelve persons: about half the persons, whatever the pictures."""
    dataset = people(60)
    pictures = np.repeat(np.arange(9), [12, 1, 12, 1, 12, 1, 1, 12, 8])
    persons = [
        dataclasses.replace(person, image_id=int(picture))
        for person, picture in zip(dataset.persons, pictures, strict=True)
    ]
    dataset = dataclasses.replace(dataset, persons=persons)
    shares = []
    for seed in range(30):
        first, second = split_by_image(dataset, 0.5, seed=seed)
        assert sorted([*first, *second]) == list(range(60))
        assert not set(pictures[first]) & set(pictures[second])
        shares.append(len(first) / 60)
    assert max(abs(share - 0.5) for share in shares) <= 0.1
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)


def test_wrong_options_are_refused() -> None:
    dataset = people(4)
    for options in (
        {"rows": []},
        {"rows": [4]},
        {"rows": [-1]},
        {"batch_size": 0},
        {"workers": -1},
        {"on_bad_image": "ignore"},
        {"batch_size": 5, "drop_last": True},
    ):
        arguments: dict[str, Any] = {"batch_size": 2, **options}
        with pytest.raises(PosefabricError, match=r"expected|smaller batch_size"):
            CropLoader(dataset, GEOMETRY, **arguments)
    for fraction in (0.0, 1.0):
        with pytest.raises(PosefabricError, match="between 0 and 1"):
            split_by_image(dataset, fraction, seed=0)
