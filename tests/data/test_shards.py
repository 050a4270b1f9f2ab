"""Shards hold every picture as it was, and train as the files do they were made of."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import command

from posefabric.config import config_from_tree
from posefabric.data import shards
from posefabric.data.loaders import CropLoader
from posefabric.data.pipeline import make_geometry, open_dataset
from posefabric.data.synthetic import synthetic_people, write_coco
from posefabric.data.write_shards import write_shards
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError, PersonDataset, PosefabricError

pytest.importorskip("webdataset")

PICTURES, PER_SHARD = 14, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A COCO folder of 14 training and 5 validation pictures, and its shards of 4."""
    base = tmp_path_factory.mktemp("shards")
    skeleton = load_skeleton("coco17")
    for seed, (split, count) in enumerate((("train", PICTURES), ("val", 5))):
        people = synthetic_people(
            count=count, seed=seed, skeleton=skeleton, picture_wh=(64, 64), turn=180
        )
        write_coco(people, base / "files", split)
    counts = write_shards(options(base / "files", "coco"), base / "out", per_shard=PER_SHARD)
    assert counts["train"] == {"shards": 4, "pictures": PICTURES, "persons": PICTURES}
    assert counts["val"]["shards"] == 2
    return base / "files", base / "out"


def options(root: Path, kind: str = "shards", **more: object):
    tree = {"data": {"format": kind, "root": str(root), "input_wh": [32, 32], **more}}
    return config_from_tree(tree, origin="test").data


def opened(root: Path, kind: str = "shards") -> PersonDataset:
    return open_dataset(options(root, kind), "train")


def test_every_person_and_picture_is_as_in_the_files(folders: tuple[Path, Path]) -> None:
    files, out = folders
    plain, sharded = opened(files, "coco"), opened(out)
    assert len(plain) == len(sharded)
    again = pickle.loads(pickle.dumps(sharded.read_image))
    for one, two in zip(plain.persons, sharded.persons, strict=True):
        assert one.annotation_id == two.annotation_id
        np.testing.assert_array_equal(one.keypoints, two.keypoints)
        picture = plain.read_image(one)
        np.testing.assert_array_equal(picture, sharded.read_image(two))
        np.testing.assert_array_equal(picture, again(two))
    assert sharded.groups is not None
    assert np.bincount(sharded.groups).tolist() == [4, 4, 4, 2]
    assert sharded.groups.tolist() != sorted(sharded.groups), "pictures are spread over the shards"


def test_any_webdataset_reader_reads_them(folders: tuple[Path, Path]) -> None:
    import webdataset

    files, out = folders
    urls = [str(path) for path in sorted((out / "train").glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    samples = list(dataset)
    assert len(samples) == PICTURES
    seen = set()
    for sample in samples:
        described = json.loads(sample["json"])
        (extension,) = [key for key in sample if key in ("jpg", "png")]
        assert sample[extension] == (files / "train" / described["file_name"]).read_bytes()
        assert len(described["persons"]) == 1
        seen.add(described["file_name"])
    assert len(seen) == PICTURES


def loader(root: Path, kind: str, *, workers: int = 0, window: int = 16) -> CropLoader:
    config = options(root, kind)
    geometry = make_geometry(config, 1.5)
    return CropLoader(
        opened(root, kind), geometry, batch_size=3, seed=5, workers=workers, window=window
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_are_exact_and_go_on_anywhere(folders: tuple[Path, Path], workers: int) -> None:
    _, out = folders
    whole = loader(out, "shards", workers=workers, window=2)
    for epoch in (0, 1):
        batches = list(whole.batches(epoch))
        rows = [row for batch in batches for row in batch.index.tolist()]
        assert sorted(rows) == list(range(PICTURES))
        resumed = list(loader(out, "shards", window=2).batches(epoch, start=2))
        assert [b.index.tolist() for b in resumed] == [b.index.tolist() for b in batches[2:]]
        assert all((a.crops == b.crops).all() for a, b in zip(resumed, batches[2:], strict=True))
        # Two shards of at most 4 at a time: no third before these 8 (or 6) persons are through.
        groups = opened(out).groups
        assert groups is not None
        first = len(np.unique(groups[rows[:6]]))
        assert first == 2
    assert rows != [row for b in whole.batches(0) for row in b.index.tolist()]


def test_few_shards_train_exactly_as_files_do(folders: tuple[Path, Path]) -> None:
    files, out = folders
    pairs = zip(loader(files, "coco").batches(3), loader(out, "shards").batches(3), strict=True)
    for one, two in pairs:
        assert one.index.tolist() == two.index.tolist()
        assert (one.crops == two.crops).all()


def test_the_same_pictures_give_the_same_bytes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files, out = folders
    write_shards(options(files, "coco"), tmp_path, per_shard=PER_SHARD)
    for name in ("shard-000000.tar", "index.json"):
        assert (tmp_path / "train" / name).read_bytes() == (out / "train" / name).read_bytes()


def test_only_so_many_shards_are_open(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_OPEN", 2)
    dataset = opened(folders[1])
    for person in dataset.persons:
        dataset.read_image(person)
    reader = dataset.read_image
    assert isinstance(reader, shards.ShardPictures) and len(reader._open) == 2


def copied(out: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(out, target)
    return target


def test_two_threads_read_at_a_time(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shard each, where one may be open: none reads from what the other has closed."""
    monkeypatch.setattr(shards, "MOST_OPEN", 1)
    dataset = opened(folders[1])
    persons = [dataset.persons[i] for i in (0, -1)]
    expected = [dataset.read_image(person) for person in persons]
    at_once = os.pread

    def slow(*arguments: Any) -> bytes:
        time.sleep(0.001)
        return at_once(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(dataset.read_image, persons * 40))
    assert all(map(np.array_equal, found, expected * 40))


def test_damage_is_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = copied(folders[1], tmp_path / "out")
    tar = out / "train" / "shard-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=r"shard-000001\.tar: \d+ bytes, index\.json says"):
        opened(out)
    with tarfile.open(folders[1] / "train" / tar.name) as members:
        first = next(member for member in members if not member.name.endswith("json"))
    start, end = first.offset_data, first.offset_data + first.size
    tar.write_bytes(whole[:start] + bytes(end - start) + whole[end:])
    dataset = opened(out)
    with pytest.raises(DataError, match=r"shard-000001\.tar: \S+: not a picture"):
        for person in dataset.persons:
            dataset.read_image(person)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: a shard .* is missing"):
        opened(out)
    (out / "train" / "index.json").write_text('{"format_version": 1}')
    with pytest.raises(DataError, match=r"index\.json: damaged .* data shard"):
        opened(out)
    (out / "train" / "index.json").unlink()
    with pytest.raises(DataError, match="posefabric data shard SRC OUT"):
        opened(out)


def test_annotations_of_other_pictures_are_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = copied(folders[1], tmp_path / "out")
    path = out / "annotations" / "train.json"
    tree = json.loads(path.read_text())
    tree["images"][0]["file_name"] = "other.jpg"
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"the picture other\.jpg of annotation \d+ is in no shard"):
        opened(out)


def test_what_cannot_be_written_is_told(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out = folders
    for config, where, message in (
        (options(files, "coco"), out, "holds shards already; choose another OUT"),
        (options(files, "synthetic"), tmp_path, "posefabric data synthetic"),
        (options(tmp_path, "coco"), tmp_path / "o", "holds none of annotations/train.json"),
        (options(files, "coco", val_images="train"), tmp_path / "o", "share the folder"),
    ):
        with pytest.raises(PosefabricError, match=message):
            write_shards(config, where, per_shard=3)
    with pytest.raises(PosefabricError, match="--per-shard 0"):
        write_shards(options(files, "coco"), tmp_path / "o", per_shard=0)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(PosefabricError, match=r"pip install 'posefabric\[data\]'"):
        write_shards(options(files, "coco"), tmp_path / "o", per_shard=3)


def test_the_command(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("data", "shard", folders[0], tmp_path / "out", "--per-shard", 7)
    assert command(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "train: 2 shards, 14 pictures, 14 persons" in said and "data.format=shards" in said
    assert len(opened(tmp_path / "out")) == PICTURES
