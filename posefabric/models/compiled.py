"""The compiled path: a network's cells through torch.compile, once for each scale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posefabric.distributed import place
from posefabric.models.grouped import fast_path, plain_path
from posefabric.models.kernels import load_kernels
from posefabric.models.traced_convolutions import trace_convolutions
from posefabric.space.cell import Cell, Weight
from posefabric.structures import PosefabricError


def compiled_path(network: nn.Module, device: torch.device) -> nn.Module:
    """Switch a network, in place, to compiled cells; on a CPU the rest goes the fast path.

    What is compiled is a cell from its first node on. Cells of a scale with equal edges share one
    function, whichever part and layer they belong to and whatever they read: it takes a cell's
    weights and statistics as arguments. What weighs exactly nothing is computed all the same, so
    that a search that closes options compiles nothing anew. Without gradients, in evaluation, and
    with norms over several processes a cell is computed as without it.

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
    """A cell whose training step, from its first node on, is a compiled function's."""

    compiled: Callable[..., Tensor]

    def compute(self, entry: Tensor, choice_weights: Sequence[Sequence[Weight]]) -> Tensor:
        cell: Any = self
        if not cell.training or not torch.is_grad_enabled() or place().ranks > 1:
            layer: Any = super()
            return layer.compute(entry, choice_weights)
        state = {**_own(cell.named_parameters()), **_own(cell.named_buffers())}
        weights = torch.stack([_stacked(row, entry) for row in choice_weights])
        return self.compiled(state, entry, weights)


class _WithoutSources(Cell):
    """A cell that is called from its first node on."""

    def forward(self, *arguments: Any) -> Tensor:
        return self.compute(*arguments)


def _compiled(cell: Cell, *, name: str) -> Callable[..., Tensor]:
    """A function of a cell's state, its first node and its candidates' weights."""
    template = copy.deepcopy(cell).train()
    del template.sources
    plain_path(template)
    trace_convolutions(template)
    template.__class__ = _WithoutSources

    def run(state: dict[str, Tensor], entry: Tensor, weights: Tensor) -> Tensor:
        rows = [row.unbind() for row in weights.unbind()]
        return torch.func.functional_call(template, state, (entry, rows))

    # What is compiled is found again by its code, of which only so many versions are kept.
    run.__code__ = run.__code__.replace(co_name=name)
    # The template is this function's alone and stays as it is: to look at each call takes long.
    trust: Any = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)  # torch 2.8
    trusting: dict[str, Any] = {} if trust is None else {"guard_filter_fn": trust}
    return torch.compile(run, fullgraph=True, dynamic=False, options=trusting)


def _kind(cell: Cell) -> str:
    """Equal for cells that compute alike from their first node on."""
    graph = cell.graph.model_copy(update={"layer": 0, "sources": ()})
    shapes = {name: tuple(p.shape) for name, p in _own(cell.named_parameters()).items()}
    return f"{graph.model_dump_json()} {shapes}"


def _own(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What is not of the cell's sources."""
    return {name: value for name, value in named if not name.startswith("sources.")}


def _stacked(weights: Sequence[Weight], like: Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(w, dtype=like.dtype, device=like.device) for w in weights])
