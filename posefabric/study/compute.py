"""What a training costs, and how many epochs another network gets for the same."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from posefabric.config import Config
from posefabric.data.pipeline import open_dataset
from posefabric.evaluate.profile import count_macs
from posefabric.models.build import load_network
from posefabric.models.network import PoseNetwork
from posefabric.run import RunFolder

# Forward and backward passes a step of the weights comes with (docs/method.md).
PASSES = {"first_order": 2, "second_order": 5}


def passes_of(strategy: str) -> int:
    return PASSES.get(strategy, 1)


def network_macs(network: PoseNetwork, config: Config) -> int:
    """Multiply-adds of one picture, forward, without folding: what a training step computes."""
    width, height = config.data.input_wh
    network.eval()
    device = next(network.parameters()).device
    with torch.no_grad():
        return count_macs(lambda: network(torch.zeros(1, 3, height, width, device=device)))


def training_macs(run: RunFolder) -> int:
    """Forward multiply-adds of one picture in a run's training.

    Of a search that closes options while it trains: the mean over its logged steps. Looks ahead
    are :func:`looking_macs`.
    """
    logged = [record["mixture_macs"] for record in run.metrics() if "mixture_macs" in record]
    if run.kind == "search" and logged:
        return round(statistics.fmean(logged))
    return network_macs(load_network(run), run.config)


def looking_macs(run: RunFolder) -> int:
    """Forward multiply-adds, over all persons, of a search's looks at what an option is worth."""
    return sum(record.get("worth_macs", 0) for record in run.metrics())


def total_cost(phases: Iterable[Mapping[str, Any]]) -> int:
    """Forward multiply-adds of all trainings of a run: passes x persons x MACs, summed.

    A backward pass costs about twice a forward one in every network, so that it cancels. Frozen
    stems and smaller first inputs are not accounted for. A look has no backward pass: a third.
    """
    return sum(
        phase["passes"] * phase["persons"] * phase["macs"] + phase.get("looking_macs", 0) // 3
        for phase in phases
    )


def epochs_for(cost: int, *, macs: int, config: Config) -> float:
    """Epochs of the section ``finetune`` that cost what ``cost`` says, for a network of ``macs``.

    Not fewer than one step.
    """
    count = len(open_dataset(config.data, "train"))
    batch = min(config.finetune.batch_size, count)
    steps_per_epoch = count // batch
    steps = max(1, round(cost / (macs * batch)))
    return steps / steps_per_epoch
