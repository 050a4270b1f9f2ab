"""Weights find their places in a smaller network, also where a cell lost nodes or became one."""

from __future__ import annotations

import pytest
import torch
from networks import make_compact, make_supernet, shake

from posefabric.derive.fold import fold
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.compact import CompactNetwork
from posefabric.models.supernet import Supernet
from posefabric.space.architecture import Architecture

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ZERO, OTHERS = [9.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.2, 0.8]


def derived(source: Supernet | CompactNetwork, graph: Architecture) -> CompactNetwork:
    compact = make_compact(graph)
    shake(compact, 50)
    transfer_weights(source, compact)
    return compact.eval()


def assert_same_outputs(*networks: torch.nn.Module) -> None:
    with torch.no_grad():
        first, *others = (network.eval()(IMAGES) for network in networks)
    for other in others:
        assert float((other - first).abs().max() / first.abs().max()) < 1e-5


def mixture_with(edges: list[list[float]], **options) -> Supernet:
    """All parts' edges (0-1, 0-2, 1-2) at these logits."""
    network = make_supernet(hidden_nodes=2, relaxation="sparsemax", seed=7, **options)
    with torch.no_grad():
        for alpha in network.alphas.values():
            alpha.copy_(torch.tensor(edges).expand_as(alpha))
    return network


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize(
    ("edges", "nodes"),
    [
        ([OTHERS, ZERO, ZERO], [1]),
        ([ZERO, OTHERS, ZERO], [2]),
        ([ZERO, ZERO, OTHERS], [2]),  # what leaves the dead node 1 is a constant, not nothing
    ],
)
def test_a_cell_that_lost_a_node_keeps_the_columns_of_the_others(
    edges: list[list[float]], nodes: list[int], faithful: bool
) -> None:
    mixture = mixture_with(edges, faithful=faithful)
    compact = derived(mixture, prune(mixture.architecture()))
    cell = compact.get_submodule("parts.upper.fabric.cells.5_0")
    whole = mixture.get_submodule("parts.upper.fabric.cells.5_0.keep").weight
    assert cell.nodes == nodes
    width = 8
    column = slice(width * (nodes[0] - 1), width * nodes[0])
    assert torch.equal(cell.get_submodule("keep").weight, whole[:, column])
    assert_same_outputs(mixture, compact, fold(compact))


def test_from_a_compact_network_with_constant_cells() -> None:
    mixture = make_supernet(seed=4, relaxation="sparsemax", shared_alpha=False)
    with torch.no_grad():
        for alpha, beta in zip(mixture.alphas.values(), mixture.betas.values(), strict=True):
            alpha.zero_()
            beta.zero_()
            alpha[4, 0] = torch.tensor(ZERO)
    first = derived(mixture, prune(mixture.architecture()))
    again = derived(first, prune(first.architecture()))
    assert "constant" in dict(
        again.get_submodule("parts.upper.fabric.cells.4_1").named_parameters()
    )
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items()
    )
    assert_same_outputs(mixture, first, again)


def test_copies_share_no_memory_and_change_nothing_at_the_source() -> None:
    mixture = mixture_with([OTHERS, OTHERS, OTHERS])
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    compact = derived(mixture, prune(mixture.architecture()))
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], v) for name, v in mixture.state_dict().items())
