"""Whole studies in seconds: made, killed, resumed, measured, told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_studies
from networks import command
from tiny_studies import SIMPLE, write_study

from posefabric.run import RunFolder
from posefabric.study.compute import total_cost

ARMS = {
    "searched": None,
    "random": {"steps": "train", "overrides": ["search.strategy=random"], "compute": "both"},
    "simple": {"steps": "train", "overrides": SIMPLE},
    "mixture": {"steps": "search", "overrides": ["model.parts=learned:2"]},
}
CLAIMS = [{"claim": "Searching helps", "better": "searched", "than": ["random", "simple"]}]


def rows_of(out: Path) -> dict[str, dict]:
    lines = (out / "rows.jsonl").read_text().splitlines()
    return {row["arm"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("study")
    file = write_study(folder / "s.yaml", arms=ARMS, claims=CLAIMS)
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "study", file, "threads=1", "--out", folder / "out") == 0
    return file, folder / "out"


@pytest.mark.slow
def test_a_study_is_told_whole(made: tuple[Path, Path]) -> None:
    _, out = made
    rows = rows_of(out)
    assert set(rows) == {"searched", "random", "random+compute", "simple", "mixture"}
    for row in rows.values():
        with np.load(out / row["counts"]) as counts:
            share = counts["found"].sum() / counts["counted"].sum()
            assert not (counts["found"] & ~counts["counted"]).any()
        assert row["PCK"] == pytest.approx(share, abs=1e-6) and row["split"] == "val"
        run = RunFolder.open(out / row["folder"])
        assert run.read_json("evaluation.json")["pck"]["PCK"] == pytest.approx(share)
        assert row["train_seconds"] > 0 and row["train_cpu_seconds"] > 0
        assert 0 < row["head_macs"] < row["macs"] and row["params"] > 0
        assert row["machine"]["threads"] == 1 and row["state"] == "finished"
    learned = RunFolder.open(out / rows["mixture"]["folder"]).config.model.parts
    assert isinstance(learned, dict) and len(learned) == 2, "parts are kept as they were learned"
    phases = {arm: [p["phase"] for p in row["phases"]] for arm, row in rows.items()}
    assert phases["searched"] == ["search", "finetune"] and phases["mixture"] == ["search"]
    assert phases["random"] == phases["simple"] == ["finetune"]
    assert rows["simple"]["commands"][0].startswith("posefabric train ")
    text = (out / "results.md").read_text()
    assert "### Equal epochs of final training" in text and "### Equal total compute" in text
    assert "**Searching helps.**" in text and "pareto-latency.png" in text
    (verdict,) = json.loads((out / "verdicts.json").read_text())
    assert set(verdict) == {"claim", "effect", "interval", "p", "holds"}
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_equal_compute_is_equal(made: tuple[Path, Path]) -> None:
    rows = rows_of(made[1])
    cost = {arm: total_cost(row["phases"]) for arm, row in rows.items()}
    one_step = 4 * rows["random+compute"]["phases"][0]["macs"]
    assert abs(cost["random+compute"] - cost["searched"]) <= one_step / 2
    assert cost["random"] < cost["searched"]
    assert rows["random+compute"]["compute"] == f"of {rows['searched']['hash']}"


@pytest.mark.slow
def test_a_random_architecture_trains_from_the_start(made: tuple[Path, Path]) -> None:
    rows = rows_of(made[1])
    run = RunFolder.open(made[1] / rows["random"]["folder"])
    assert run.kind == "train" and run.parent is not None and run.parent.kind == "derive"
    drawn = run.parent.parent
    assert drawn is not None and drawn.kind == "search" and not drawn.metrics()
    weights = json.loads(drawn.architecture_path.read_text())
    assert weights != json.loads(run.architecture_path.read_text())


@pytest.mark.slow
def test_a_finished_study_writes_tables_only(made, monkeypatch, capsys) -> None:
    file, out = made
    before = (out / "rows.jsonl").read_bytes()
    (out / "results.md").unlink()
    # Without overrides: the folder remembers.
    assert command(monkeypatch, "study", file, "--out", out, "--table") == 0
    assert (out / "results.md").is_file() and (out / "rows.jsonl").read_bytes() == before
    monkeypatch.setattr("posefabric.study.execute.run_arm", lambda *a, **k: pytest.fail("made"))
    assert command(monkeypatch, "study", file, "--out", out) == 0
    assert "5 of 5 runs are finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_the_test_split_is_read_once(made, monkeypatch, capsys, tmp_path: Path) -> None:
    file, out = made
    more = write_study(tmp_path / "more.yaml", arms={**ARMS, "late": {"steps": "search"}})
    assert command(monkeypatch, "study", more, "--table", "--final", "--out", tmp_path / "o") == 1
    assert "not finished" in capsys.readouterr().err
    assert command(monkeypatch, "study", file, "--final", "--out", out) == 0
    assert "test persons" in (out / "results.md").read_text()
    final = (out / "final.jsonl").read_bytes()
    assert command(monkeypatch, "study", file, "--final", "--out", out) == 0
    assert (out / "final.jsonl").read_bytes() == final
    fewer = {name: ARMS[name] for name in ("searched", "simple")}
    other = write_study(tmp_path / "fewer.yaml", arms=fewer)
    assert command(monkeypatch, "study", other, "--final", "--out", out) == 1
    assert "another set of runs" in capsys.readouterr().err


def start(file: Path, out: Path, *options: str) -> subprocess.Popen:
    root = Path(tiny_studies.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    line = [sys.executable, tiny_studies.__file__, str(file), str(out), *options]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for_steps(out: Path, count: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        logs = list(out.glob("runs/*/metrics.jsonl"))
        if any(log.read_bytes().count(b"\n") >= count for log in logs):
            return
        time.sleep(0.05)
    raise AssertionError("no training began")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_goes_on_with_the_very_run(tmp_path: Path, number: int) -> None:
    arms = {"mixture": {"steps": "search", "overrides": ["search.epochs=20"]}}
    file = write_study(tmp_path / "s.yaml", arms=arms)
    process = start(file, tmp_path / "out")
    wait_for_steps(tmp_path / "out", 5)
    process.send_signal(number)
    process.wait(timeout=600)
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    again = start(file, tmp_path / "out")
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0
    (row,) = rows_of(tmp_path / "out").values()
    assert row["phases"][0]["steps"] == 40
    run = RunFolder.open(tmp_path / "out" / row["folder"])
    assert [r["step"] for r in run.metrics() if "loss" in r] == list(range(1, 41))
    assert "search  0/40" not in output, "it began where it was stopped"


@pytest.mark.slow
def test_side_by_side(tmp_path: Path) -> None:
    missing = ["model.network=hrnet", "model.backbone=hrnet_w2", "model.weights=hub"]
    arms = {
        "mixture": {"steps": "search"},
        "broken": {"steps": "train", "overrides": [*missing, "model.weights=absent.pt"]},
        "simple": {"steps": "train", "overrides": SIMPLE},
    }
    file = write_study(tmp_path / "s.yaml", arms=arms)
    process = start(file, tmp_path / "out", "2")
    process.communicate(timeout=600)
    assert process.returncode == 1
    rows = rows_of(tmp_path / "out")
    assert {arm: row["state"] for arm, row in rows.items()} == {
        "mixture": "finished", "broken": "failed", "simple": "finished",
    }  # fmt: skip
    assert "absent.pt" in rows["broken"]["error"]
    assert "Not complete: 2 of 3" in (tmp_path / "out" / "results.md").read_text()
