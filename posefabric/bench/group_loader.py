"""Rows of the loader: the share of a step that waits for data, and memory over an epoch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from posefabric.bench.context import Bench
from posefabric.bench.fresh import Fresh, once
from posefabric.bench.rows import Line, Row
from posefabric.bench.timing import ratio_of, spread_of
from posefabric.bench.waiting import loader_waits, workers_memory
from posefabric.config import Config
from posefabric.structures import PosefabricError

SIZES = (128, 256)
WORKERS = (0, 1, 2)
# The shipped data set's own layout is not that of the pictures made here.
MADE = ("data.train_annotations=annotations/train.json", "data.train_images=train")


def waiting(bench: Bench) -> Iterator[Line]:
    """A search at 128 and at 256 pixels that reads JPEG files, by number of workers."""
    sizes = {f"loader.wait_{size}px": size for size in SIZES}
    for start, size in sizes.items():
        names = {f"{start}_workers{count}": count for count in WORKERS}
        late = [bench.too_late(name) for name in names]
        if any(late):
            yield from (line for line in late if line is not None)
            continue
        configs = {
            name: reading(bench, size, f"data.workers={count}") for name, count in names.items()
        }
        batch = bench.effort.loader_batch
        with Fresh(
            loader_waits,
            configs=configs,
            batch=batch,
            steps=bench.effort.loader_steps,
            device="cpu",
        ) as process:
            for name in names:
                yield wait_row(name, process.ask(), batch=batch)


def reading(bench: Bench, size: int, *more: str) -> Config:
    """The last subject's search on made JPEG files, square inputs, every picture decoded."""
    subject = bench.subjects[-1]
    root = bench.pictures(subject.config().data.skeleton)
    return subject.config(
        f"data.input_wh=[{size},{size}]", "data.cache=false", f"data.root={root}", *MADE, *more
    )


def wait_row(name: str, shares: dict[str, list[float]], *, batch: int) -> Row:
    """The median share over the steps; 0.05 is five per cent."""
    return Row(
        name=name,
        ratio=spread_of(shares["wait"]),
        baseline="the whole step",
        unit="of a step is spent waiting for data",
        better="less",
        ours=1e3
        * statistics.median(w * s for w, s in zip(shares["wait"], shares["seconds"], strict=True)),
        theirs=1e3 * statistics.median(shares["seconds"]),
        measure="ms a step",
        conditions={
            "batch": batch,
            "rounds": len(shares["wait"]),
            "prepare_share": statistics.median(shares["prepare"]),
            "cache": False,
        },
    )


def memory(bench: Bench) -> Iterator[Line]:
    """Private memory of two workers at the end of an epoch against its first quarter."""
    name = "loader.memory_workers2"
    late = bench.too_late(name)
    if late is not None:
        yield late
        return
    persons = bench.effort.epoch
    config = reading(bench, SIZES[0], "data.workers=2")
    quarters = once(workers_memory, config=config, batch=16, persons=persons)
    yield memory_row(name, quarters, persons=persons)


def memory_row(name: str, quarters: list[list[int]], *, persons: int) -> Row:
    """The end over the first quarter, worker by worker."""
    first, last = quarters[0], quarters[-1]
    if not first:
        raise PosefabricError("the loader had no workers whose memory could be read")
    return Row(
        name=name,
        ratio=ratio_of([float(size) for size in last], [float(size) for size in first]),
        baseline="the same workers after a quarter of the epoch",
        unit="of it at the epoch's end",
        better="less",
        ours=statistics.mean(last) / 2**20,
        theirs=statistics.mean(first) / 2**20,
        measure="MiB a worker, private",
        conditions={"persons": persons, "workers": len(last), "rounds": 1},
    )
