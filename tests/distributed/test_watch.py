"""A rank that dies, fails or hangs: the others end, and say which one it was."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import in_ranks
from torch import nn

from posefabric.distributed import RankLost, adder, ranks, summed, watch
from posefabric.models.fused import weighted_sum
from posefabric.models.term_calls import Term, norms_over_all
from posefabric.structures import PosefabricError


@pytest.fixture(autouse=True, params=[True, False], ids=["shared memory", "gloo"])
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Ranks have memory in common or none, and are quick to miss one that is gone."""
    monkeypatch.setattr(watch, "BEAT_S", 0.05)
    monkeypatch.setattr(watch, "FOUND_S", 0.6)
    if not request.param:
        monkeypatch.setattr(ranks, "open_together", lambda launch, gather: None)
    return request.param


def meet(shared: bool) -> None:
    """Once together, ranks know whether they have memory in common."""
    summed([torch.ones(1)])
    assert (ranks._Group.shared is not None) == shared


def waiting() -> None:
    while True:
        summed([torch.ones(1)])


def test_a_killed_rank_is_named(shared: bool, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        meet(shared)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        waiting()

    first, second = in_ranks(work, tmp_path)
    assert second is None
    assert first.startswith("rank 0 of 2 stops: rank 1 (")
    assert "has ended without a word" in first and "--resume" in first


def test_a_rank_killed_while_compiled_code_adds_up(shared: bool, tmp_path: Path) -> None:
    def work(rank: int) -> float:
        meet(shared)
        own = adder()
        x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        with norms_over_all(own):
            for turn in range(1000):
                weighted_sum([Term(x, norm=nn.BatchNorm2d(3))])
                if rank == 1 and turn == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    first, second = in_ranks(work, tmp_path)
    assert second is None
    assert first.startswith("rank 0 of 2 stops: rank 1 (")
    assert "has ended without a word" in first


def test_the_killed_rank_may_be_the_one_that_holds_the_meeting_place(
    shared: bool, tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        meet(shared)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        waiting()

    first, second = in_ranks(work, tmp_path)
    assert first is None
    assert second.startswith("rank 1 of 2 stops: rank 0 has ended without a word")


def test_a_failing_rank_tells_why_and_only_it_is_blamed(shared: bool, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        meet(shared)
        if rank == 1:
            raise PosefabricError("the disk is full")
        waiting()

    found = in_ranks(work, tmp_path, ranks=3)
    assert found[1] == "the disk is full"
    for rank in (0, 2):
        assert found[rank].startswith(f"rank {rank} of 3 stops: rank 1 (")
        assert "ended: the disk is full" in found[rank]
        assert "rank 2 (" not in found[rank] and "rank 0 (" not in found[rank]


def test_a_rank_that_ends_before_the_first_sum(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        waiting()

    assert in_ranks(work, tmp_path)[0].startswith("rank 0 of 2 stops: rank 1 (")


# gloo's connections break when the process ends, and with it the meeting place.
@pytest.mark.parametrize("shared", [True], indirect=True)
def test_the_first_rank_that_fails_is_heard(shared: bool, tmp_path: Path) -> None:
    """It holds the meeting place, and its words have to be read there before it goes."""

    def work(rank: int) -> None:
        meet(shared)
        if rank == 0:
            raise PosefabricError("the disk is full")
        waiting()

    first, second = in_ranks(work, tmp_path)
    assert first == "the disk is full"
    assert second.startswith("rank 1 of 2 stops: rank 0 (") and "disk is full" in second


# Gloo waits for the one that is busy.
@pytest.mark.parametrize("shared", [True], indirect=True)
def test_a_rank_that_ends_is_found_while_another_is_busy(shared: bool, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        meet(shared)
        if rank == 1:
            while not (tmp_path / "found").exists():
                time.sleep(0.05)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            waiting()
        except RankLost:
            (tmp_path / "found").touch()
            raise

    found = in_ranks(work, tmp_path, ranks=3, wait_s=60.0)
    assert "rank 2 (" in found[0] and "rank 1 (" not in found[0]


def test_a_rank_that_hangs_does_not_hold_the_others(
    shared: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GRACE_S", 0.2)

    def work(rank: int) -> None:
        meet(shared)
        if rank == 1:
            # Stopped: it keeps its connections, so that nothing breaks by itself.
            os.kill(os.getpid(), signal.SIGSTOP)
        waiting()

    with pytest.raises(AssertionError, match="hangs"):
        in_ranks(work, tmp_path, silent_s=0.5, wait_s=3.0)
    told = capfd.readouterr().err
    assert "error: rank 0 of 2 stops: rank 1 (" in told and "no sign of life" in told
