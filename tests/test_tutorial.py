"""docs/tutorial.md to the letter: its files, its commands, on fewer pictures and steps."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import cv2
import onnxruntime
import pytest
import yaml

from posefabric import cli
from posefabric.run import RunFolder
from posefabric.space.architecture import Architecture

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEWER = {"1200": "40", "150": "8"}
SMALLER = {
    "data": {"input_wh": [64, 64]},
    "model": {"backbone": "test_efficientnet", "weights": "none", "channel_factor": 2},
    "search": {"epochs": 1, "batch_size": 8, "worth_persons": 8},
    "finetune": {"epochs": 1, "batch_size": 8},
}


def blocks(language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(PAGE.read_text()) if kind == language]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    assert not stop.value.code, shlex.join(words)


def test_the_tutorial_does_what_it_says(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    skeleton, recipe = blocks("yaml")
    Path("dog.yaml").write_text(skeleton)
    tree = yaml.safe_load(recipe)
    for section, changes in SMALLER.items():
        tree[section].update(changes)
    Path("dogs.yaml").write_text(yaml.safe_dump(tree))
    commands = [shlex.split(line) for text in blocks("bash") for line in text.splitlines()]
    assert [words[1] for words in commands] == [
        "data", "data", "data", "search", "derive", "eval", "show", "export", "predict",
    ]  # fmt: skip
    said = {}
    for words in commands:
        run([FEWER.get(word, word) for word in words], monkeypatch)
        said[" ".join(words[1:3])] = capsys.readouterr().out
    assert "no problems" in said["data check"].lower() or "0 errors" in said["data check"]
    assert list(Path("sheets").glob("*.png"))
    assert cv2.imread("parts/parts.png") is not None
    searched = RunFolder.open("runs/dogs")
    parts = {p.name: p.keypoints for p in Architecture.load(searched.architecture_path).parts}
    assert set().union(*parts.values()) == set(range(17)) and len(parts) > 1
    assert searched.resolve().kind == "train" and searched.resolve().state == "finished"
    assert "fallback" in said["eval runs/dogs"].lower()
    assert searched.report_path.is_file()
    session = onnxruntime.InferenceSession("runs/dogs/model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["skeleton"])["name"] == "dog"
    found = json.loads(Path("found/predictions.json").read_text())
    assert len(found) == 8 and {len(person["keypoints"]) for person in found} == {3 * 17}
    assert len(list(Path("found/overlays").glob("*"))) == 8
