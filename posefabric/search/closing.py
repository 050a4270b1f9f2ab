"""Choices of a mixture that are decided one option at a time: which are open, and closing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from posefabric.config import SearchConfig
from posefabric.models.relaxation import ABSENT
from posefabric.models.supernet import Supernet


@dataclass(frozen=True)
class Choice:
    """An edge's operations or a cell's sources.

    Attributes:
        part: the fabric's name.
        row: of alpha (cells, or 1 where they share it) or of beta (cells).
        edge: of the cell; none: the choice is between sources.
    """

    part: str
    row: int
    edge: int | None = None

    def logits(self, network: Supernet) -> Tensor:
        """(options,): a view of alpha or beta; a closed option's lies at ``ABSENT``."""
        if self.edge is None:
            return network.betas[self.part].data[self.row]
        return network.alphas[self.part].data[self.row, self.edge]

    def existing(self, network: Supernet) -> int:
        """How many options it had at first."""
        if self.edge is not None:
            return self.logits(network).numel()
        return int(torch.count_nonzero(~network.absent_of(self.part)[self.row]))

    def open_options(self, network: Supernet) -> list[int]:
        """Indices of the options that exist and are not closed."""
        if self.edge is None:
            logits = network.source_logits(self.part).detach()[self.row]
        else:
            logits = self.logits(network)
        return (logits > ABSENT / 2).nonzero().flatten().tolist()

    def is_zero(self, network: Supernet, option: int) -> bool:
        """Whether it is the operation ``zero``, which never wins an edge (as in DARTS)."""
        return self.edge is not None and network.shapes[self.part].operations[option] == "zero"

    def close(self, network: Supernet, option: int) -> None:
        """The option weighs exactly 0 from now on, and no gradient brings it back.

        It is part of alpha or beta, so that checkpoints keep it.
        """
        self.logits(network)[option] = ABSENT

    @contextmanager
    def without(self, network: Supernet, option: int) -> Iterator[None]:
        """The network without an option, for as long as the block lasts."""
        logits = self.logits(network)
        kept = logits.clone()
        try:
            self.close(network, option)
            yield
        finally:
            logits.copy_(kept)


def all_choices(network: Supernet) -> list[Choice]:
    """Every choice of every fabric in a fixed order, operations before sources."""
    found = []
    for part in network.shapes:
        rows, edges, _ = network.alphas[part].shape
        found += [Choice(part, row, edge) for row in range(rows) for edge in range(edges)]
        found += [Choice(part, row) for row in range(len(network.betas[part]))]
    return found


def left_open(network: Supernet, choice: Choice, config: SearchConfig) -> int:
    """How many options of a choice are to stay; the operation ``zero`` is none of them."""
    asked = config.sources_left if choice.edge is None else config.operations_left
    if asked is not None:
        return asked
    if config.strategy == "shrinking" and config.budget is not None:
        existing = choice.existing(network)
        return existing - sum(choice.is_zero(network, option) for option in range(existing))
    return 2 if choice.edge is None else 1


def decided_share(config: SearchConfig, progress: float) -> float:
    """The share of all decisions that is due: 0 at ``architecture_start``, 1 at ``decided_by``."""
    start, end = config.architecture_start, config.decided_by
    return min(1.0, max(0.0, (progress - start) / max(end - start, 1e-9)))


def probabilities(network: Supernet, choice: Choice) -> Tensor:
    """(options,): the relaxed weights of a choice's options."""
    with torch.no_grad():
        alpha, beta = network.probabilities(choice.part)
    return beta[choice.row] if choice.edge is None else alpha[choice.row, choice.edge]
