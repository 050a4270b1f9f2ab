"""Costs of a graph's pieces against what torch counts in the network built from it."""

from __future__ import annotations

import pytest
import torch
from networks import EVERY, PLAIN, make_compact, make_supernet

from posefabric.derive.discretize import discretize
from posefabric.derive.fold import fold
from posefabric.derive.prune import prune
from posefabric.evaluate.profile import count_macs, count_parameters
from posefabric.space.cost import Cost, fabrics_cost, operation_cost

CASES = {
    "plain": dict(),
    "every operation": dict(operations=EVERY),
    "two hidden nodes": dict(operations=PLAIN, hidden_nodes=2),
    "vectors": dict(head="vector"),
    "volume of vectors": dict(head="vector3d"),
    "alpha a cell": dict(shared_alpha=False, seed=3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kept", [None, 1])
def test_a_graph_costs_what_its_network_computes(case: dict, kept: int | None) -> None:
    graph = prune(make_supernet(**case).architecture())
    if kept is not None:
        graph = prune(discretize(graph, operations_kept=kept, sources_kept=kept))
    network = make_compact(graph).eval()
    with torch.no_grad():
        levels = network.backbone(torch.zeros(1, 3, 64, 64))
        macs = count_macs(lambda: network.head_forward(levels))
    cost = fabrics_cost(graph)
    assert cost.macs == macs
    folded = fold(network)
    held = count_parameters(folded.parts)
    # A skip whose factor cannot be moved elsewhere becomes a scale a channel.
    assert cost.params == pytest.approx(held, rel=0.02)
    assert kept is None or cost.params == held


def test_a_separable_convolution_by_hand() -> None:
    """Twice: 9 c weights for 3x3 depthwise, c^2 pointwise and a bias each."""
    assert operation_cost("sep_conv_3x3", 8, (4, 6)) == Cost(
        macs=2 * 24 * (9 * 8 + 64), params=2 * (72 + 64 + 8)
    )
    assert operation_cost("skip", 8, (4, 6)) == operation_cost("zero", 8, (4, 6)) == Cost()
    assert operation_cost("max_pool_3x3", 8, (4, 6)) == Cost(0, 16)
