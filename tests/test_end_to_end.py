"""The whole line on few synthetic people: every command on one run, as a user would."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from posefabric import cli
from posefabric.run import RunFolder
from posefabric.skeletons import shipped_skeletons
from posefabric.space.architecture import Architecture

TINY = [
    "data.input_wh=[64,64]",
    "data.synthetic_train=16",
    "data.synthetic_val=8",
    "model.backbone=test_efficientnet",
    "model.weights=none",
    "model.channel_factor=2",
    "search.epochs=2",
    "search.batch_size=8",
    "search.precision=fp32",
    "search.worth_persons=8",
    "finetune.epochs=2",
    "finetune.batch_size=8",
    "finetune.precision=fp32",
]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the console script in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["posefabric", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "demo", *TINY, "--out", out) == 0
    return out


def test_the_demo_leaves_everything_it_promises(demo: Path) -> None:
    run = RunFolder.open(demo)
    assert run.state == "finished"
    compact = run.resolve("compact")
    assert compact.kind == "train" and compact.parent is not None
    whole = Architecture.load(run.architecture_path)
    kept = Architecture.load(compact.architecture_path)
    assert len(kept.parts) == len(whole.parts) == 3
    assert all(
        choice.operation != "zero"
        for p in kept.parts
        for c in p.cells
        for e in c.edges
        for choice in e.choices
    )
    page = run.report_path.read_text()
    # Pictures are inside as base64, which may spell anything.
    words = re.sub(r"data:[^\"']*", "", page)
    assert "<img" in page and "http" not in words.replace("http://www.w3.org", "")
    assert run.onnx_path.stat().st_size > 10_000
    sheets = {path.stem for path in run.overlays_dir.glob("*.png")}
    assert sheets == {"validation_persons", "best", "worst"}
    overlays = list((demo / "predictions" / "overlays").glob("*.png"))
    assert len(overlays) == 8 and cv2.imread(str(overlays[0])) is not None
    predictions = json.loads((demo / "predictions" / "predictions.json").read_text())
    assert len(predictions) == 8 and len(predictions[0]["keypoints"]) == 17 * 3
    steps = [record["step"] for record in run.metrics() if "loss" in record]
    assert steps == [1, 2, 3, 4]


def test_a_finished_demo_is_not_overwritten(demo: Path, monkeypatch, capsys) -> None:
    assert command(monkeypatch, "demo", *TINY, "--out", demo) == 1
    assert "holds a finished demo" in capsys.readouterr().err


def test_eval_says_which_network_and_which_boxes(demo: Path, monkeypatch, capsys) -> None:
    assert command(monkeypatch, "eval", demo) == 0
    compact = capsys.readouterr().out
    assert command(monkeypatch, "eval", demo, "--which", "mixture", "--no-flip") == 0
    mixture = capsys.readouterr().out
    assert "01-train" in compact and "ground truth" in compact and "flip test: yes" in compact
    assert "search" in mixture and "flip test: no" in mixture
    assert (demo / "evaluation-val.json").is_file()


def test_compact_and_onnx_predict_the_same(demo: Path, tmp_path: Path, monkeypatch) -> None:
    pictures = demo / "pictures" / "new"
    assert command(monkeypatch, "predict", demo, pictures, "--out", tmp_path / "torch") == 0
    model = demo / "model.onnx"
    assert command(monkeypatch, "predict", model, pictures, "--out", tmp_path / "onnx") == 0
    found = [
        np.array(
            [
                row["keypoints"]
                for row in json.loads((tmp_path / kind / "predictions.json").read_text())
            ]
        )
        for kind in ("torch", "onnx")
    ]
    assert found[0].shape == (8, 51)
    # One heatmap pixel may tie; all others agree far below a pixel.
    assert np.mean(np.abs(found[0] - found[1]) < 0.05) > 0.99


def test_no_readable_picture_is_an_error(demo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    model = demo / "model.onnx"
    assert command(monkeypatch, "predict", model, tmp_path, "--out", tmp_path / "found") == 1
    assert "none of the pictures" in capsys.readouterr().err


def test_derive_again_with_other_options_makes_another_child(
    demo: Path, monkeypatch, capsys
) -> None:
    options = ["derive.operations_kept=1", "derive.sources_kept=1"]
    assert command(monkeypatch, "derive", demo, *options) == 0
    assert "discretize" in capsys.readouterr().out
    child = RunFolder.open(demo).children()[-1]
    graph = Architecture.load(child.architecture_path)
    assert all(len(c.sources) <= 1 for part in graph.parts for c in part.cells)


def test_show_draws_and_lists(demo: Path, monkeypatch, capsys) -> None:
    assert command(monkeypatch, "show", demo, "--no-report") == 0
    assert "layer" in capsys.readouterr().out
    assert (demo / "architecture.png").is_file()
    assert command(monkeypatch, "show", "configs") == 0
    assert "demo" in capsys.readouterr().out


def test_data_commands(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "people"
    made = ["data", "synthetic", folder, "--skeleton", "lsp14", "--train", 6, "--val", 3]
    assert command(monkeypatch, *made) == 0
    sheets = tmp_path / "sheets"
    assert command(monkeypatch, "data", "check", folder, "--out", sheets) == 0
    said = capsys.readouterr().out
    assert "0 errors" in said
    assert {path.name for path in sheets.glob("*.png")} == {"train.png", "val.png"}
    next((folder / "val").iterdir()).unlink()
    assert command(monkeypatch, "data", "check", folder) == 1
    assert "ERROR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "lspet_lite0_p3", "--out", "x"], "data.root=DIR"),
        (["search", "lspet_lite0_p4", "--out", "x"], "did you mean lspet_lite0_p3"),
        (["search", "demo", "serch.epochs=1", "--out", "x"], "did you mean search"),
        (["search", "demo", "search.epochs=many", "--out", "x"], "search.epochs"),
        (["eval", "nowhere"], "nowhere"),
        (["search", "demo", "data.skeleton=coco71", "--out", "x"], "coco17"),
        (["search", "demo", "model.parts=4", "--out", "x"], "groupings for P = 1, 3, 5, 8"),
        (["search", "demo", "model.backbone=resnet18", "--out", "x"], "model.weights=embedded"),
    ],
)
def test_wrong_words_get_one_message(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["data.synthetic_train=16", "data.synthetic_val=4"] if "demo" in arguments else []
    assert command(monkeypatch, *arguments[:2], *small, *arguments[2:]) == 1
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_a_run_keeps_the_users_own_skeleton(tmp_path: Path, monkeypatch) -> None:
    skeleton = tmp_path / "mine.yaml"
    skeleton.write_bytes(shipped_skeletons()["quadruped"].read_bytes())
    options = [*TINY, f"data.skeleton={skeleton}", "model.parts=1", "search.epochs=1"]
    out = tmp_path / "run"
    assert command(monkeypatch, "search", "demo", *options, "--out", out) == 0
    assert command(monkeypatch, "search", "demo", *options, "--out", out, "--resume") == 0
    skeleton.unlink()
    assert command(monkeypatch, "derive", out) == 0
    assert command(monkeypatch, "eval", out) == 0
    assert RunFolder.open(out).children()[0].read_bytes("skeleton.yaml")
