"""Training a baseline from the start, in a run of its own."""

from __future__ import annotations

from typing import Any

from posefabric.models.baselines import BaselineNetwork
from posefabric.models.build import build_baseline
from posefabric.run import RunFolder
from posefabric.train.phase import train_phase
from posefabric.train.strategy import Strategy


def train_from_start(run: RunFolder) -> tuple[BaselineNetwork, dict[str, Any]]:
    """Train the baseline ``model.network`` in a run folder of kind ``train``.

    By the options of the section ``finetune``, from the run's newest checkpoint if it has one.
    """
    network = build_baseline(run.config)
    result = train_phase(
        network, run=run, optim=run.config.finetune, strategy=Strategy(), phase="finetune"
    )
    return network, result
