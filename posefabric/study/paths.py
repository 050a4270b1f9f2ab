"""The architectures of a small space, as the options that each choice of a mixture keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from posefabric.derive.fit_budget import whole_cost
from posefabric.derive.prune import prune
from posefabric.models.supernet import Supernet
from posefabric.search.closing import Choice, probabilities
from posefabric.space.architecture import Cell
from posefabric.structures import PosefabricError

UNLIKELY = 1e-6  # stands for 0 in a logarithm


@dataclass(frozen=True)
class Candidate:
    """An architecture of a mixture's space.

    Attributes:
        name: its operation and, of a path, the strides of its cells, or a number.
        kept: the options that stay of each choice that it reads; the others close.
        macs: multiply-adds of one picture through the whole network.
    """

    name: str
    kept: Mapping[Choice, tuple[int, ...]]
    macs: int

    def leave_only(self, network: Supernet) -> None:
        """Close everything else in a mixture; what stays of a choice weighs alike."""
        for choice, kept in self.kept.items():
            logits = choice.logits(network)
            for option in choice.open_options(network):
                if option in kept:
                    logits[option] = 0.0
                else:
                    choice.close(network, option)

    def log_likelihood(self, network: Supernet) -> float:
        """Log of the probability that a mixture's alpha and beta give to what it keeps."""
        total = 0.0
        for choice, kept in self.kept.items():
            share = float(probabilities(network, choice)[list(kept)].sum())
            total += math.log(max(share, UNLIKELY))
        return total


def one_path(mixture: Supernet) -> list[Candidate]:
    """Every architecture with one operation, and one source a cell, of a mixture with one part.

    Raises PosefabricError for a mixture with more than one operation to choose.
    """
    part = _only_part(mixture)
    found = []
    for operation in _operations(mixture, part):
        for path in _paths(mixture, part):
            kept = {Choice(part, 0, 0): (operation,), **path}
            rows = sorted(path, key=lambda choice: choice.row)
            cells = mixture.graph.parts[0].cells
            strides = ">".join(f"1/{4 * 2 ** cells[choice.row].scale}" for choice in rows)
            levels = {s.slot: s.scale for s in cells[rows[0].row].sources}
            first = f"1/{4 * 2 ** levels[path[rows[0]][0]]}"
            name = f"{mixture.shapes[part].operations[operation]} {first}>{strides}"
            found.append(_measured(name, kept, mixture))
    return found


def fused(mixture: Supernet, count: int, *, seed: int, strata: int = 10) -> list[Candidate]:
    """``count`` architectures whose cells keep any of their sources, evenly over their cost.

    Of fifty times as many drawn ones, sorted by multiply-adds and cut into ``strata``, the first
    of each are taken in turn.
    """
    part = _only_part(mixture)
    generator = torch.Generator().manual_seed(seed)
    operations, drawn = _operations(mixture, part), {}
    for _ in range(50 * count):
        kept: dict[Choice, tuple[int, ...]] = {
            Choice(part, 0, 0): (_one_of(operations, generator),)
        }
        for row in range(len(mixture.graph.parts[0].cells)):
            choice = Choice(part, row)
            options = choice.open_options(mixture)
            taken = [i for i in options if torch.rand((), generator=generator) < 0.5]
            kept[choice] = tuple(taken or [_one_of(options, generator)])
        candidate = _measured("", kept, mixture)
        drawn.setdefault(candidate.macs, candidate)
        if len(drawn) >= 5 * count:
            break
    ordered = sorted(drawn.values(), key=lambda one: one.macs)
    size = max(1, -(-len(ordered) // strata))
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    turns = (group[turn] for turn in range(size) for group in groups if turn < len(group))
    chosen = [candidate for candidate, _ in zip(turns, range(count), strict=False)]
    return [
        Candidate(f"fused {number}", one.kept, one.macs) for number, one in enumerate(chosen, 1)
    ]


def likeliest(mixture: Supernet, candidates: list[Candidate]) -> Candidate:
    """The one-path architecture that the argmax of a mixture's alpha and beta is."""

    def is_it(candidate: Candidate) -> bool:
        return all(kept == (_best(mixture, choice),) for choice, kept in candidate.kept.items())

    return next(candidate for candidate in candidates if is_it(candidate))


def _best(mixture: Supernet, choice: Choice) -> int:
    found = probabilities(mixture, choice)
    options = [i for i in choice.open_options(mixture) if not choice.is_zero(mixture, i)]
    return max(options, key=lambda i: float(found[i]))


def _only_part(mixture: Supernet) -> str:
    names = list(mixture.shapes)
    alpha = mixture.alphas[names[0]]
    if len(names) > 1 or alpha.shape[:2] != (1, 1):
        raise PosefabricError(
            f"an oracle needs one part whose cells share one operation, got parts "
            f"{', '.join(names)} with {alpha.shape[0]} x {alpha.shape[1]} operations to choose; "
            f"use model.parts=1, model.shared_alpha=true and model.hidden_nodes=1"
        )
    return names[0]


def _operations(mixture: Supernet, part: str) -> list[int]:
    names = mixture.shapes[part].operations
    return [place for place, name in enumerate(names) if name != "zero"]


def _paths(mixture: Supernet, part: str) -> Iterator[dict[Choice, tuple[int, ...]]]:
    """From a backbone's level to the finest cell of the last layer, a source a cell."""
    cells = mixture.graph.parts[0].cells
    rows = {(cell.layer, cell.scale): row for row, cell in enumerate(cells)}
    first, last = min(layer for layer, _ in rows), max(layer for layer, _ in rows)

    def back(cell: Cell) -> Iterator[dict[Choice, tuple[int, ...]]]:
        choice = Choice(part, rows[cell.layer, cell.scale])
        for source in cell.sources:
            if cell.layer == first:
                yield {choice: (source.slot,)}
                continue
            for before in back(cells[rows[cell.layer - 1, source.scale]]):
                yield {**before, choice: (source.slot,)}

    return back(cells[rows[last, 0]])


def _measured(name: str, kept: Mapping[Choice, tuple[int, ...]], mixture: Supernet) -> Candidate:
    candidate = Candidate(name, kept, 0)
    state = {key: value.clone() for key, value in mixture.arch_parameters().items()}
    candidate.leave_only(mixture)
    cost = whole_cost(prune(mixture.architecture()))
    with torch.no_grad():
        for key, parameter in mixture.arch_parameters().items():
            parameter.copy_(state[key])
    return Candidate(name, kept, cost.macs)


def _one_of(options: list[int], generator: torch.Generator) -> int:
    return options[int(torch.randint(len(options), (), generator=generator))]
