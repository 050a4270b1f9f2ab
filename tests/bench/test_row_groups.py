"""Every group yields its rows, from what its processes answer, or says why not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from bench_parts import LITTLE, TINY, CannedProcess, FakeClock, make_bench

from posefabric.bench import (
    context,
    group_compile,
    group_evaluation,
    group_inference,
    group_loader,
    group_processes,
    group_shipped,
    group_steps,
)
from posefabric.bench.rows import Missing, Row
from posefabric.bench.subjects import PEERS
from posefabric.bench.timing import Rounds
from posefabric.structures import PosefabricError
from posefabric.train.precision import resolve_precision

SECONDS = {"ours": [1.0], "theirs": [4.0], **{peer: [2.0] for peer in PEERS}}
MODULES = (
    group_compile,
    group_steps,
    group_inference,
    group_loader,
    group_evaluation,
    group_shipped,
)


@pytest.fixture
def canned(monkeypatch) -> type[CannedProcess]:
    """All processes answer from a table; no GPU."""
    monkeypatch.setattr(context.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(group_steps, "resolve_precision", lambda wanted, device: "fp32")

    def once(target, **options):
        return CannedProcess(target, **options).ask()

    for module in MODULES:
        for name, stand_in in (("Fresh", CannedProcess), ("once", once)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    answers = {
        "own_steps": (1.0, 300),
        "compiled_steps": (2.0, 300),
        "yardstick_steps": (3.0, 1000),
        "forward_rounds": {"took": SECONDS, "precision": "fp32"},
        "loader_waits": {"wait": [0.02], "prepare": [0.1], "seconds": [1.0]},
        "workers_memory": [[100, 100], [110, 100]],
        "evaluation_rounds": {"took": SECONDS, "persons": 2},
        "oks_rounds": SECONDS,
        "exported": {},
        "shipped_rounds": {
            "mixture": [6.0],
            "compact": [3.0],
            "ours@onnxruntime": [1.0],
            "mobilenet_v2_deconv@onnxruntime": [5.0],
        },
    }
    monkeypatch.setattr(CannedProcess, "answers", answers)
    monkeypatch.setattr(CannedProcess, "made", [])
    return CannedProcess


def measured(lines) -> dict[str, float]:
    return {line.name: line.ratio.median for line in lines if isinstance(line, Row)}


def missing(lines) -> dict[str, str]:
    return {line.name: line.reason for line in lines if isinstance(line, Missing)}


def test_search_step_and_memory(canned, tmp_path) -> None:
    lines = list(group_steps.search_step(make_bench(tmp_path, quick=False)))
    assert measured(lines) == {"search_step.tiny": 3.0, "search_step.tiny.plain_path": 3.0}
    assert missing(lines) == {"search_step.tiny.gpu": context.NO_GPU}
    ours, theirs, plain = (options["config"] for _, _, options in canned.made)
    assert ours == theirs and ours.model.faithful is False
    assert (ours.model.path, plain.model.path) == ("fast", "plain")
    canned.made.clear()
    lines = list(group_steps.peak_memory(make_bench(tmp_path)))
    assert measured(lines) == {"memory.tiny": 0.3}
    assert [line.better for line in lines if isinstance(line, Row)] == ["less"]
    assert [(name, alone) for name, alone, _ in canned.made] == [
        ("own_steps", True),
        ("yardstick_steps", True),
    ]


def test_where_a_device_has_bf16_fp32_has_a_row_of_its_own(canned, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(group_steps, "resolve_precision", lambda wanted, device: "bf16")
    lines = list(group_steps.search_step(make_bench(tmp_path, quick=False)))
    names = ["search_step.tiny", "search_step.tiny.plain_path", "search_step.tiny.fp32"]
    assert list(measured(lines)) == names
    used = [line.conditions["precision"] for line in lines if isinstance(line, Row)]
    assert used == ["bf16", "bf16", "fp32"]
    asked = [options["config"].search.precision for _, _, options in canned.made]
    assert sorted(asked) == ["auto", "auto", "auto", "fp32"]
    assert list(measured(group_steps.search_step(make_bench(tmp_path)))) == names[:1], "quick"


def test_a_gpu_has_rows_of_its_own(canned, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(context.torch.cuda, "is_available", lambda: True)
    lines = list(group_steps.search_step(make_bench(tmp_path, quick=False)))
    names = ["search_step.tiny", "search_step.tiny.plain_path", "search_step.tiny.gpu"]
    assert list(measured(lines)) == names
    assert [options["device"] for _, _, options in canned.made] == ["cpu"] * 3 + ["cuda"] * 2


def test_compile(canned, tmp_path) -> None:
    lines = list(group_compile.compiled_path(make_bench(tmp_path, quick=False)))
    assert measured(lines) == {
        "compile.tiny": 0.5,
        "compile.tiny.to_plain": 0.5,
        "compile.tiny.first_step": 2.0,
    }
    paths = [options["config"].model.path for _, _, options in canned.made]
    assert paths == ["compiled", "fast", "plain"]
    used = {line.conditions["precision"] for line in lines if isinstance(line, Row)}
    assert used == {resolve_precision("auto", torch.device("cpu"))}
    quick = list(group_compile.compiled_path(make_bench(tmp_path)))
    assert missing(quick) == {"compile.tiny": group_compile.QUICK_LEAVES_OUT}
    effort = dataclasses.replace(LITTLE, seconds=group_compile.SECONDS - 1)
    late = list(group_compile.compiled_path(make_bench(tmp_path, quick=False, effort=effort)))
    assert "were used up before (try --only compile)" in missing(late)["compile.tiny"]


def test_inference_and_peers_in_eager(canned, tmp_path) -> None:
    bench = make_bench(tmp_path)
    assert measured(group_inference.inference(bench)) == {"inference.tiny": 4.0}
    found = measured(group_inference.peers_in_eager(bench))
    assert found == {
        **{f"peers.inference.tiny.{peer}": 2.0 for peer in PEERS},
        # Every training is of the package's own loop.
        **{f"peers.search_step.tiny.{peer}": 1.0 for peer in PEERS},
    }


def test_loader(canned, tmp_path) -> None:
    bench = make_bench(tmp_path)
    found = measured(group_loader.waiting(bench))
    names = [f"loader.wait_{s}px_workers{w}" for s in (128, 256) for w in (0, 1, 2)]
    assert found == dict.fromkeys(names, 0.02)
    configs = [options["configs"] for _, _, options in canned.made]
    assert [c.data.input_wh for some in configs for c in some.values()] == (
        [(128, 128)] * 3 + [(256, 256)] * 3
    )
    assert [c.data.workers for c in configs[0].values()] == [0, 1, 2]
    assert measured(group_loader.memory(bench)) == {"loader.memory_workers2": 1.05}


def test_evaluation(canned, tmp_path, monkeypatch) -> None:
    bench = make_bench(tmp_path)
    assert measured(group_evaluation.images(bench)) == {"evaluation.images.tiny": 4.0}
    assert measured(group_evaluation.oks(bench)) == {"evaluation.oks": 4.0}
    monkeypatch.setattr(group_evaluation.importlib.util, "find_spec", lambda name: None)
    (line,) = group_evaluation.oks(bench)
    assert line == Missing("evaluation.oks", "pycocotools is not installed")


def test_shipped_and_its_peers(canned, tmp_path, monkeypatch) -> None:
    find = group_shipped.importlib.util.find_spec
    monkeypatch.setattr(
        group_shipped.importlib.util,
        "find_spec",
        lambda name: None if name == "openvino" else find(name),
    )
    bench = make_bench(tmp_path)
    lines = list(group_shipped.shipped(bench, subject=TINY))
    assert measured(lines) == {
        f"shipped.{runtime}.tiny.batch{batch}": ratio
        for batch in (1, 8)
        for runtime, ratio in (("eager", 2.0), ("onnxruntime", 6.0))
    }
    assert missing(lines) == {"shipped.openvino.tiny": "openvino is not installed"}
    lines = list(group_shipped.peers_in_runtimes(bench, subject=TINY))
    assert measured(lines) == {
        f"peers.onnxruntime.tiny.mobilenet_v2_deconv.batch{batch}": 5.0 for batch in (1, 8)
    }
    left_out = missing(lines)
    assert "--quick" in left_out["peers.onnxruntime.tiny.hrnet_w32"]
    assert len([name for name in left_out if ".openvino." in name]) == len(PEERS)


def test_a_failure_is_a_row_and_not_the_end(canned, tmp_path, monkeypatch) -> None:
    failed = {**canned.answers, "yardstick_steps": PosefabricError("killed")}
    monkeypatch.setattr(canned, "answers", failed)
    lines = list(group_steps.search_step(make_bench(tmp_path, subjects=[TINY, TINY])))
    assert [line.reason for line in lines if isinstance(line, Missing)] == [
        "failed: killed",
        context.NO_GPU,
    ] * 2


def test_nothing_begins_when_the_time_is_up(canned, tmp_path) -> None:
    clock = FakeClock()
    bench = make_bench(tmp_path, clock=clock)
    assert bench.within(Rounds(seconds=9.0)) == Rounds(seconds=9.0)
    clock.now = bench.effort.seconds - 0.5
    assert bench.left() == 0.5 and bench.within(bench.effort.steps).seconds == 0.5
    parts = [
        (group_steps.search_step, 2),
        (group_steps.peak_memory, 2),
        (group_inference.inference, 2),
        (group_inference.peers_in_eager, 6),
        (group_loader.waiting, 6),
        (group_loader.memory, 1),
        (group_evaluation.images, 1),
        (group_evaluation.oks, 1),
        (group_shipped.shipped, 2),
        (group_shipped.peers_in_runtimes, 6),
        (group_processes.processes, 1),
    ]
    for part, count in parts:
        lines = list(part(bench))
        assert len(lines) == count and all(isinstance(line, Missing) for line in lines), part
    assert not canned.made
    (line,) = group_loader.memory(bench)
    assert isinstance(line, Missing) and "--only loader" in line.reason


def write_metrics(folder: Path, seconds: dict[int, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"step": step, "images_per_s": step * group_processes.BATCH / value}
        for step, value in seconds.items()
    ]
    lines = [json.dumps(record) for record in [*records, {"step": 4, "val_AP": 0.1}]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_trainings_own_record_tells_the_seconds_of_its_steps(tmp_path) -> None:
    write_metrics(tmp_path, {1: 10.0, 2: 12.0, 3: 13.0, 4: 15.0})
    assert math.isclose(group_processes.step_seconds(tmp_path, skip=2), 1.5)
    with pytest.raises(PosefabricError, match="no record of steps"):
        group_processes.step_seconds(tmp_path, skip=4)


def test_two_processes_against_two_threads(tmp_path, monkeypatch) -> None:
    launched: list[tuple[list[str], int]] = []

    def launch(words, *, threads):
        launched.append((words, threads))
        folder = Path(words[-1])
        together = "torch.distributed.run" in words
        step = (2.0 if "sync_norms=false" in words else 3.0) if together else 1.8
        write_metrics(folder, {n: n * step for n in range(1, 5)})

    monkeypatch.setattr(group_processes, "launch", launch)
    monkeypatch.setattr(group_processes, "impossible", lambda name: None)
    bench = make_bench(tmp_path)
    assert measured(group_processes.processes(bench)) == {
        "processes.gloo2.tiny": pytest.approx(0.6),
        "processes.gloo2.tiny.own_norms": pytest.approx(0.9),
    }
    (two, own, one), threads = zip(*launched, strict=True)
    assert threads == (1, 1, 2)
    assert "--nproc-per-node=2" in two and "threads=1" in two and "threads=2" in one
    assert "sync_norms=true" in two and "sync_norms=true" in one
    same = [set(words) - {"threads=1", "threads=2", words[-1]} for words in (one, two)]
    assert same[0] < same[1] and "search" in same[0]
    assert set(two) ^ set(own) == {"sync_norms=true", "sync_norms=false", two[-1], own[-1]}
    assert "search.strategy=synchronous" in two, "steps, and no rounds in which options are tried"
    assert not list(tmp_path.glob("processes-*"))


def test_two_processes_need_the_code_and_the_cores(monkeypatch) -> None:
    spec = group_processes.importlib.util
    monkeypatch.setattr(spec, "find_spec", lambda name: None)
    line = group_processes.impossible("processes.x")
    assert line is not None and "one process only" in line.reason
    monkeypatch.setattr(spec, "find_spec", lambda name: object())
    monkeypatch.setattr(group_processes, "usable_cores", lambda: 1)
    line = group_processes.impossible("processes.x")
    assert line is not None and "needs 2 cores" in line.reason
    monkeypatch.setattr(group_processes, "usable_cores", lambda: 2)
    assert group_processes.impossible("processes.x") is None


def test_a_command_that_fails_is_told_by_its_last_lines() -> None:
    words = ["python3", "-c", "import sys; print('first', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(PosefabricError, match="exit code 3: first"):
        group_processes.launch(words, threads=1)
