"""Who this process is among those that a launcher started, from the environment alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from posefabric.structures import PosefabricError

# A rank may evaluate, read or write alone for this long; the dead are found sooner (watch.py).
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Launch:
    """This process's place, as torchrun tells it.

    Attributes:
        rank, ranks: its number and how many there are, on all machines.
        local_rank, local_ranks: the same on this machine.
        address, port: where the processes meet.
        attempt: how often torchrun has started all of them anew.
        hosted: the launcher holds the meeting place; otherwise rank 0 does.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    address: str = "localhost"
    port: int = 0
    attempt: int = 0
    hosted: bool = False


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """This process's place; the only one of one without torchrun's variables.

    Raises PosefabricError when they are there but make no sense.
    """
    given = os.environ if environment is None else environment
    if given.get("WORLD_SIZE", "1") == "1" or "RANK" not in given:
        return Launch()
    try:
        launch = Launch(
            rank=int(given["RANK"]),
            ranks=int(given["WORLD_SIZE"]),
            local_rank=int(given.get("LOCAL_RANK", given["RANK"])),
            local_ranks=int(given.get("LOCAL_WORLD_SIZE", given["WORLD_SIZE"])),
            address=given["MASTER_ADDR"],
            port=int(given["MASTER_PORT"]),
            attempt=int(given.get("TORCHELASTIC_RESTART_COUNT", "0")),
            hosted=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    except (KeyError, ValueError) as error:
        raise PosefabricError(
            f"WORLD_SIZE={given['WORLD_SIZE']} says that there are several processes, but not all "
            f"of RANK, MASTER_ADDR and MASTER_PORT are right ({error}); start with torchrun, or "
            f"unset WORLD_SIZE"
        ) from error
    if not 0 <= launch.rank < launch.ranks:
        raise PosefabricError(
            f"RANK={launch.rank}: expected 0 to WORLD_SIZE - 1 = {launch.ranks - 1}; start with "
            f"torchrun"
        )
    return launch


def is_first() -> bool:
    """Whether this process writes, logs and shows; there is one such process."""
    return launched().rank == 0


def share(count: int, launch: Launch) -> slice:
    """The consecutive rows of ``count`` that are this rank's: every row is exactly one's."""
    return slice(
        count * launch.rank // launch.ranks,
        count * (launch.rank + 1) // launch.ranks,
    )
