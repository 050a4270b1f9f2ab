"""Crops kept on the device give the batches that the loader would, and are read once."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loaders import FIELDS, GEOMETRY, Counting, people
from trainings import make_config, make_trainer

from posefabric.data import device_cache
from posefabric.data.device_cache import DeviceCache, fits_device
from posefabric.data.loaders import CropLoader
from posefabric.distributed import Launch

CPU = torch.device("cpu")


def make_loader(
    count: int = 11, bad: tuple[int, ...] = (), **options
) -> tuple[CropLoader, Counting]:
    source = Counting(bad)
    options = {"batch_size": 3, "seed": 4, "drop_last": True, "on_bad_image": "skip", **options}
    return CropLoader(people(count, source, per_image=1), GEOMETRY, **options), source


@pytest.mark.parametrize("launch", [Launch(), Launch(rank=1, ranks=2)])
def test_batches_are_the_loaders(launch: Launch) -> None:
    plain, _ = make_loader(bad=(2, 7), launch=launch)
    loader, source = make_loader(bad=(2, 7), launch=launch)
    cache = DeviceCache(loader, GEOMETRY, CPU)
    starts = (1, 0, 2, 0, 0, 0, 0)
    for epoch, start in enumerate(starts):
        found, expected = list(cache.batches(epoch, start)), list(plain.batches(epoch, start))
        assert len(found) == len(expected) == 3 - start
        for one, two in zip(found, expected, strict=True):
            for field in FIELDS:
                assert torch.equal(getattr(one, field), getattr(two, field)), field
                assert getattr(one, field).dtype == getattr(two, field).dtype, field
    assert any(bool(b.unreadable.any()) for e in range(7) for b in plain.batches(e))
    before = source.reads.value
    assert before < 9 * len(starts)
    list(cache.batches(5))
    list(cache.batches(5))
    assert source.reads.value == before, "once there, pictures are not read again"


def test_a_batch_with_a_missing_person_is_read() -> None:
    loader, source = make_loader(10)
    cache = DeviceCache(loader, GEOMETRY, CPU)
    list(cache.batches(0))
    (missing,) = set(range(10)) - set(loader.order(0)[:9].tolist())
    assert source.reads.value == 9
    list(cache.batches(1))
    expected = 3 if missing in loader.order(1)[:9] else 0
    assert source.reads.value == 9 + expected


def test_too_many_crops_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fits_device(10, GEOMETRY, CPU)
    monkeypatch.setattr(device_cache, "available_memory", lambda: 1000)
    with caplog.at_level(logging.WARNING):
        assert not fits_device(10, GEOMETRY, CPU)
    assert "data.cache=device: 10 crops" in caplog.text and "data.cache=memory" in caplog.text


def test_training_data_are_the_same_from_any_cache(tmp_path: Path) -> None:
    seen = {}
    for cache in (True, "device", "off"):
        config = make_config(data=dict(cache=cache))
        data = make_trainer(tmp_path / str(cache), config).data
        assert (data.device_cache is not None) == (cache == "device")
        steps = itertools.islice(data.crops(2), 9)
        seen[cache] = [data.prepare(crops, step).images for step, crops in steps]
        assert data.wait_seconds > 0
    for one, two, three in zip(*seen.values(), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_crops_are_the_uint8_of_the_loader() -> None:
    loader, _ = make_loader(4, batch_size=2)
    cache = DeviceCache(loader, GEOMETRY, CPU)
    assert cache.crops.dtype == torch.uint8
    width, height = GEOMETRY.crop_wh
    assert cache.crops.shape == (4, height, width, 3)
    batch = next(iter(cache.batches()))
    kept = dataclasses.replace(batch)
    np.testing.assert_array_equal(cache.crops[kept.index].numpy(), kept.crops.numpy())
