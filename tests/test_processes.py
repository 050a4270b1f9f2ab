"""The commands under torchrun: one run folder, one evaluation, one message when a rank dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from networks import command

import posefabric
from posefabric.run import RunFolder

SMALL = [
    "data.format=synthetic",
    "data.input_wh=[64,64]",
    "data.workers=0",
    "data.synthetic_train=16",
    "data.synthetic_val=7",
    "device=cpu",
    "model.backbone=test_efficientnet",
    "model.weights=none",
    "model.channel_factor=2",
    "model.parts=1",
    "search.batch_size=4",
    "search.worth_persons=4",
    "search.learning_rate=1e-4",
    "finetune.batch_size=4",
    "finetune.epochs=0.5",
]


def torchrun(*arguments: object, ranks: int = 2) -> list[str]:
    launcher = ["torch.distributed.run", f"--nproc-per-node={ranks}"]
    launcher += ["--standalone", "-m", "posefabric"]
    return [sys.executable, "-m", *launcher, *map(str, arguments)]


def environment() -> dict[str, str]:
    root = str(Path(posefabric.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> str:
    done = subprocess.run(
        torchrun(*arguments), env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_search_derive_train_and_eval_share_one_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    said = run("search", *SMALL, "search.epochs=1", "--out", two)
    assert said.count("next: posefabric derive") == 1, "one process speaks"
    assert command(monkeypatch, "search", *SMALL, "search.epochs=1", "--out", one) == 0
    found, expected = (RunFolder.open(path).metrics() for path in (two, one))
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for a, b in zip(found, expected, strict=True):
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    evaluations = [json.loads((path / "evaluation.json").read_text()) for path in (two, one)]
    assert [e["predicted"] for e in evaluations] == [7, 7]
    assert [e["train_processes"] for e in evaluations] == [2, 1]
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    said = run("derive", two, "--finetune")
    assert said.count("derived:") == 1
    assert sorted(RunFolder.open(two).descendants()) == ["01-derive", "01-derive/01-train"]
    assert {r.state for r in RunFolder.open(two).descendants().values()} == {"finished"}
    run("train", two, "finetune.epochs=0.25")
    assert len(RunFolder.open(two).descendants()) == 3
    said = run("eval", two)
    assert said.count("written:") == 1
    child = RunFolder.open(two).resolve("auto")
    measured = json.loads((child.path / "evaluation-val.json").read_text())
    assert command(monkeypatch, "eval", two) == 0
    again = json.loads((child.path / "evaluation-val.json").read_text())
    for key in ("pck", "oks", "predicted"):
        assert measured[key] == again[key]


@pytest.mark.slow
def test_a_killed_rank_ends_the_command_with_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        torchrun("search", *SMALL, "search.epochs=1000", "--out", folder),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.2)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    second = sorted(map(int, children.stdout.split()))[1]
    os.kill(second, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: rank 0 of 2 stops: rank 1 (" in stderr
    assert f"process {second}" in stderr


def test_commands_of_one_process_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert command(monkeypatch, "export", "runs/mine") == 1
    said = capsys.readouterr().err
    assert "posefabric export: runs in one process" in said and "derive, eval" in said
