"""Where a process stands, as torchrun's variables tell."""

from __future__ import annotations

import pytest

from posefabric.distributed import Launch, launched, share
from posefabric.structures import PosefabricError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_torchrun_says_who_this_is() -> None:
    assert launched(TORCHRUN) == Launch(3, 4, 1, 2, "node0", 29500, 1, True)


@pytest.mark.parametrize(
    "environment", [{}, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}]
)
def test_a_process_alone(environment: dict[str, str]) -> None:
    assert launched(environment) == Launch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": "a"}, "start with torchrun"),
        ({"RANK": "4"}, "RANK=4: expected 0 to WORLD_SIZE - 1 = 3"),
    ],
)
def test_what_makes_no_sense_is_said(change: dict[str, str], message: str) -> None:
    with pytest.raises(PosefabricError, match=message):
        launched({**TORCHRUN, **change})
    with pytest.raises(PosefabricError, match="MASTER_ADDR"):
        launched({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 32])
def test_shares_have_everything_once_and_evenly(count: int, ranks: int) -> None:
    shares = [list(range(count))[share(count, Launch(r, ranks))] for r in range(ranks)]
    assert [row for rows in shares for row in rows] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
