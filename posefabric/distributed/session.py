"""Joining the other processes of a command, and leaving together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from posefabric.distributed import ranks
from posefabric.distributed.launch import TIMEOUT, Launch, launched
from posefabric.distributed.watch import SILENT_S, RankLost, Watch
from posefabric.structures import PosefabricError


@contextlib.contextmanager
def joined(launch: Launch | None = None, *, silent_s: float = SILENT_S) -> Iterator[Launch]:
    """Inside, the processes are one group; a process without others goes on as it is.

    Tensors on the CPU go by gloo, those on GPUs by NCCL; each rank's GPU is the one of its
    number on its machine. Whoever leaves by an error tells the others, who leave too.

    Raises PosefabricError when the others do not come or a rank has no GPU of its own.
    """
    launch = launched() if launch is None else launch
    if launch.ranks == 1:
        yield launch
        return
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

    backend = _choose_backend(launch)
    try:
        store, watching = (_connect(launch, first=first) for first in (True, False))
        prefix = f"posefabric/{launch.attempt}"
        dist.init_process_group(
            backend,
            store=PrefixStore(f"{prefix}/group", store),
            rank=launch.rank,
            world_size=launch.ranks,
            timeout=TIMEOUT,
        )
        watch = Watch(PrefixStore(f"{prefix}/watch", watching), launch, silent_s=silent_s)
        watch.start()
        dist.barrier()
    except RuntimeError as error:
        raise PosefabricError(
            f"rank {launch.rank} of {launch.ranks} cannot join the others at {launch.address}:"
            f"{launch.port} ({error}); check that all processes were started and that MASTER_ADDR "
            f"and MASTER_PORT can be reached from here"
        ) from error
    ranks.enter(launch, watch)
    try:
        yield launch
        # The meeting place may go when its holder does.
        ranks.barrier()
        watch.end("")
        dist.destroy_process_group()
    except BaseException as error:
        # Before it waits for the others, who may wait for it.
        ranks.close_shared()
        text = str(error) if isinstance(error, PosefabricError) else repr(error)
        watch.end(text, lost=error.ranks if isinstance(error, RankLost) else ())
        if isinstance(error, PosefabricError) and launch.rank:
            error.told = watch.told_by_first(text)  # type: ignore[attr-defined]
        raise
    finally:
        watch.stop()
        ranks.leave()


def _connect(launch: Launch, *, first: bool) -> Any:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore(
        launch.address,
        launch.port,
        is_master=first and launch.rank == 0 and not launch.hosted,
        wait_for_workers=False,
        timeout=TIMEOUT,
    )


def _choose_backend(launch: Launch) -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu:gloo"
    if launch.local_ranks > torch.cuda.device_count():
        raise PosefabricError(
            f"{launch.local_ranks} processes on this machine, whose torch sees "
            f"{torch.cuda.device_count()} GPUs: each needs one of its own; use --nproc-per-node="
            f"{torch.cuda.device_count()}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to use the CPU"
        )
    torch.cuda.set_device(launch.local_rank)
    return "cpu:gloo,cuda:nccl"
