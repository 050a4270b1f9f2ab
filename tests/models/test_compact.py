"""A network built from a graph alone."""

from __future__ import annotations

import torch
from networks import make_supernet, shake

from posefabric.derive.prune import prune
from posefabric.models.compact import build_compact
from posefabric.space.architecture import Architecture
from posefabric.space.fabric import CellWeights

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make() -> Architecture:
    return prune(make_supernet(seed=2, relaxation="sparsemax").architecture())


def test_the_graph_is_all_it_needs() -> None:
    graph = Architecture.from_json(make().to_json())
    network = build_compact(graph).eval()
    assert network.architecture() == graph
    assert network.backbone.channels == graph.backbone.channels
    other = build_compact(graph).eval()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network(IMAGES), other(IMAGES))
        assert network(IMAGES).shape == (1, 4, 16, 16)
    assert not network.folded


def test_its_weights_are_those_of_the_graph() -> None:
    graph = make()
    network = build_compact(graph).eval()
    shake(network, 1)
    for part in graph.parts:
        own = network.cell_weights(part)
        assert own == [CellWeights.of_graph(cell) for cell in part.cells]
    with torch.no_grad():
        before = network(IMAGES)
        doubled = {
            part.name: [
                CellWeights(
                    sources=[2.0 * w for w in weights.sources],  # type: ignore[operator]
                    choices=weights.choices,
                )
                for weights in network.cell_weights(part)
            ]
            for part in graph.parts
        }
        network.set_cell_weights(doubled)
        assert network.cell_weights(graph.parts[0]) is doubled[graph.parts[0].name]
        assert not torch.allclose(network(IMAGES), before)


def test_a_grown_graph_changes_the_modules() -> None:
    graph = make()
    whole = make_supernet(seed=2, relaxation="sparsemax").architecture()
    small, large = build_compact(graph), build_compact(whole)
    count = [sum(p.numel() for p in n.parameters()) for n in (small, large)]
    assert count[0] < count[1]
    assert set(small.state_dict()) <= set(large.state_dict())
