"""Closing options until what is left of a mixture costs no more than a limit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posefabric.derive.fit_budget import number, whole_cost
from posefabric.derive.prune import prune
from posefabric.models.supernet import Supernet
from posefabric.search.closing import Choice
from posefabric.search.cost import ExpectedCost

Worth = Callable[[Choice, int], float]


class FallingCost:
    """What a network that keeps all that is open would cost, and how it gets down to a limit.

    In the measure of the budget of ``expected``. The options that go are those worth least for
    what they save; while the search runs, the weights can make up for each. ``worth``: none, their
    probability, as derivation would leave them out at the end (derive/fit_budget.py).
    """

    def __init__(self, network: Supernet, expected: ExpectedCost) -> None:
        self.expected = expected
        self.whole = self._whole(network)
        self._known: tuple[list[Tensor], float] | None = None

    def limit(self, share: float) -> float:
        """From the whole mixture's cost at 0 to the budget at 1, by equal factors."""
        budget = self.expected.budget.limit
        return float(self.whole * min(1.0, budget / self.whole) ** share)

    def is_above(self, network: Supernet, limit: float) -> bool:
        """Whether something can be closed that brings the cost nearer to ``limit``."""
        return self._cost(network) > limit and any(
            self._best(network, part) is not None for part in network.shapes
        )

    def close_down_to(self, network: Supernet, limit: float, worth: Worth | None = None) -> None:
        """Close options until the cost is within ``limit``, or each choice has but one."""
        if self._cost(network) <= limit:
            return
        best = {part: self._best(network, part, worth) for part in network.shapes}
        while self._cost(network) > limit:
            open_ends = [found for found in best.values() if found is not None]
            if not open_ends:
                return
            _, choice, option = min(open_ends, key=lambda found: found[0])
            choice.close(network, option)
            best[choice.part] = self._best(network, choice.part, worth)

    def _whole(self, network: Supernet) -> float:
        parts = [
            self.expected.of_weights(
                part, torch.ones_like(network.alphas[part]), (~network.absent_of(part)).float()
            )
            for part in network.shapes
        ]
        return float(torch.stack(parts).sum()) + self.expected.constant

    def _cost(self, network: Supernet) -> float:
        masks = [mask for part in network.shapes for mask in _open(network, part)]
        if self._known is None or not all(map(torch.equal, self._known[0], masks)):
            # By the graph, since a level of the backbone that nobody reads is not computed.
            cost = whole_cost(prune(network.architecture()), self.expected.table)
            self._known = masks, number(cost, self.expected.budget)
        return self._known[1]

    def _best(
        self, network: Supernet, part: str, worth: Worth | None = None
    ) -> tuple[tuple[float, float], Choice, int] | None:
        """What is worth least for what it saves: what to rank it by, the choice and the option.

        None: nothing that can go saves anything. Of options worth nothing, the most expensive.
        """
        alpha, beta = _open(network, part)
        candidates = _closable(network, part, alpha, beta)
        if not candidates:
            return None
        alphas = alpha.expand(len(candidates), *alpha.shape).clone()
        betas = beta.expand(len(candidates), *beta.shape).clone()
        shares = torch.zeros(len(candidates))
        probable = network.probabilities(part)
        # An operation that all cells share is so many choices.
        cells = len(beta) // len(alpha)
        for place, (choice, option) in enumerate(candidates):
            if choice.edge is None:
                betas[place, choice.row, option] = 0
                shares[place] = probable[1][choice.row, option].detach()
            else:
                alphas[place, choice.row, choice.edge, option] = 0
                shares[place] = cells * probable[0][choice.row, choice.edge, option].detach()
            if worth is not None:
                # What the loss would gain is within its noise.
                shares[place] = max(0.0, worth(choice, option))
        now = self.expected.of_weights(part, alpha, beta)
        saved = now - self.expected.of_weights(part, alphas, betas)
        ratios = torch.where(saved > 1e-6 * now, shares / saved.clamp(min=1e-12), torch.inf)
        ranks = list(zip(ratios.tolist(), (-saved).tolist(), strict=True))
        place = min(range(len(ranks)), key=lambda place: ranks[place])
        return (ranks[place], *candidates[place]) if ratios[place] < torch.inf else None


def _open(network: Supernet, part: str) -> tuple[Tensor, Tensor]:
    """Alpha's and beta's options, in their shapes: 1 for open ones and 0 for the others."""
    with torch.no_grad():
        alpha, beta = network.probabilities(part)
    return (alpha > 0).float().cpu(), (beta > 0).float().cpu()


def _closable(
    network: Supernet, part: str, alpha: Tensor, beta: Tensor
) -> list[tuple[Choice, int]]:
    """Options that are not the last of their choice; the operation zero does not count as one."""
    real = alpha.clone()
    if "zero" in network.shapes[part].operations:
        real[..., network.shapes[part].operations.index("zero")] = 0
    found = [
        (Choice(part, row, edge), option)
        for row, edge, option in real.nonzero().tolist()
        if real[row, edge].sum() > 1
    ]
    found += [
        (Choice(part, row), option)
        for row, option in beta.nonzero().tolist()
        if beta[row].sum() > 1
    ]
    return found
