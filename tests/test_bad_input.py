"""Bad input ends, or is skipped and counted, with one message: where it is and what to change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_end_to_end import TINY, command

from posefabric.run import RunFolder
from posefabric.skeletons import shipped_skeletons

FROM_DISK = [option for option in TINY if "synthetic" not in option] + ["data.format=coco"]


@pytest.fixture
def people(tmp_path: Path, monkeypatch) -> Path:
    """A small COCO-format data set on disk."""
    folder = tmp_path / "people"
    assert command(monkeypatch, "data", "synthetic", folder, "--train", 16, "--val", 4) == 0
    return folder


def search(monkeypatch, people: Path, *options: str) -> int:
    out = people.parent / "run"
    arguments = ["search", "demo", *FROM_DISK, f"data.root={people}", *options]
    return command(monkeypatch, *arguments, "--out", out)


def truncate_one(people: Path) -> Path:
    picture = sorted((people / "train").iterdir())[3]
    picture.write_bytes(picture.read_bytes()[:1500])
    return picture


def test_a_truncated_jpeg_ends_the_search_and_is_named(people, monkeypatch, capsys) -> None:
    picture = truncate_one(people)
    assert search(monkeypatch, people) == 1
    message = capsys.readouterr().err
    assert picture.name in message and "truncated" in message and "Traceback" not in message
    assert RunFolder.open(people.parent / "run").state == "failed"


def test_a_truncated_jpeg_can_be_skipped_and_is_counted(people, monkeypatch) -> None:
    truncate_one(people)
    assert search(monkeypatch, people, "data.on_bad_image=skip") == 0
    assert (
        RunFolder.open(people.parent / "run").read_json("evaluation.json")["unreadable_train_files"]
        == 1
    )


def test_a_missing_picture_is_named(people, monkeypatch, capsys) -> None:
    picture = sorted((people / "train").iterdir())[3]
    picture.unlink()
    assert search(monkeypatch, people) == 1
    assert picture.name in capsys.readouterr().err


def edit(file: Path, change) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def test_sixteen_keypoints_instead_of_seventeen(people, monkeypatch, capsys) -> None:
    def shorten(tree: dict) -> None:
        tree["annotations"][2]["keypoints"] = tree["annotations"][2]["keypoints"][:48]

    edit(people / "annotations" / "train.json", shorten)
    assert search(monkeypatch, people) == 1
    message = capsys.readouterr().err
    assert "annotation 3" in message and "48" in message and "51" in message


def test_no_annotations(people, monkeypatch, capsys) -> None:
    edit(people / "annotations" / "train.json", lambda tree: tree["annotations"].clear())
    assert search(monkeypatch, people) == 1
    assert "train.json" in capsys.readouterr().err


def test_a_skeleton_without_flip_pairs(people, monkeypatch, capsys) -> None:
    tree = yaml.safe_load(shipped_skeletons()["coco17"].read_text())
    del tree["flip_pairs"]
    skeleton = people.parent / "mine.yaml"
    skeleton.write_text(yaml.safe_dump(tree))
    assert search(monkeypatch, people, f"data.skeleton={skeleton}") == 1
    message = capsys.readouterr().err
    assert "mine.yaml" in message and "flip_pairs: []" in message


def test_a_loss_that_is_not_finite_stops_with_the_first_bad_module(
    people, monkeypatch, capsys
) -> None:
    options = ["search.learning_rate=1.0e+30", "search.max_bad_steps=0", "search.schedule=constant"]
    assert search(monkeypatch, people, *options, "search.epochs=8") == 1
    message = capsys.readouterr().err
    assert "not finite" in message and "first in" in message and "learning_rate" in message


def test_a_damaged_run_folder(people, monkeypatch, capsys) -> None:
    folder = people.parent / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{")
    assert command(monkeypatch, "eval", folder) == 1
    assert "run.json" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_a_run_that_resumes(tmp_path: Path, monkeypatch) -> None:
    """A limit on file size stands for the disk: the kernel refuses the write alike."""
    out = tmp_path / "run"
    script = "import resource, sys; from posefabric.cli import main; "
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); main()"
    options = [*TINY, "search.checkpoint_every=1", "--out", str(out)]
    limited = subprocess.run(
        [sys.executable, "-c", script + limit, "search", "demo", *options],
        capture_output=True,
        text=True,
    )
    assert limited.returncode == 1
    assert "disk is full" in limited.stderr and "Traceback" not in limited.stderr
    assert RunFolder.open(out).state == "failed"
    assert command(monkeypatch, "search", "--out", out, "--resume") == 0
    assert RunFolder.open(out).state == "finished"
