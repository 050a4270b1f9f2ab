"""What each exported file costs and keeps: size, accuracy, latency by batch size, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posefabric.deploy.exported import ExportedPoseEstimator
from posefabric.deploy.onnx_graph import ExportedNetwork
from posefabric.evaluate.profile import interleaved, latency_summary
from posefabric.run.environment import describe_environment

BATCH_SIZES = (1, 4, 16)
REPEATS, WARMUP = 20, 3


@dataclass
class Variant:
    """One exported file.

    Attributes:
        name: runtime and precision.
        path: where it is to lie.
        estimator: the file, opened.
        bytes: of all its files.
        check: its differences from torch.
        measures: PCK, PCKh, AP as fractions, of what the data set has; None: not measured.
    """

    name: str
    path: Path
    estimator: ExportedPoseEstimator
    bytes: int
    check: dict[str, float]
    measures: dict[str, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def losses(self, reference: Variant) -> dict[str, float]:
        """Points (percent) that each measure is below the reference's; negative: above."""
        if self.measures is None or reference.measures is None:
            return {}
        return {name: 100 * (reference.measures[name] - v) for name, v in self.measures.items()}


def export_table(
    variants: Sequence[Variant],
    network: ExportedNetwork,
    crops: np.ndarray,
    *,
    conditions: Mapping[str, Any],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int | None = None,
) -> dict[str, Any]:
    """The table as plain values: ``machine``, ``conditions`` and ``rows``.

    The first row is eager torch on the same crops, decoder included where the graphs have it, in
    channels_last; latencies are of all rows in one run, every round in another order. A row has
    variant, file, bytes, the measures in percent, loss (points against the float file in
    onnxruntime), check (differences from torch) and latency: by batch size ms, low, high (median,
    first and last decile of a whole batch) and ratio (torch's time over its own).
    """
    repeats = REPEATS if repeats is None else repeats
    names: dict[str, Callable[[np.ndarray], Any]] = {
        "torch eager": lambda images: _run_torch(network, images)
    }
    for variant in variants:
        names[variant.name] = _runner(variant.estimator)
    pictures = {size: np.resize(crops, (size, *crops.shape[1:])) for size in batch_sizes}
    network.network.to(memory_format=torch.channels_last)
    times = interleaved(
        {
            name: {str(size): _timed(run, pictures[size]) for size in batch_sizes}
            for name, run in names.items()
        },
        repeats=repeats,
        warmup=WARMUP,
    )
    rows: list[dict[str, Any]] = [
        {"variant": "torch eager", "file": None, "bytes": None, "latency": {}}
    ]
    reference = variants[0]
    for variant in variants:
        measured = {name: 100 * value for name, value in (variant.measures or {}).items()}
        rows.append(
            {
                "variant": variant.name,
                "file": variant.path.name,
                "bytes": variant.bytes,
                **measured,
                "loss": None if variant is reference else variant.losses(reference),
                "check": variant.check,
                "latency": {},
                **variant.facts,
            }
        )
    for row in rows:
        for size in map(str, batch_sizes):
            values = latency_summary("x", times[row["variant"]][size], times["torch eager"][size])
            row["latency"][size] = {
                "ms": values["x_ms"],
                "low": values["x_ms_low"],
                "high": values["x_ms_high"],
                "ratio": 1 / values["x_ratio"] if values["x_ratio"] else None,
            }
    return {
        "machine": describe_environment(),
        "conditions": {
            **conditions,
            "latency_rounds": repeats,
            "threads": torch.get_num_threads(),
            "losses_against": reference.name,
        },
        "rows": rows,
    }


def _runner(estimator: ExportedPoseEstimator) -> Callable[[np.ndarray], Any]:
    session = estimator.session
    return lambda images: session.run(images, session.outputs)


@torch.no_grad()
def _run_torch(network: ExportedNetwork, images: np.ndarray) -> Any:
    return network(torch.from_numpy(images))


def _timed(run: Callable[[np.ndarray], Any], images: np.ndarray) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        run(images)
        return (time.perf_counter() - start) * 1e3

    return once
