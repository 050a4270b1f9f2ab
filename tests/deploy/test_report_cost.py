"""Where the cost goes, against what torch counts."""

from __future__ import annotations

import torch
from networks import make_supernet

from posefabric.config import DeriveConfig
from posefabric.deploy.report_cost import cost_section, macs_by_part
from posefabric.derive.draw import draw, kept
from posefabric.evaluate.profile import count_macs
from posefabric.models.compact import build_compact


def test_the_parts_and_the_backbone_are_what_torch_counts() -> None:
    mixture = make_supernet()
    draw(mixture, torch.Generator().manual_seed(1))
    graph = kept(mixture.architecture(), DeriveConfig(operations_kept=1, sources_kept=2))
    network = build_compact(graph).eval()
    images = torch.zeros(1, 3, *reversed(graph.input_wh))
    with torch.no_grad():
        pyramid = network.backbone(images)
        backbone = count_macs(lambda: network.backbone(images))
        whole = count_macs(lambda: network(images))
        parts = {
            part.name: count_macs(
                lambda part=part: network.parts[part.name](pyramid, network.cell_weights(part))
            )
            for part in graph.parts
        }
    found = macs_by_part(graph)
    assert found == {"backbone": backbone, **parts}
    assert sum(found.values()) == whole


def test_the_section_compares_networks_and_counts_what_the_last_kept() -> None:
    mixture = make_supernet()
    whole = mixture.architecture()
    draw(mixture, torch.Generator().manual_seed(2))
    compact = kept(mixture.architecture(), DeriveConfig(operations_kept=1, sources_kept=1))
    section = cost_section(
        {"mixture": {"architecture": whole}, "compact": {"architecture": compact}}
    )
    (table,) = section.blocks
    for part in compact.parts:
        assert f">{part.name.replace('_', ' ')}<" in table
        assert f"{macs_by_part(compact)[part.name] / 1e6:.1f} M" in table
    assert "cells, compact" in table and "backbone" in table
    assert not cost_section({"nothing": {}}).blocks
