"""Progressive shrinking: the least likely options are closed one after another, while it trains."""

from __future__ import annotations

import math

from posefabric.models.supernet import Supernet
from posefabric.search.closing import (
    Choice,
    all_choices,
    decided_share,
    left_open,
    probabilities,
)
from posefabric.search.falling_cost import FallingCost
from posefabric.search.synchronous import Synchronous


class Shrinking(Synchronous):
    """P-DARTS's shrinking candidate set (Chen et al., 2019), without its growing depth.

    Between ``architecture_start`` and ``decided_by`` every choice closes its least likely options
    in equal intervals, until ``operations_left`` and ``sources_left`` are open; ``zero`` is never
    the last. A step gets cheaper with every option that is gone, and the rest of the search trains
    what is left, which derivation keeps as it is.

    With ``budget`` the cost of what is open falls too, by equal factors, from the mixture's to the
    budget: what weighs least for its cost goes, wherever it is (falling_cost.py).
    """

    name = "shrinking"
    _falling: FallingCost | None = None

    def schedule(self, network: Supernet, progress: float) -> None:
        super().schedule(network, progress)
        share = decided_share(self.config, progress)
        for choice in all_choices(network) if share else ():
            # One half of an option, or more, is one.
            left = left_open(choice, self.config)
            surplus = max(0, choice.existing(network) - left)
            allowed = choice.existing(network) - math.floor(surplus * share + 0.5 + 1e-9)
            _close_least_likely(network, choice, allowed, left)
        expected = self._expected_cost(network) if share else None
        if expected is not None:
            self._falling = self._falling or FallingCost(network, expected)
            self._falling.close_down_to(network, self._falling.limit(share))


def _close_least_likely(network: Supernet, choice: Choice, allowed: int, left: int) -> None:
    options = choice.open_options(network)
    found = probabilities(network, choice)

    def worth(option: int) -> float:
        last = allowed <= left and choice.is_zero(network, option)
        return -1.0 if last else float(found[option])

    for option in sorted(options, key=worth)[: max(0, len(options) - allowed)]:
        choice.close(network, option)
