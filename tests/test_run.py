import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import posefabric
from posefabric import __version__
from posefabric.config import Config, with_overrides
from posefabric.run import FORMAT_VERSION, RunFolder, find_runs, write_atomic
from posefabric.run import files as files_module
from posefabric.run import folder as folder_module
from posefabric.run.environment import git_commit
from posefabric.structures import PosefabricError


@pytest.fixture(autouse=True)
def no_board(request, monkeypatch):
    """TensorBoard starts a thread a run; only the tests about it need one."""
    if "board" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def make(path, kind="search", **options):
    return RunFolder.create(path, config=Config(), kind=kind, **options)


def finish(run):
    run.set_state("finished")
    return run


@pytest.fixture
def board():
    return pytest.importorskip("tensorboard")


# Creating and taking up


def test_create_writes_what_open_reads(tmp_path):
    config = with_overrides(Config(), ["seed=7", "data.input_wh=[96,128]", "search.epochs=0.5"])
    made = RunFolder.create(tmp_path / "a" / "run", config=config, kind="search")
    run = RunFolder.open(tmp_path / "a" / "run")
    assert run.config == config and run.kind == "search" and run.created == made.created
    assert run.parent is None and run.state == "running" and run.children() == []
    header = json.loads((run.path / "run.json").read_text())
    assert header["posefabric"] == __version__ and header["format_version"] == FORMAT_VERSION
    assert Path(sys.argv[0]).name in header["command"]
    assert yaml.safe_load((run.path / "config.yaml").read_text())["data"]["input_wh"] == [96, 128]


def test_environment_names_hardware_and_versions(tmp_path):
    environment = make(tmp_path / "run").read_json("environment.json")
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["packages"]["numpy"] == np.__version__
    assert environment["cores"] == os.cpu_count()
    assert environment["python"] == sys.version.split()[0]
    if Path("/proc/meminfo").exists():
        kilobytes = int(Path("/proc/meminfo").read_text().split()[1])
        assert environment["memory_bytes"] == kilobytes * 1024
        assert environment["cpu"]


def test_module_does_not_import_torch():
    code = "import sys, posefabric.run; sys.exit('torch' in sys.modules)"
    root = str(Path(posefabric.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_git_commit_is_of_the_checkout_only(tmp_path, monkeypatch):
    package = tmp_path / "posefabric"
    package.mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    monkeypatch.setattr(posefabric, "__file__", str(package / "__init__.py"))
    assert git_commit() is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    answer = subprocess.run(
        [*git, "log", "--format=%H"], capture_output=True, text=True, check=True
    )
    assert git_commit() == answer.stdout.strip()
    # Installed into an environment that lies in someone else's repository.
    inner = tmp_path / "venv" / "posefabric"
    inner.mkdir(parents=True)
    monkeypatch.setattr(posefabric, "__file__", str(inner / "__init__.py"))
    assert git_commit() is None


def test_an_existing_run_is_not_overwritten(tmp_path):
    make(tmp_path / "run")
    with pytest.raises(
        PosefabricError, match=r"already holds a run; choose another --out.*--resume"
    ):
        make(tmp_path / "run")


def test_other_files_are_never_touched(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: 1")
    with pytest.raises(PosefabricError, match=r"holds other files \(config.yaml.*choose another"):
        make(tmp_path, exist_ok=True)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1"
    with pytest.raises(PosefabricError, match="is a file, not a folder"):
        make(tmp_path / "config.yaml")
    with pytest.raises(PosefabricError, match=r"Not a directory|is a file"):
        make(tmp_path / "config.yaml" / "run")


def test_an_empty_folder_and_a_killed_creation_are_used(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    for alive in range(3):
        writes = iter([write_atomic] * alive + [killed])
        monkeypatch.setattr(folder_module, "write_atomic", lambda p, d, w=writes: next(w)(p, d))
        with pytest.raises(Killed):
            make(tmp_path / "killed")
        assert find_runs(tmp_path / "killed") == []
        monkeypatch.undo()
    assert make(tmp_path / "killed").config == Config()


def test_exist_ok_takes_up_the_same_run_only(tmp_path):
    make(tmp_path / "run").set_state("stopped", step=5)
    (tmp_path / "run" / ".weights.1.tmp").write_text("left by a killed writer")
    moved = with_overrides(
        Config(),
        ["device=cpu", "data.workers=0", "data.root=elsewhere", "search.checkpoint_every=7"],
    )
    run = RunFolder.create(tmp_path / "run", config=moved, kind="search", exist_ok=True)
    assert run.state == "running" and run.info == {"step": 5}
    assert RunFolder.open(run.path).config == moved == run.config
    assert not (run.path / ".weights.1.tmp").exists()
    other = with_overrides(moved, ["search.epochs=9"])
    with pytest.raises(PosefabricError, match=r"search.epochs was 3.0, now 9.0.*another --out"):
        RunFolder.create(run.path, config=other, kind="search", exist_ok=True)
    with pytest.raises(PosefabricError, match="a search run, not a train run"):
        make(run.path, "train", exist_ok=True)
    finish(run)
    again = RunFolder.create(run.path, config=moved, kind="search", exist_ok=True)
    assert again.state == "finished"


# Opening


def test_open_no_such_folder_offers_near_runs(tmp_path, monkeypatch):
    make(tmp_path / "runs" / "baseline")
    make(tmp_path / "runs" / "wide")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PosefabricError) as caught:
        RunFolder.open("runs/baselin")
    message = str(caught.value)
    assert message.startswith("runs/baselin: no such run folder (did you mean runs/baseline?)")
    assert "runs there: runs/baseline, runs/wide" in message
    Path("empty").mkdir()
    with pytest.raises(PosefabricError, match=r"empty/x: no such run folder; there are no runs in"):
        RunFolder.open("empty/x")


def test_open_something_else(tmp_path):
    run = make(tmp_path / "runs" / "a")
    with pytest.raises(PosefabricError, match=r"a file, expected a run folder; did you mean .*a\?"):
        RunFolder.open(run.path / "config.yaml")
    with pytest.raises(PosefabricError, match=r"holds no run.json\).*runs there: .*a$"):
        RunFolder.open(tmp_path / "runs")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"kind": "sea', "damaged, expected JSON"),
        (b"", "damaged, expected JSON"),
        (b"\xff\xfe\x00", "damaged, expected JSON"),
        (b"[]", "damaged, expected format_version, kind"),
        (b'{"format_version": 1, "kind": "serch"}', "damaged, expected format_version, kind"),
        (b'{"format_version": 99, "posefabric": "7.0"}', "format version 99.*use posefabric 7.0"),
    ],
)
def test_open_a_damaged_or_foreign_header(tmp_path, content, message):
    run = make(tmp_path / "run")
    (run.path / "run.json").write_bytes(content)
    with pytest.raises(PosefabricError, match=rf"run\.json: .*{message}"):
        RunFolder.open(run.path)
    assert find_runs(tmp_path) == []


def test_open_without_permission(tmp_path, monkeypatch):
    run = make(tmp_path / "run")
    if os.geteuid() != 0:
        (run.path / "run.json").chmod(0)
    else:  # nothing is forbidden to root

        def forbidden(self, *_, **__):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(PosefabricError, match=r"run\.json: cannot be read \(Permission denied\)"):
        RunFolder.open(run.path)


def test_damaged_configuration_is_named(tmp_path):
    run = make(tmp_path / "run")
    (run.path / "config.yaml").write_text("serch: {}")
    with pytest.raises(PosefabricError, match=r"config.yaml: unknown option serch"):
        _ = RunFolder.open(run.path).config
    (run.path / "config.yaml").write_text("{")
    with pytest.raises(PosefabricError, match=r"config.yaml: cannot be read as YAML"):
        _ = RunFolder.open(run.path).config
    (run.path / "config.yaml").unlink()
    with pytest.raises(PosefabricError, match=r"config.yaml: cannot be read \(No such file"):
        _ = RunFolder.open(run.path).config


def test_state_and_info(tmp_path):
    run = make(tmp_path / "run")
    run.set_state("stopped", step=3)
    run.set_state("failed", error="x", step=4)
    assert RunFolder.open(run.path).state == "failed"
    assert run.info == {"step": 4, "error": "x"}
    with pytest.raises(PosefabricError, match="expected one of running, stopped"):
        run.set_state("done")


def test_find_runs_lists_runs_without_their_children(tmp_path):
    b = make(tmp_path / "x" / "b")
    a = make(tmp_path / "a")
    b.new_child("derive", Config())
    make(tmp_path / ".hidden" / "c")
    assert [run.path for run in find_runs(tmp_path)] == [b.path, a.path]
    assert [run.path for run in find_runs(a.path)] == [a.path]
    assert find_runs(tmp_path / "none") == []


# Metrics


def test_log_and_metrics(tmp_path):
    run = make(tmp_path / "run")
    run.log({"step": 1, "loss": np.float32(0.5), "alpha": torch.tensor([1.0, 2.0])})
    run.log({"step": np.int64(2), "loss": torch.tensor(0.25)})
    expected = [{"step": 1, "loss": 0.5, "alpha": [1.0, 2.0]}, {"step": 2, "loss": 0.25}]
    assert run.metrics() == expected
    assert [json.loads(x) for x in run.metrics_path.read_text().splitlines()] == expected
    assert make(tmp_path / "other").metrics() == []


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b'{"step": 2}', b"\x00\x00", b"{"])
def test_a_torn_last_line_is_left_out_and_cut_by_the_next(tmp_path, tail):
    run = make(tmp_path / "run")
    run.log({"step": 1})
    with run.metrics_path.open("ab") as file:
        file.write(tail)
    assert run.metrics() == [{"step": 1}]
    run.log({"step": 3})
    assert run.metrics_path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_damage_in_the_middle_is_named(tmp_path):
    run = make(tmp_path / "run")
    run.metrics_path.write_bytes(b'{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(PosefabricError, match=r"metrics\.jsonl: line 2"):
        run.metrics()


def test_rewind_makes_the_series_that_of_an_uninterrupted_run(tmp_path):
    whole, cut = make(tmp_path / "whole"), make(tmp_path / "cut")
    for step in range(1, 11):
        whole.log({"step": step, "loss": 1 / step})
    for step in range(1, 9):
        cut.log({"step": step, "loss": 1 / step})
    cut.rewind(5)
    for step in range(6, 11):
        cut.log({"step": step, "loss": 1 / step})
    assert cut.metrics_path.read_bytes() == whole.metrics_path.read_bytes()
    cut.rewind(10)
    assert cut.metrics() == whole.metrics()
    cut.rewind(0)
    assert cut.metrics() == []
    make(tmp_path / "none").rewind(3)


def test_rewind_within_a_phase(tmp_path):
    run = make(tmp_path / "run")
    records = [{"note": "start"}]
    records += [{"phase": "search", "step": step} for step in (1, 2, 3)]
    records += [{"note": "between"}]
    records += [{"phase": "finetune", "step": step} for step in (1, 2, 3)]
    for record in records:
        run.log(record)
    run.rewind(2, phase="finetune")
    assert run.metrics() == records[:-1]
    run.rewind(0, phase="finetune")
    assert run.metrics() == records[:5]
    for record in records[5:]:
        run.log(record)
    run.rewind(3, phase="search")  # what came after the phase goes too
    assert run.metrics() == records[:5]
    run.rewind(1, phase="search")
    assert run.metrics() == records[:2]


def test_rewind_drops_a_torn_line(tmp_path):
    run = make(tmp_path / "run")
    run.log({"step": 1})
    with run.metrics_path.open("ab") as file:
        file.write(b'{"step"')
    run.rewind(1)
    assert run.metrics_path.read_bytes() == b'{"step": 1}\n'


def test_without_tensorboard_there_is_one_note(tmp_path, caplog):
    run = make(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        for step in range(3):
            run.log({"step": step, "loss": 0.5})
    assert caplog.text.count("tensorboard is not installed") == 1
    assert len(run.metrics()) == 3 and not (run.path / "tensorboard").exists()


def test_tensorboard_gets_the_numbers_of_the_resumed_series(tmp_path, board):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make(tmp_path / "run")
    for step in range(1, 7):
        run.log({"step": step, "phase": "search", "loss": float(step), "note": "x", "ok": True})
    run.rewind(3, phase="search")
    # Event files are read in the order of their names, which begin with the second.
    time.sleep(1.1)
    for step in range(4, 6):
        run.log({"step": step, "phase": "search", "loss": 10.0 + step})
    run.set_state("finished")
    events = EventAccumulator(str(run.path / "tensorboard" / "search"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0)]


def test_a_failing_tensorboard_does_not_end_the_run(tmp_path, caplog, board):
    run = make(tmp_path / "run")
    (run.path / "tensorboard").write_text("in the way")
    run.log({"step": 1, "loss": 0.5})
    run.log({"step": 2, "loss": 0.5})
    assert len(run.metrics()) == 2
    assert caplog.text.count("TensorBoard is left out") == 1


# Writing


def test_write_and_read(tmp_path):
    run = make(tmp_path / "run")
    run.write_json("a.json", {"x": np.arange(2), "path": Path("p"), "t": torch.tensor(1.5)})
    assert run.read_json("a.json") == {"x": [0, 1], "path": "p", "t": 1.5}
    run.write_text("overlays/note.txt", "é")
    assert (run.overlays_dir / "note.txt").read_bytes() == "é".encode()
    run.write_text("bad.json", "{")
    with pytest.raises(PosefabricError, match=r"bad\.json: is not valid JSON"):
        run.read_json("bad.json")
    with pytest.raises(
        PosefabricError, match=r"none.json: cannot be read.*this search run, .*running"
    ):
        run.read_json("none.json")
    names = [run.architecture_path, run.weights_path, run.report_path, run.onnx_path]
    assert [path.name for path in names] == [
        "architecture.json",
        "weights.safetensors",
        "report.html",
        "model.onnx",
    ]
    assert run.checkpoints_dir == run.path / "checkpoints"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("what", ["json", "state", "log"])
def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path, monkeypatch, number, what):
    run = make(tmp_path / "run")
    run.log({"step": 1})
    run.write_json("a.json", 1)
    before = {p: p.read_bytes() for p in run.path.iterdir()}
    original = os.write

    def full(descriptor, data):
        if len(data) > 3:
            return original(descriptor, data[:3])  # the last bytes that fit
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module.os, "write", full)
    action = {
        "json": lambda: run.write_json("a.json", [2] * 20),
        "state": lambda: run.set_state("finished"),
        "log": lambda: run.log({"step": 2, "loss": 0.123}),
    }[what]
    with pytest.raises(PosefabricError) as caught:
        action()
    monkeypatch.undo()
    assert "the disk is full (needed " in str(caught.value)
    assert "run again with --resume; the last checkpoint is intact" in str(caught.value)
    assert {p: p.read_bytes() for p in run.path.iterdir()} == before


def test_the_bytes_needed_are_those_of_the_file(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module.os, "write", full)
    with pytest.raises(PosefabricError, match=r"needed 1234 bytes: No space left on device"):
        write_atomic(tmp_path / "x", b"a" * 1234)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_another_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PosefabricError, match=r"cannot be written \(.*choose another --out"):
        write_atomic(tmp_path / "file" / "x", b"a")


def test_a_reader_keeps_the_old_file_while_it_is_replaced(tmp_path):
    write_atomic(tmp_path / "x", b"old")
    with (tmp_path / "x").open("rb") as reader:
        write_atomic(tmp_path / "x", b"newer")
        assert reader.read() == b"old"
    assert (tmp_path / "x").read_bytes() == b"newer"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files_module.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old"}


# Parents and children


def test_children_are_numbered_and_name_their_parent(tmp_path):
    run = make(tmp_path / "run")
    first = run.new_child("derive", Config())
    second = run.new_child("train", Config())
    nested = first.new_child("train", Config())
    assert first.path == run.path / "children" / "01-derive"
    assert second.path == run.path / "children" / "02-train"
    assert [child.path for child in run.children()] == [first.path, second.path]
    assert nested.parent.path == first.path and first.parent.path == run.path
    shutil.rmtree(first.path)
    third = run.new_child("derive", Config())
    assert third.path.name == "03-derive"
    assert [child.path.name for child in run.children()] == ["02-train", "03-derive"]


def test_a_child_elsewhere_is_found_and_the_whole_can_be_moved(tmp_path):
    run = make(tmp_path / "old" / "run")
    child = run.new_child("derive", Config(), out=tmp_path / "old" / "compact")
    later = run.new_child("derive", Config())
    assert [c.path for c in run.children()] == [child.path, later.path]
    assert RunFolder.open(child.path).parent.path == run.path
    (tmp_path / "old").rename(tmp_path / "new")
    moved = RunFolder.open(tmp_path / "new" / "run")
    assert [c.path.name for c in moved.children()] == ["compact", "01-derive"]
    assert moved.children()[0].parent.path == moved.path


def test_a_child_copied_away_says_its_parent_is_gone(tmp_path, caplog):
    child = make(tmp_path / "run").new_child("derive", Config())
    copied = shutil.copytree(child.path, tmp_path / "elsewhere" / "deep" / "copy")
    assert RunFolder.open(copied).parent is None
    assert "is not there any more" in caplog.text


def test_resolve(tmp_path):
    run = make(tmp_path / "run")
    assert run.resolve().path == run.path
    with pytest.raises(PosefabricError, match="no finished compact network; make one with"):
        run.resolve("compact")
    first = finish(run.new_child("derive", Config()))
    assert run.resolve().path == first.path
    nested = first.new_child("train", Config())
    assert run.resolve().path == first.path  # the newer one is not finished
    finish(nested)
    assert run.resolve().path == nested.path == run.resolve("compact").path
    newer = finish(run.new_child("derive", Config(), out=tmp_path / "newer"))
    failed = run.new_child("derive", Config())
    failed.set_state("failed")
    finish(run.new_child("search", Config()))
    assert run.resolve().path == newer.path
    assert first.resolve().path == nested.path and nested.resolve("compact").path == nested.path
    assert nested.resolve("mixture").path == run.path == run.resolve("mixture").path
    assert run.resolve("01-derive").path == first.path
    assert run.resolve("01-derive/01-train").path == nested.path == run.resolve("01-train").path
    assert run.resolve("newer").path == newer.path
    with pytest.raises(PosefabricError) as caught:
        run.resolve("01-deriv")
    assert "no child run is called 01-deriv (did you mean 01-derive?)" in str(caught.value)
    assert "auto, mixture, compact, 01-derive, 01-derive/01-train, newer" in str(caught.value)
    assert "compact network" in newer.describe() and "(derive, finished)" in newer.describe()


def test_resolve_takes_the_newest_not_the_last_listed(tmp_path):
    run = make(tmp_path / "run")
    first, _ = finish(run.new_child("derive", Config())), finish(run.new_child("derive", Config()))
    tuned = finish(first.new_child("train", Config()))
    assert list(run.descendants()) == ["01-derive", "01-derive/01-train", "02-derive"]
    assert run.resolve().path == tuned.path


def test_resolve_without_a_search_or_with_two_of_a_name(tmp_path):
    baseline = finish(make(tmp_path / "baseline", "train"))
    assert baseline.resolve().path == baseline.resolve("compact").path == baseline.path
    with pytest.raises(PosefabricError, match="a train run without a search above it"):
        baseline.resolve("mixture")
    run = make(tmp_path / "run")
    for _ in range(2):
        run.new_child("derive", Config()).new_child("train", Config())
    with pytest.raises(PosefabricError, match="more than one child run is called 01-train"):
        run.resolve("01-train")


def test_a_damaged_child_is_left_out_with_a_warning(tmp_path, caplog):
    run = make(tmp_path / "run")
    good = finish(run.new_child("derive", Config()))
    bad = run.new_child("derive", Config())
    (bad.path / "run.json").write_text("{")
    assert run.resolve().path == good.path
    assert "left out" in caplog.text and str(bad.path) in caplog.text
