"""The paper's experiments: every configuration built, its size set beside the published one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from posefabric.config import Config, load_config, shipped_configs
from posefabric.evaluate.profile import count_macs, count_parameters
from posefabric.models.build import build_baseline, build_supernet
from posefabric.models.network import FabricNetwork, PoseNetwork
from posefabric.space.architecture import Architecture
from posefabric.space.operations import build_operation

PREFIX = "paper/"
UNIT = 2.0**30
TOLERANCE = 0.01


@dataclass(frozen=True)
class Compared:
    """One figure here and in the paper.

    Attributes:
        here: millions of parameters, or multiply-adds in the paper's unit.
        published: as printed, with one decimal; None where nothing is published.
    """

    here: float
    published: float | None

    @property
    def agrees(self) -> bool | None:
        """Within 1 %, or equal when rounded as printed."""
        if self.published is None:
            return None
        difference = abs(self.here - self.published)
        return difference <= max(TOLERANCE * self.published, 0.05 + 1e-9)


@dataclass(frozen=True)
class PaperRow:
    """A configuration's figures; ``params`` is compared as the paper counts.

    Attributes:
        params_used: millions of parameters that the network uses.
        params: the same, with the second input node's operations where the paper counts them.
        backbone: millions of parameters of the backbone.
        macs: multiply-adds in ``unit``.
        result: what the paper reports.
        why: the reason of a difference above 1 %.
    """

    name: str
    params_used: float
    params: Compared
    backbone: Compared
    macs: Compared
    unit: float
    result: str
    why: str

    @property
    def unexplained(self) -> bool:
        figures = (self.params, self.backbone, self.macs)
        return not self.why and any(figure.agrees is False for figure in figures)


def paper_configs() -> list[str]:
    """The names of the shipped configurations of the paper."""
    return [name for name in shipped_configs() if name.startswith(PREFIX)]


def published() -> dict[str, dict[str, Any]]:
    """What the paper says of each configuration, by its name without ``paper/``."""
    path = Path(str(resources.files("posefabric"))) / "configs" / "paper" / "_published.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def paper_rows(names: list[str] | None = None) -> Iterator[PaperRow]:
    """Build each configuration, without ImageNet weights, and count (PAPER section 5)."""
    said = published()
    for name in paper_configs() if names is None else names:
        own = said.get(name.removeprefix(PREFIX), {})
        yield compare_with_paper(name, load_config(name), own)


def compare_with_paper(name: str, config: Config, said: dict[str, Any]) -> PaperRow:
    """Build a configuration and set its figures beside the published ones."""
    build = build_supernet if config.model.network == "fabric" else build_baseline
    network: PoseNetwork = build(config, pretrained=False).eval()
    width, height = config.data.input_wh
    with torch.no_grad():
        macs = count_macs(lambda: network(torch.zeros(1, 3, height, width)))
    used = count_parameters(network)
    counted = used + (second_node_parameters(network) if said.get("second_node") else 0)
    unit = float(said.get("unit", UNIT))
    return PaperRow(
        name=name,
        params_used=used / 1e6,
        params=Compared(counted / 1e6, said.get("params")),
        backbone=Compared(count_parameters(network.backbone) / 1e6, said.get("backbone")),
        macs=Compared(macs / unit, said.get("macs")),
        unit=unit,
        result=str(said.get("result", "")),
        why=str(said.get("why", "")),
    )


def second_node_parameters(network: nn.Module) -> int:
    """Parameters of the operations on the edges from a second input node (PAPER section 5).

    The released code can build that node, and then one more edge to every hidden node, without
    ever feeding it; the paper's counts include them.
    """
    if not isinstance(network, FabricNetwork):
        return 0
    graph = network.architecture()
    assert isinstance(graph, Architecture)
    total = 0
    for part in graph.parts:
        for cell in part.cells:
            nodes = {edge.end for edge in cell.edges}
            names = {choice.operation for edge in cell.edges for choice in edge.choices}
            per_edge = sum(count_parameters(build_operation(n, cell.width)) for n in names)
            total += per_edge * len(nodes)
    return total
