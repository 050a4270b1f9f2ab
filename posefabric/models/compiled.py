"""The compiled path: a network's cells through torch.compile, once for each kind of cell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posefabric.distributed import place
from posefabric.models.grouped import fast_path, plain_path
from posefabric.models.kernels import load_kernels
from posefabric.space.cell import Cell, Weight
from posefabric.structures import PosefabricError


def compiled_path(network: nn.Module, device: torch.device) -> nn.Module:
    """Switch a network, in place, to compiled cells; on a CPU the rest goes the fast path.

    Cells of equal structure share one compiled function, whichever part they belong to: it takes
    a cell's weights and statistics as arguments. What weighs exactly nothing is computed all the
    same, so that a search that closes options compiles nothing anew. Without gradients, in
    evaluation, and with norms over several processes a cell is computed as without it.

    Raises PosefabricError on a CPU without a C++ compiler.
    """
    if device.type == "cpu":
        if load_kernels().library is None:
            raise PosefabricError(
                f"model.path=compiled: {load_kernels().reason}; or set model.path=plain"
            )
        fast_path(network)
    functions: dict[str, Callable[..., Tensor]] = {}
    for module in network.modules():
        if isinstance(module, Cell) and module.graph.edges:
            kind = _kind(module)
            if kind not in functions:
                functions[kind] = _compiled(module, name=f"cell_{len(functions)}")
            before = type(module)
            module.__class__ = type(before.__name__, (CompiledCell, before), {})
            object.__setattr__(module, "compiled", functions[kind])
    return network


class CompiledCell:
    """A cell whose training step is a compiled function's."""

    compiled: Callable[..., Tensor]

    def forward(
        self,
        inputs: Mapping[int, Tensor],
        source_weights: Sequence[Weight],
        choice_weights: Sequence[Sequence[Weight]],
        *,
        finest: Tensor,
    ) -> Tensor:
        cell: Any = self
        if not cell.training or not torch.is_grad_enabled() or place().ranks > 1:
            layer: Any = super()
            return layer.forward(inputs, source_weights, choice_weights, finest=finest)
        state = {**dict(cell.named_parameters()), **dict(cell.named_buffers())}
        maps = [inputs[source.scale] for source in cell.graph.sources]
        sources = _stacked(source_weights, finest)
        choices = torch.stack([_stacked(row, finest) for row in choice_weights])
        return self.compiled(state, maps, sources, choices)


def _compiled(cell: Cell, *, name: str) -> Callable[..., Tensor]:
    """A function of a cell's state, its sources' maps and its weights."""
    template = copy.deepcopy(cell).train()
    plain_path(template)
    scales = [source.scale for source in cell.graph.sources]

    def run(
        state: dict[str, Tensor], maps: list[Tensor], sources: Tensor, choices: Tensor
    ) -> Tensor:
        inputs = dict(zip(scales, maps, strict=True))
        weights = sources.unbind(), [row.unbind() for row in choices.unbind()]
        return torch.func.functional_call(template, state, (inputs, *weights), {"finest": maps[0]})

    # What is compiled is found again by its code, of which only so many versions are kept.
    run.__code__ = run.__code__.replace(co_name=name)
    return torch.compile(run, fullgraph=True, dynamic=False)


def _kind(cell: Cell) -> str:
    """Equal for cells that compute alike."""
    graph = cell.graph.model_copy(update={"layer": 0})
    shapes = [(name, tuple(p.shape)) for name, p in cell.named_parameters()]
    return f"{graph.model_dump_json()} {shapes}"


def _stacked(weights: Sequence[Weight], like: Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(w, dtype=like.dtype, device=like.device) for w in weights])
