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
from posefabric.search.synchronous import Synchronous


class Shrinking(Synchronous):
    """P-DARTS's shrinking candidate set (Chen et al., 2019), without its growing depth.

    Between ``architecture_start`` and ``decided_by`` every choice closes its least likely options
    in equal intervals, until ``operations_left`` and ``sources_left`` are open. A step gets cheaper
    with every option that is gone, and the rest of the search trains what is left.
    """

    name = "shrinking"

    def schedule(self, network: Supernet, progress: float) -> None:
        super().schedule(network, progress)
        share = decided_share(self.config, progress)
        for choice in all_choices(network) if share else ():
            # One half of an option, or more, is one.
            surplus = max(0, choice.existing(network) - left_open(choice, self.config))
            allowed = choice.existing(network) - math.floor(surplus * share + 0.5 + 1e-9)
            _close_least_likely(network, choice, allowed)


def _close_least_likely(network: Supernet, choice: Choice, allowed: int) -> None:
    options = choice.open_options(network)
    found = probabilities(network, choice)
    for option in sorted(options, key=lambda i: float(found[i]))[: max(0, len(options) - allowed)]:
        choice.close(network, option)
