"""Where a network's cost goes: its backbone and each of its parts."""

from __future__ import annotations

from posefabric.deploy.report import Cell, Section
from posefabric.deploy.report_headline import NONE, Networks
from posefabric.space.architecture import Architecture
from posefabric.structures import PosefabricError

BACKBONE = "backbone"


def macs_by_part(graph: Architecture) -> dict[str, int]:
    """``backbone`` and each part to its multiply-adds of a picture, by the graph.

    A part's are those of its 1x1 convolutions, cells and head.
    """
    # Here, since counting needs torch, and a report does without it.
    from posefabric.derive.fit_budget import whole_cost
    from posefabric.derive.prune import prune
    from posefabric.space.cost import part_cost

    graph = prune(graph)
    parts = {part.name: part_cost(part, graph).macs for part in graph.parts}
    return {BACKBONE: whole_cost(graph).macs - sum(parts.values()), **parts}


def cost_section(networks: Networks) -> Section:
    """Multiply-adds by part, a column a network; and what the last one kept of each part."""
    from posefabric.derive.prune import prune

    section = Section("Where the cost goes")
    graphs: dict[str, Architecture] = {}
    for name, network in networks.items():
        graph = network.get("architecture")
        if isinstance(graph, Architecture):
            graphs[name] = graph
    costs = {}
    for name, graph in graphs.items():
        try:
            costs[name] = macs_by_part(graph)
        except PosefabricError as error:
            # A backbone that this timm does not have.
            section.add_text(f"{name}: {error}")
    if not costs:
        return section
    last = graphs[list(costs)[-1]]
    kept = {part.name: part for part in prune(last).parts}
    rows: list[list[Cell | str]] = []
    for place in costs[list(costs)[-1]]:
        row: list[Cell | str] = [place.replace("_", " ")]
        for cost in costs.values():
            macs = cost.get(place, 0)
            share = macs / max(1, sum(cost.values()))
            row.append(Cell(f"{macs / 1e6:.1f} M, {share:.0%}", bar=share))
        part = kept.get(place)
        if part is None:
            row += [NONE, NONE]
        else:
            row += [str(len(part.cells)), str(sum(len(cell.sources) for cell in part.cells))]
        rows.append(row)
    names = list(costs)
    return section.add_table(
        ["", *names, f"cells, {names[-1]}", f"sources, {names[-1]}"],
        rows,
        caption="Multiply-adds of one picture for all that weighs something, and their share; "
        "evaluated, a mixture computes what weighs nothing too.",
    )
