import copy
import errno
import hashlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import posefabric
from posefabric.config import Config
from posefabric.run import RunFolder
from posefabric.run import files as files_module
from posefabric.structures import PosefabricError
from posefabric.train.checkpoint import (
    capture_random_state,
    load_checkpoint,
    load_weights,
    read_weights,
    restore_random_state,
    save_checkpoint,
    save_weights,
)


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", config=Config(), kind="search")


def files(run):
    return sorted(p.name for p in run.checkpoints_dir.iterdir() if p.suffix == ".pt")


def temporaries(folder):
    return [p for p in Path(folder).rglob("*") if p.name.endswith(".tmp")]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_no_checkpoint_yet(run):
    assert load_checkpoint(run) is None


def test_round_trip_keeps_types_bits_and_memory_layout(run):
    state = {
        "model": {
            "w": torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last),
            "half": torch.randn(3).bfloat16(),
            "count": torch.tensor(7),
            "nan": torch.tensor([float("inf"), -0.0]),
        },
        "position": {"epoch": 2, "batch": 17, "order": [3, 1, 2], "seed": 2**127 + 3},
        "betas": (0.9, 0.999),
        "none": None,
        3: True,
        "dtype": torch.bfloat16,
    }
    save_checkpoint(run, state, step=5)
    loaded, step = load_checkpoint(run)
    assert step == 5
    assert_same(loaded, state)


def test_a_view_does_not_drag_its_whole_storage_along(run):
    path = save_checkpoint(run, {"row": torch.zeros(1000, 1000)[0]}, step=1)
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("value", [object(), np.zeros(3), Path("x"), {1, 2}])
def test_a_value_that_cannot_be_loaded_safely_is_named_before_writing(run, value):
    with pytest.raises(PosefabricError, match=r"state\['a'\]\[1\].*got " + type(value).__name__):
        save_checkpoint(run, {"a": [1, value]}, step=1)
    assert load_checkpoint(run) is None


def test_numpy_numbers_become_plain_ones(run):
    save_checkpoint(run, {"a": np.float64(0.1), "b": np.int64(3), "c": np.bool_(True)}, step=1)
    assert_same(load_checkpoint(run)[0], {"a": 0.1, "b": 3, "c": True})


def test_keeps_the_last_two(run):
    for step in (10, 20, 30):
        save_checkpoint(run, {"step": step}, step=step)
    assert [name[:13] for name in files(run)] == ["step-00000020", "step-00000030"]
    assert load_checkpoint(run) == ({"step": 30}, 30)
    save_checkpoint(run, {"step": 40}, step=40, keep=1)
    assert [name[:13] for name in files(run)] == ["step-00000040"]
    with pytest.raises(PosefabricError, match="keep=0"):
        save_checkpoint(run, {}, step=41, keep=0)


def test_saving_a_step_again_replaces_it(run):
    save_checkpoint(run, {"v": 1}, step=10)
    save_checkpoint(run, {"v": 2}, step=20)
    save_checkpoint(run, {"v": 3}, step=20)
    assert load_checkpoint(run) == ({"v": 3}, 20)
    assert [name[:13] for name in files(run)] == ["step-00000010", "step-00000020"]


def damage(path, how):
    data = path.read_bytes()
    if how == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif how == "bit":
        path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["torn", "bit", "empty", "gone"])
def test_a_damaged_newest_falls_back_with_a_warning(run, caplog, how):
    for step in (10, 20):
        save_checkpoint(run, {"w": torch.full((50,), float(step))}, step=step)
    damage(run.checkpoints_dir / files(run)[-1], how)
    with caplog.at_level(logging.WARNING):
        state, step = load_checkpoint(run)
    assert step == 10 and state["w"][0] == 10
    assert "step-00000020" in caplog.text and "step 10" in caplog.text
    # Going on from 10, the damaged one is the one to drop.
    save_checkpoint(run, {"w": torch.zeros(1)}, step=15)
    assert [name[:13] for name in files(run)] == ["step-00000010", "step-00000015"]


def test_all_damaged_is_an_error_not_a_fresh_start(run):
    for step in (10, 20):
        path = save_checkpoint(run, {"step": step}, step=step)
        damage(path, "torn")
    with pytest.raises(PosefabricError, match="none of the 2 checkpoints is intact"):
        load_checkpoint(run)


@pytest.mark.parametrize("content", [None, b"", b'{"checkpoints": [{}]}', b"\xff\xfe"])
def test_a_lost_or_damaged_index_is_rebuilt_from_the_names(run, content):
    for step in (10, 20):
        save_checkpoint(run, {"step": step}, step=step)
    index = run.checkpoints_dir / "index.json"
    index.unlink() if content is None else index.write_bytes(content)
    assert load_checkpoint(run) == ({"step": 20}, 20)
    damage(run.checkpoints_dir / files(run)[-1], "bit")
    assert load_checkpoint(run) == ({"step": 10}, 10)
    save_checkpoint(run, {"step": 30}, step=30)
    assert json.loads(index.read_text())["checkpoints"][-1]["step"] == 30


def test_a_checkpoint_runs_no_code(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    path = save_checkpoint(run, {"step": 1}, step=1)
    torch.save({"a": Evil()}, path)
    index = run.checkpoints_dir / "index.json"
    tree = json.loads(index.read_text())
    tree["checkpoints"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    index.write_text(json.dumps(tree))
    with pytest.raises(PosefabricError, match="none of the 1"):
        load_checkpoint(run)
    assert not (tmp_path / "owned").exists()


def write_forever(path, output):
    """Log a step, save its checkpoint, say so: until killed."""
    torch.set_num_threads(1)
    run = RunFolder.open(path)
    found = load_checkpoint(run)
    step = found[1] if found else 0
    while True:
        step += 1
        run.log({"step": step})
        # Below the size at which torch starts threads, which do not survive a fork.
        save_checkpoint(run, {"w": torch.full((30_000,), step), "step": step}, step=step)
        print(step, file=output, flush=True)


def test_killed_many_times_while_writing(run):
    # Forked from one process that has torch loaded: many kills in little time.
    delays, last, torn = random.Random(0), 0, 0
    for _ in range(40):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                write_forever(run.path, os.fdopen(write_end, "w"))
            finally:
                os._exit(1)
        os.close(write_end)
        with os.fdopen(read_end) as output:
            assert output.readline(), "the writer failed"
            time.sleep(delays.uniform(0.0, 0.01))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            said = [int(line) for line in output.read().splitlines()]
        torn += bool(temporaries(run.checkpoints_dir))
        state, step = load_checkpoint(run)
        assert step >= max([last + 1, *said])  # what was reported written is never lost
        assert state["step"] == step and bool((state["w"] == step).all())
        run.rewind(step)
        assert [record["step"] for record in run.metrics()] == list(range(1, step + 1))
        last = step
    assert torn >= 1, "no kill met a half-written file: the test proved nothing"
    save_checkpoint(run, {"step": last + 1}, step=last + 1)
    assert not temporaries(run.path) and len(files(run)) == 2


def test_killed_between_any_two_system_calls(run, monkeypatch):
    """Die at every write, sync, rename and delete in turn: the checkpoint before loads."""

    class Killed(BaseException):
        pass

    for step in (1, 2):
        save_checkpoint(run, {"step": step}, step=step)
    calls = 0
    budget = 10**9

    def counted(original):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > budget:
                raise Killed
            return original(*arguments, **options)

        return call

    for owner, name in ((os, "write"), (os, "fsync"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    save_checkpoint(run, {"step": 3}, step=3)
    newest, needed = 3, calls
    assert needed >= 8
    for budget in range(needed):  # noqa: B007 - read by call()
        calls = 0
        with pytest.raises(Killed):
            save_checkpoint(run, {"step": newest + 1}, step=newest + 1)
        state, step = load_checkpoint(run)
        assert state == {"step": step} and step in (newest, newest + 1)
        newest = step
    assert newest > 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_keeps_the_last_checkpoint(run, monkeypatch, number, call):
    save_checkpoint(run, {"v": 1}, step=1)
    before = sorted(run.path.rglob("*"))
    original = getattr(os, call)

    def full(descriptor, *data):
        if data and len(data[0]) > 100:
            return original(descriptor, data[0][:100])  # the last bytes that fit
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module.os, call, full)
    with pytest.raises(
        PosefabricError, match=r"disk is full \(needed \d+ bytes.*--resume; the last"
    ):
        save_checkpoint(run, {"v": 2}, step=2)
    monkeypatch.undo()
    assert sorted(run.path.rglob("*")) == before
    assert load_checkpoint(run) == ({"v": 1}, 1)


def test_a_file_size_limit_is_met_like_a_full_disk(run):
    save_checkpoint(run, {"v": torch.zeros(10)}, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(PosefabricError, match=r"disk is full .*File too large"):
            save_checkpoint(run, {"v": torch.zeros(100_000)}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not temporaries(run.path)
    assert load_checkpoint(run)[1] == 1


def make_training(seed):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5)
    )
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=20)
    generators = {
        "augment": torch.Generator().manual_seed(seed),
        "order": np.random.default_rng(seed),
        "legacy": np.random.Generator(np.random.MT19937(seed)),
        "choice": random.Random(seed),
    }
    return network, optimiser, scheduler, generators


def train(network, optimiser, scheduler, generators, steps):
    losses = []
    for _ in range(steps):
        noise = torch.randn(2, 3, 8, 8, generator=generators["augment"])
        scale = (
            generators["order"].normal()
            + generators["legacy"].integers(10)
            + generators["choice"].random()
            + random.random()
            + np.random.random()  # noqa: NPY002
        )
        loss = (network(noise * scale) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def test_a_resumed_training_equals_an_uninterrupted_one(run):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    parts = make_training(1)
    train(*parts, steps=5)
    np.random.normal()  # noqa: NPY002 - leaves a cached second value behind
    network, optimiser, scheduler, generators = parts
    state = {
        "model": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": capture_random_state(generators),
    }
    save_checkpoint(run, state, step=5)
    expected = [*train(*parts, steps=10), np.random.normal()]  # noqa: NPY002
    weights = copy.deepcopy(network.state_dict())

    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    parts = network, optimiser, scheduler, generators = make_training(2)
    state, step = load_checkpoint(run)
    network.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    scheduler.load_state_dict(state["scheduler"])
    restore_random_state(state["random"], generators)
    assert step == 5
    assert [*train(*parts, steps=10), np.random.normal()] == expected  # noqa: NPY002
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_other_optimisers_and_schedulers_load(run):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, [2, 2, 4])
    for _ in range(3):
        parameter.grad = torch.ones(3)
        optimiser.step()
        scheduler.step()
    save_checkpoint(run, {"o": optimiser.state_dict(), "s": scheduler.state_dict()}, step=3)
    state, _ = load_checkpoint(run)
    assert type(state["s"]["milestones"]) is type(scheduler.milestones)
    assert_same(
        state["o"]["state"][0]["momentum_buffer"], optimiser.state[parameter]["momentum_buffer"]
    )


def test_random_generators_that_do_not_fit_are_named():
    state = capture_random_state({"augment": torch.Generator()})
    with pytest.raises(PosefabricError, match=r"\['augment'\], this run has \['order'\]"):
        restore_random_state(state, {"order": torch.Generator()})
    with pytest.raises(PosefabricError, match="augment does not fit a Random"):
        restore_random_state(state, {"augment": random.Random()})


def small_network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


def test_weights_round_trip_and_another_reader_agrees(tmp_path):
    network = small_network().to(memory_format=torch.channels_last)
    network(torch.randn(2, 3, 5, 5))
    path = tmp_path / "weights.safetensors"
    save_weights(path, network, metadata={"architecture": "abc", "skeleton": "coco17"})
    other = small_network()
    assert load_weights(path, other) == {"architecture": "abc", "skeleton": "coco17"}
    arrays = safetensors.numpy.load_file(path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
        assert np.array_equal(arrays[name], tensor.numpy())


def test_tied_tensors_are_written_twice(tmp_path):
    shared = torch.arange(6.0)
    save_weights(tmp_path / "w.safetensors", {"a": shared, "b": shared, "row": shared[2:4]})
    tensors, _ = read_weights(tmp_path / "w.safetensors")
    assert torch.equal(tensors["b"], shared) and tensors["row"].tolist() == [2.0, 3.0]


def test_weights_that_do_not_fit_are_listed_and_change_nothing(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {name: torch.ones_like(t) for name, t in small_network().state_dict().items()}
    tensors["0.weight"] = torch.ones(4, 3, 5, 5)
    del tensors["1.running_mean"]
    save_weights(path, {**tensors, **{f"head.{i}": torch.ones(1) for i in range(7)}})
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(PosefabricError) as caught:
        load_weights(path, network)
    message = str(caught.value)
    assert str(path) in message
    assert "1 missing (1.running_mean)" in message
    assert "7 not expected (head.0, head.1, head.2, head.3, head.4 and 2 more)" in message
    assert "0.weight (4, 3, 5, 5), expected (4, 3, 3, 3)" in message
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("0.bias"), "1 missing"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "1 not expected"),
        (lambda tensors: tensors.update({"0.bias": torch.ones(1)}), "1 of another shape"),
    ],
)
def test_each_misfit_alone_is_an_error(tmp_path, change, message):
    tensors = dict(small_network().state_dict())
    change(tensors)
    save_weights(tmp_path / "w.safetensors", tensors)
    with pytest.raises(PosefabricError, match=message):
        load_weights(tmp_path / "w.safetensors", small_network())


def test_weights_files_that_are_none(tmp_path):
    with pytest.raises(PosefabricError, match=r"none\.safetensors: cannot be read \(No such file"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(PosefabricError, match="Is a directory"):
        read_weights(tmp_path)
    path = tmp_path / "w.safetensors"
    save_weights(path, small_network())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(PosefabricError, match="damaged or no safetensors file"):
        read_weights(path)


def test_a_full_disk_keeps_the_old_weights(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.ones(3)})

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module.os, "write", full)
    with pytest.raises(PosefabricError, match="disk is full"):
        save_weights(path, {"a": torch.zeros(3)})
    monkeypatch.undo()
    assert read_weights(path)[0]["a"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_python_process_leaves_a_run_that_opens(run):
    """The same, once with a process of its own instead of a fork."""
    code = "import sys, test_checkpoint as t; t.write_forever(sys.argv[1], sys.stdout)"
    folders = [Path(posefabric.__file__).parents[1], Path(__file__).parent]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
    )
    assert process.stdout is not None
    for _ in range(20):
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state, step = load_checkpoint(RunFolder.open(run.path))
    assert step >= said and state["step"] == step
