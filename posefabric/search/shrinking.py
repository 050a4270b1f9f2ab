"""Progressive shrinking: the options worth least are closed, some at a time, while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from posefabric.derive.fit_budget import whole_cost
from posefabric.derive.prune import prune
from posefabric.distributed import summed
from posefabric.models.supernet import Supernet
from posefabric.search.closing import (
    Choice,
    all_choices,
    decided_share,
    left_open,
    probabilities,
)
from posefabric.search.falling_cost import FallingCost, Worth
from posefabric.search.synchronous import Synchronous
from posefabric.space.cost import part_cost
from posefabric.structures import PoseBatch
from posefabric.train.strategy import LossOfParts


class Shrinking(Synchronous):
    """P-DARTS's shrinking candidate set (Chen et al., 2019), without its growing depth.

    Between ``architecture_start`` and ``decided_by`` every choice closes its options of least
    worth in equal intervals, until ``operations_left`` and ``sources_left`` are open (by default
    one and two; under a budget, all that it has room for); ``zero`` is never the last. A step gets
    cheaper with every option that is gone, and the rest of the search trains what is left, which
    derivation keeps as it is.

    With ``budget`` the cost of what is open falls too, by equal factors, from the mixture's to the
    budget: what is worth least for its cost goes, wherever it is (falling_cost.py).

    What an option is worth, ``worth`` says. ``probability``: its softmax, looked at in every step.
    ``loss``: what the loss on ``worth_persons`` persons of the coming batches rises by without it
    (DARTS-PT's measure; Wang et al., 2021), found for all open options in each of ``rounds``
    rounds. Probabilities learn at one rate whatever an option brings, and favour the skip, which
    helps before the convolutions have learned; losses can be set against costs.
    """

    name = "shrinking"
    _falling: FallingCost | None = None

    def schedule(self, network: Supernet, progress: float) -> None:
        super().schedule(network, progress)
        if self.config.worth == "probability":
            self._close(network, decided_share(self.config, progress))

    def batches_wanted(self, network: Supernet, progress: float) -> int:
        """Those of a round, until what is due in it is closed."""
        share = self._share_of_round(progress)
        if not share or not self._is_due(network, share):
            return 0
        return math.ceil(self.config.worth_persons / self.config.batch_size)

    def decide(
        self,
        network: Supernet,
        batches: Sequence[PoseBatch],
        loss_of: LossOfParts,
        progress: float,
    ) -> dict[str, Any]:
        """One round. Logs the options closed and ``worth_macs``, the forward multiply-adds it took
        over all persons; where a loss is not finite nothing is closed, and the next step tries
        again.
        """
        found = _losses_without(network, loss_of)
        own = batches[0].weights.new_tensor(float(sum(len(batch.index) for batch in batches)))
        persons = summed([own])[0]
        record = {"worth_macs": int(persons) * _cost_of_round(network), "closed": 0}
        if not all(math.isfinite(loss) for loss in found.values()):
            return record
        before = _open_count(network)
        self._close(network, self._share_of_round(progress), lambda c, o: found.get((c, o), 0.0))
        record["closed"] = before - _open_count(network)
        return record

    def _share_of_round(self, progress: float) -> float:
        """The share of all decisions that the present round closes; 0 before the first.

        The first is at ``architecture_start``, the last at ``decided_by``.
        """
        config = self.config
        if config.worth == "probability" or not self.has_started(progress):
            return 0.0
        passed = decided_share(config, progress) * (config.rounds - 1)
        return min(config.rounds, math.floor(passed + 1e-9) + 1) / config.rounds

    def _is_due(self, network: Supernet, share: float) -> bool:
        falling = self._falling_of(network)
        return any(
            len(choice.open_options(network)) > self._allowed(network, choice, share)
            for choice in all_choices(network)
        ) or (falling is not None and falling.is_above(network, falling.limit(share)))

    def _close(self, network: Supernet, share: float, worth: Worth | None = None) -> None:
        if not share:
            return
        for choice in all_choices(network):
            _close_worst(
                network,
                choice,
                self._allowed(network, choice, share),
                left_open(network, choice, self.config),
                worth,
            )
        falling = self._falling_of(network)
        if falling is not None:
            falling.close_down_to(network, falling.limit(share), worth)

    def _allowed(self, network: Supernet, choice: Choice, share: float) -> int:
        """How many options of a choice may be open; one half of one that is to go counts as one."""
        surplus = max(0, choice.existing(network) - left_open(network, choice, self.config))
        return choice.existing(network) - math.floor(surplus * share + 0.5 + 1e-9)

    def _falling_of(self, network: Supernet) -> FallingCost | None:
        expected = self._expected_cost(network)
        if expected is not None and self._falling is None:
            self._falling = FallingCost(network, expected)
        return self._falling


def _close_worst(
    network: Supernet, choice: Choice, allowed: int, left: int, worth: Worth | None
) -> None:
    options = choice.open_options(network)
    found = probabilities(network, choice)
    last = allowed <= left
    zeros = [o for o in options if choice.is_zero(network, o)] if last and len(options) > 1 else []

    def value(option: int) -> float:
        if option in zeros:
            return -math.inf
        return float(found[option]) if worth is None else worth(choice, option)

    # Also where a budget has made room already: ``zero`` would weaken what is left.
    surplus = max(len(zeros), len(options) - allowed)
    for option in sorted(options, key=value)[:surplus]:
        choice.close(network, option)


def _losses_without(network: Supernet, loss_of: LossOfParts) -> dict[tuple[Choice, int], float]:
    """What the loss rises by without each option that may stay or go."""
    whole, keys, losses = loss_of(), [], []
    for choice in all_choices(network):
        for option in _contested(network, choice):
            with choice.without(network, option):
                keys.append((choice, option))
                losses.append(loss_of(choice.part))
    # Every rank decides by the loss of the whole batch.
    rises = torch.stack(summed(losses)) - summed([whole])[0] if losses else torch.zeros(0)
    return dict(zip(keys, rises.tolist(), strict=True))


def _cost_of_round(network: Supernet) -> int:
    """Forward multiply-adds a person: the whole network, and a part for each option."""
    graph = prune(network.architecture())
    costs = {part.name: part_cost(part, graph).macs for part in graph.fabrics}
    backbone = graph.backbone.fabric
    if backbone is not None:
        costs[backbone.name] = whole_cost(graph).macs
    total = whole_cost(graph).macs
    for choice in all_choices(network):
        total += costs[choice.part] * len(_contested(network, choice))
    return total


def _contested(network: Supernet, choice: Choice) -> list[int]:
    """Open options one of which may go for another; ``zero`` is worth nothing, without a look."""
    real = [o for o in choice.open_options(network) if not choice.is_zero(network, o)]
    return real if len(real) > 1 else []


def _open_count(network: Supernet) -> int:
    return sum(len(choice.open_options(network)) for choice in all_choices(network))
