"""Waiting is a share of the step, memory is that of the workers alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from bench_parts import TINY, FakeClock, FakeGate, make_bench

from posefabric.bench import memory, waiting
from posefabric.bench.group_loader import memory_row, reading, wait_row
from posefabric.bench.memory import peak_bytes, private_bytes, resident_bytes
from posefabric.bench.training import people
from posefabric.bench.waiting import WatchedData, loader_waits, repeated, wait_shares
from posefabric.data.batch import Normalisation
from posefabric.structures import PosefabricError

CPU = torch.device("cpu")


def test_waiting_preparing_and_the_rest_of_a_step(monkeypatch) -> None:
    clock, config = FakeClock(), TINY.config()
    data = WatchedData.open(
        config,
        optim=config.search.model_copy(update={"batch_size": 2}),
        normalisation=Normalisation(),
        seed=0,
        device=CPU,
        dataset=people(config, 2),
    )
    assert isinstance(data, WatchedData)
    data.clock, data.last_step = clock, 2
    batches = data.loader.batches

    def slow(*given):
        for batch in batches(*given):
            clock.now += 1.0
            yield batch

    monkeypatch.setattr(data.loader, "batches", slow)
    prepare = waiting.TrainingData.prepare

    def preparing(self, crops, step):
        clock.now += 2.0
        return prepare(self, crops, step)

    monkeypatch.setattr(waiting.TrainingData, "prepare", preparing)
    for step, crops in data.crops(0):
        data.prepare(crops, step)
        clock.now += 5.0 if step else 1.0
    assert data.waits == [1.0, 1.0] and data.prepares == [2.0, 2.0] and data.steps == [4.0, 8.0]
    assert wait_shares(data, skip=1) == {"wait": [0.125], "prepare": [0.25], "seconds": [8.0]}


def test_a_search_waits_for_files_by_the_number_of_workers(tmp_path) -> None:
    bench = make_bench(tmp_path)
    config = reading(bench, 64, "data.workers=0")
    assert config.data.cache is False and len(list(tmp_path.rglob("*.jpg"))) == 2
    gate = FakeGate(turns=2)
    loader_waits(gate, configs={"a": config}, batch=2, steps=2, device="cpu")  # type: ignore[arg-type]
    (shares,) = gate.answers
    assert len(shares["wait"]) == len(shares["seconds"]) == 2
    assert all(0 < share < 1 for share in (*shares["wait"], *shares["prepare"]))


def test_a_row_of_waiting_is_a_share_and_less_is_better() -> None:
    shares = {"wait": [0.1, 0.2, 0.3], "prepare": [0.05] * 3, "seconds": [1.0, 1.0, 1.0]}
    row = wait_row("loader.wait_64px_workers0", shares, batch=2)
    assert row.ratio.median == 0.2 and row.better == "less"
    assert row.ours == pytest.approx(200.0) and row.theirs == 1000.0
    assert row.conditions["prepare_share"] == 0.05


def test_flat_memory_is_one() -> None:
    row = memory_row("loader.memory", [[100, 200], [0, 0], [150, 300]], persons=8)
    assert row.ratio.median == pytest.approx(1.5) and row.better == "less"
    with pytest.raises(PosefabricError, match="no workers"):
        memory_row("loader.memory", [[], []], persons=8)


def test_persons_are_repeated_as_objects_of_their_own() -> None:
    dataset = repeated(people(TINY.config(), 2), 5)
    assert len(dataset) == 5 and len({id(person) for person in dataset.persons}) == 5
    assert dataset.persons[4].file == dataset.persons[0].file


BLOCK = """
import torch
from posefabric.bench.memory import Growth, peak_bytes, resident_bytes
growth = Growth(torch.device("cpu"))
block = torch.ones(2**24)  # 64 MiB
held = resident_bytes() - growth.start
del block
print(held, peak_bytes() - resident_bytes(), growth.bytes())
"""


def test_the_peak_stays_and_what_is_freed_goes() -> None:
    """In a process of its own: this one may hold freed memory, which nothing grows by."""
    line = [sys.executable, "-c", BLOCK]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    held, freed, grown = map(int, done.stdout.split())
    assert held > 2**25 and freed >= 0 and grown > 2**25


def test_memory_of_one_process_alone() -> None:
    own = private_bytes(os.getpid())
    assert own is None or 0 < own <= resident_bytes() * 1.1
    assert private_bytes(2**30) is None


def test_without_proc_the_peak_is_the_systems_own_count(monkeypatch) -> None:
    expected = peak_bytes()
    monkeypatch.setattr(memory, "_status", lambda key: None)
    assert 0.5 < peak_bytes() / expected < 2 and resident_bytes() == peak_bytes()
