"""Partial channels: a cell's candidates see some of its channels, the others pass by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posefabric.space.cell import Cell, Weight, add, edge_name, is_zero, node_of
from posefabric.space.operations import build_operation


def partial_path(network: nn.Module) -> list[PartialCell]:
    """Switch a network's cells, in place, so that ``channels`` can be set; returns them."""
    found: list[PartialCell] = []
    templates: dict[tuple[str, int], nn.Module] = {}
    for module in network.modules():
        if isinstance(module, Cell) and module.graph.edges:
            if not isinstance(module, PartialCell):
                before = type(module)
                module.__class__ = type(before.__name__, (PartialCell, before), {})
            cell: Any = module
            object.__setattr__(cell, "templates", templates)
            found.append(cell)
    return found


class PartialCell:
    """A cell whose candidates can be restricted to some ``channels``, a tensor of their indices.

    A restricted candidate is the whole one's rows and columns of these channels: it trains the
    weights and statistics that the whole candidate has. None: all channels, as without it.
    """

    channels: Tensor | None = None
    templates: dict[tuple[str, int], nn.Module]

    def compute(self, entry: Tensor, choice_weights: Sequence[Sequence[Weight]]) -> Tensor:
        cell: Any = self
        if self.channels is None or not cell.training:
            layer: Any = super()
            return layer.compute(entry, choice_weights)
        hidden = {0: entry}
        for edge, weights in zip(cell.graph.edges, choice_weights, strict=True):
            start = node_of(hidden, edge.start)
            seen = start[:, self.channels]
            total: Tensor | None = None
            for choice, weight in zip(edge.choices, weights, strict=True):
                if choice.operation == "zero" or is_zero(weight):
                    continue
                candidate = cell.edges[edge_name(edge)][choice.operation]
                total = add(total, self._restricted(candidate, choice.operation, seen), weight)
            mixed = torch.zeros_like(seen) if total is None else total
            value = start.index_copy(1, self.channels, mixed.to(start.dtype))
            hidden[edge.end] = add(hidden.get(edge.end), value, 1.0)
        return cell.leave(hidden)

    def _restricted(self, candidate: nn.Module, operation: str, x: Tensor) -> Tensor:
        channels: Any = self.channels
        kind = operation, len(channels)
        if kind not in self.templates:
            self.templates[kind] = build_operation(*kind).train().to(x.device)
        template = self.templates[kind]
        shapes = {name: value.shape for name, value in template.state_dict().items()}
        state = {
            name: _rows(value, shapes[name], channels)
            for name, value in (*candidate.named_parameters(), *candidate.named_buffers())
        }
        out: Tensor = torch.func.functional_call(template, state, (x,))
        with torch.no_grad():
            for name, buffer in candidate.named_buffers():
                if state[name] is not buffer:
                    buffer.index_copy_(0, channels, state[name])
        return out


def _rows(value: Tensor, shape: torch.Size, channels: Tensor) -> Tensor:
    for axis, size in enumerate(shape):
        if size != value.shape[axis]:
            value = value.index_select(axis, channels)
    return value
