"""Random architectures of a space, and those of a given cost."""

from __future__ import annotations

import pytest
import torch
from networks import make_supernet

from posefabric.budget import Budget
from posefabric.config import DeriveConfig
from posefabric.derive.draw import draw, draw_within, kept
from posefabric.derive.fit_budget import whole_cost
from posefabric.models.supernet import Supernet
from posefabric.structures import PosefabricError

SETTINGS = DeriveConfig(operations_kept=1, threshold=0.25)


def drawn_macs(network: Supernet) -> int:
    return whole_cost(kept(network.architecture(), SETTINGS)).macs


def test_a_draw_is_standard_normal_and_comes_from_its_generator() -> None:
    network, other = make_supernet(shared_alpha=False), make_supernet(shared_alpha=False)
    values = []
    for seed in range(40):
        draw(network, torch.Generator().manual_seed(seed))
        values += [p.detach().flatten().clone() for p in network.arch_parameters().values()]
    everything = torch.cat(values)
    assert abs(float(everything.mean())) < 0.1 and abs(float(everything.std()) - 1) < 0.1
    draw(other, torch.Generator().manual_seed(39))
    for name, parameter in other.arch_parameters().items():
        assert torch.equal(parameter, network.arch_parameters()[name])


def test_what_is_kept_has_one_operation_and_the_sources_above_the_threshold() -> None:
    network = make_supernet(shared_alpha=False)
    draw(network, torch.Generator().manual_seed(0))
    graph = kept(network.architecture(), SETTINGS)
    cells = [cell for part in graph.parts for cell in part.cells]
    assert {len(edge.choices) for cell in cells for edge in cell.edges} == {1}
    assert len({len(cell.sources) for cell in cells}) > 1
    for cell in cells:
        total = sum(source.weight for source in cell.sources)
        assert all(source.weight >= 0.25 * total for source in cell.sources)


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_within_a_budget(seed: int) -> None:
    network = make_supernet(shared_alpha=False)
    draw(network, torch.Generator().manual_seed(100))
    limit = drawn_macs(network) * 1.02
    draw_within(network, torch.Generator().manual_seed(seed), SETTINGS, Budget("macs", limit))
    assert 0.95 * limit <= drawn_macs(network) <= limit


def test_a_cost_that_no_architecture_has_is_told_with_those_there_are(monkeypatch) -> None:
    monkeypatch.setattr("posefabric.derive.draw.DRAWS", 20)
    network = make_supernet()
    with pytest.raises(PosefabricError) as caught:
        draw_within(network, torch.Generator().manual_seed(0), SETTINGS, Budget("macs", 1000))
    assert "macs=1K" in str(caught.value) and "none came within 5% below it" in str(caught.value)
    assert "they have macs=" in str(caught.value)
