"""Sums through shared memory: right, alike on every rank, and left out where it cannot be had."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from torch import Tensor, nn

from posefabric import native
from posefabric.distributed import adder, place, ranks, shared_sums, summed
from posefabric.distributed.ranks import add_up
from posefabric.models.fused import weighted_sum
from posefabric.models.term_calls import Term, norms_over_all
from posefabric.structures import PosefabricError

LARGE = 3 * shared_sums.ROOM // 8 + 5


def numbers(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def no_gloo(*args: Any, **options: Any) -> None:
    raise AssertionError("through the network")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_any_size(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number, and more than fits at a time; three ranks, one of them late."""
    sizes = (1, 7, LARGE)

    def work(rank: int) -> list[Tensor]:
        monkeypatch.setattr(dist, "all_reduce", no_gloo)
        found = []
        for size in sizes:
            time.sleep(0.3 if rank == 1 else 0.0)
            found.append(add_up(numbers(size, dtype, rank)))
        found += summed([numbers(3, dtype, rank), numbers(4, dtype, rank).view(2, 2)])
        return found

    results = in_ranks(work, tmp_path, ranks=3)
    for i, size in enumerate(sizes):
        own = [numbers(size, dtype, rank) for rank in range(3)]
        assert torch.equal(results[0][i], own[0] + own[1] + own[2])
    assert results[0][-1].shape == (2, 2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_in_a_row(tmp_path: Path) -> None:
    """Nobody overtakes: each sum is of numbers of the same turn."""

    def work(rank: int) -> bool:
        return all(
            float(add_up(torch.tensor([float(turn * (rank + 1))]))) == 3.0 * turn
            for turn in range(5000)
        )

    assert in_ranks(work, tmp_path) == [True, True]


def test_ranks_that_add_different_things_are_told(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        add_up(torch.ones(3))
        add_up(torch.ones(2 + rank))

    for told in in_ranks(work, tmp_path):
        assert "ranks add up different things" in told


def test_a_rank_that_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_sums, "TIMEOUT", timedelta(seconds=0.1))

    def work(rank: int) -> None:
        add_up(torch.ones(1))
        if rank == 1:
            time.sleep(3.0)
        add_up(torch.ones(1))

    assert "rank 1 did not come within 0:00:00.1" in in_ranks(work, tmp_path)[0]


@pytest.mark.parametrize("by_kernels", [True, False])
def test_ctrl_c_ends_the_waiting(by_kernels: bool, tmp_path: Path) -> None:
    """Compiled code waits, and asks Python from time to time, where nothing can be raised."""

    def work(rank: int) -> str:
        add_up(torch.ones(1))
        if rank == 1:
            time.sleep(2.0)
            return "late"
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            if by_kernels:
                with norms_over_all(adder()):
                    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
                    weighted_sum([Term(x.requires_grad_(), norm=nn.BatchNorm2d(3))])
            else:
                add_up(torch.ones(1))
        except KeyboardInterrupt:
            return "interrupted"
        return "waited on"

    assert in_ranks(work, tmp_path) == ["interrupted", "late"]


def test_whole_numbers_go_another_way(tmp_path: Path) -> None:
    def work(rank: int) -> list[int]:
        return add_up(torch.tensor([rank, 2**60 + rank])).tolist()

    assert in_ranks(work, tmp_path) == [[1, 2**61 + 1]] * 2


def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", none)


def without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Path:
        raise PosefabricError("no C++ compiler")

    shared_sums._load.cache_clear()
    monkeypatch.setattr(shared_sums, "compile_library", fail)


@pytest.mark.parametrize("broken", [without_memory, without_room, without_compiler])
@pytest.mark.parametrize("where", [(0,), (1,), (0, 1)])
def test_where_it_cannot_be_had_all_go_by_gloo(
    broken: Any, where: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> tuple[float, bool, bool]:
        said: list[str] = []
        monkeypatch.setattr(shared_sums._log, "warning", lambda *words: said.append(words[-1]))
        if rank in where:
            broken(monkeypatch)
        total = float(add_up(torch.tensor([rank + 1.0])))
        ranks.barrier()
        return total, ranks._Group.shared is None, bool(said)

    # Memory is what rank 0 needs.
    fails = 0 in where or broken is without_compiler
    assert in_ranks(work, tmp_path) == [(3.0, fails, fails), (3.0, fails, False)]


def test_processes_of_several_machines_go_by_gloo(tmp_path: Path) -> None:
    def work(rank: int) -> bool:
        launch = place()
        elsewhere = type(launch)(**{**vars(launch), "local_ranks": 1})
        return shared_sums.open_together(elsewhere, lambda value: [value]) is None

    assert in_ranks(work, tmp_path) == [True, True]


def test_it_is_compiled_where_the_kernels_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.compile_library(shared_sums.SOURCE, ("-O2",)).parent == tmp_path / "posefabric"
