"""The search stage: a supernet trains while a strategy moves its architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posefabric.derive.fit_budget import latency_table
from posefabric.models.build import build_supernet
from posefabric.models.supernet import Supernet
from posefabric.run import RunFolder
from posefabric.search.beta_decay import BetaDecay
from posefabric.search.bilevel import FirstOrder, SecondOrder
from posefabric.search.gates import Gates
from posefabric.search.gumbel import Gumbel
from posefabric.search.partial_channels import PartialChannels
from posefabric.search.perturbation import Perturbation
from posefabric.search.random import Random
from posefabric.search.shrinking import Shrinking
from posefabric.search.synchronous import Synchronous
from posefabric.search.uniform import Uniform
from posefabric.train.phase import train_phase
from posefabric.train.strategy import Strategy

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "uniform": lambda config, table=None: Uniform(),
    "random": lambda config, table=None: Random(),
    "synchronous": Synchronous,
    "first_order": FirstOrder,
    "second_order": SecondOrder,
    "gumbel": Gumbel,
    "gates": Gates,
    "beta_decay": BetaDecay,
    "partial_channels": PartialChannels,
    "perturbation": Perturbation,
    "shrinking": Shrinking,
}


def search(run: RunFolder) -> tuple[Supernet, dict[str, Any]]:
    """Search in a run folder of kind ``search``, from its newest checkpoint if it has one."""
    config = run.config
    network = build_supernet(config)
    table = latency_table(run, config.search.budget)
    strategy = STRATEGIES[config.search.strategy](config.search, table)
    result = train_phase(network, run=run, optim=config.search, strategy=strategy, phase="search")
    return network, result
