"""Runs a test's work in several processes that have joined as ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posefabric.distributed import joined
from posefabric.structures import PosefabricError


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def in_ranks(
    work: Callable[[int], Any],
    folder: Path,
    *,
    ranks: int = 2,
    silent_s: float = 60.0,
    wait_s: float = 300.0,
) -> list[Any]:
    """What ``work(rank)`` returned on each rank, the text of its PosefabricError, or None.

    Processes are forked, which saves each the import of torch. Each is given ``wait_s`` seconds.
    """
    port, context = free_port(), multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        context.Process(target=_run, args=(work, folder, rank, ranks, port, silent_s))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(wait_s)
            assert process.exitcode is not None, "a rank hangs"
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _run(
    work: Callable[[int], Any], folder: Path, rank: int, ranks: int, port: int, silent_s: float
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        try:
            with joined(silent_s=silent_s):
                result = work(rank)
        except PosefabricError as error:
            result = str(error)
        torch.save(result, folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Not sys.exit: the test process's own exit handlers are not this one's.
    os._exit(0)
