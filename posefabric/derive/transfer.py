"""Weights from a larger network to the smaller one derived from it."""

from __future__ import annotations

import torch
from torch import Tensor

from posefabric.models.compact import CompactNetwork
from posefabric.models.network import FabricNetwork
from posefabric.space.cell import Cell
from posefabric.space.fabric import cell_name
from posefabric.structures import PosefabricError


@torch.no_grad()
def transfer_weights(source: FabricNetwork, target: CompactNetwork) -> None:
    """Copy every weight and statistic of ``target`` from the same place in ``source``.

    The keep convolution loses the columns of hidden nodes that are gone; a cell that became
    constant takes the value it had. Raises PosefabricError for a place ``source`` lacks.
    """
    given = source.state_dict()
    wanted = target.state_dict()
    special = _changed_tensors(source, target)
    for name, tensor in wanted.items():
        value = special.get(name, given.get(name))
        if value is None or value.shape != tensor.shape:
            found = "no such tensor" if value is None else str(tuple(value.shape))
            raise PosefabricError(
                f"{name}: the larger network has {found}, the derived one needs "
                f"{tuple(tensor.shape)}; derive from the run it came from"
            )
        tensor.copy_(value)


def _changed_tensors(source: FabricNetwork, target: CompactNetwork) -> dict[str, Tensor]:
    changed = {}
    places = target.fabric_places()
    for part in target.graph.fabrics:
        for cell in part.cells:
            place = f"{places[part.name]}.cells.{cell_name(cell)}"
            try:
                old = source.get_submodule(place)
            except AttributeError:
                continue  # its tensors are told missing by name
            new = target.get_submodule(place)
            assert isinstance(old, Cell) and isinstance(new, Cell)
            if not old.graph.edges:
                continue
            if not new.graph.edges:
                changed[f"{place}.constant"] = _constant_of(old)
            elif old.nodes != new.nodes:
                changed[f"{place}.keep.weight"] = _columns(old, new.nodes)
    return changed


def _constant_of(cell: Cell) -> Tensor:
    """What a cell without live operations puts out: its bias, normalised."""
    training = cell.training
    cell.eval()
    assert cell.keep.bias is not None
    value = cell.norm(cell.keep.bias.view(1, -1, 1, 1))
    cell.train(training)
    return value


def _columns(cell: Cell, nodes: list[int]) -> Tensor:
    width = cell.graph.width
    blocks = [
        cell.keep.weight[:, i * width : (i + 1) * width] for i in map(cell.nodes.index, nodes)
    ]
    return torch.cat(blocks, dim=1)
