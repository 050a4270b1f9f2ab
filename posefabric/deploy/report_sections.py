"""The sections of a run's report, each a pure function of plain results.

A *network* here is a mapping with what is known of one network: ``evaluation`` (as evaluate
writes it: ``pck``, ``oks``, ``pckh``), ``profile`` (params, macs, latency_ms, head_*) and
``architecture``; every one may be missing. Networks are named, in the order of the columns; the
first is the one the others are compared with (mixture, then compact).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posefabric.deploy.charts import Series
from posefabric.deploy.export_text import cells_of, headers_of, measure_names, table_caption
from posefabric.deploy.metro import architecture_image, describe_architecture
from posefabric.deploy.report import Cell, Section
from posefabric.deploy.report_cost import cost_section
from posefabric.deploy.report_headline import (
    NONE,
    Networks,
    change_cell,
    headline_section,
    is_number,
    pck_of,
    percent,
)
from posefabric.space.architecture import Architecture
from posefabric.space.baseline import Baseline
from posefabric.structures import PosefabricError

Records = Mapping[str, Sequence[Mapping[str, Any]]]

_CURVES = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "alpha_entropy": "entropy of alpha (operations)",
    "beta_entropy": "entropy of beta (sources)",
    "images_per_s": "pictures a second",
}


def report_sections_from(
    *,
    facts: Mapping[str, Any],
    networks: Networks,
    records: Records | None = None,
    pictures: Mapping[str, np.ndarray] | None = None,
    onnx: Mapping[str, Any] | None = None,
    shipped: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
    environment: Mapping[str, Any] | None = None,
) -> list[Section]:
    """All sections for which there is something to say, in the order of a report.

    Args:
        facts: what was searched: label to value (skeleton, backbone, parts, strategy, budget,
            seeds, data, box source, hardware).
        networks: see the module.
        records: run name to its metrics, one mapping a step.
        pictures: caption to sheet, (H, W, 3) uint8 RGB.
        onnx: label to value of the export's check.
        shipped: the export's table, as export_table makes it.
        commands: shell lines that reproduce the run.
        environment: label to value.
    """
    sections = [headline_section(networks), facts_section(facts)]
    for section in (
        fabrics_section(networks),
        cost_section(networks),
        curves_section(records or {}),
        joints_section(networks),
        parts_section(networks),
        pictures_section(pictures or {}),
    ):
        if section.blocks:
            sections.append(section)
    if shipped:
        sections.append(shipped_section(shipped))
    if onnx:
        sections.append(Section("ONNX check").add_facts(onnx))
    if commands:
        sections.append(Section("Reproduce").add_code("\n".join(commands)))
    if environment:
        sections.append(Section("Environment").add_facts(environment))
    return sections


def facts_section(facts: Mapping[str, Any]) -> Section:
    title = "What was trained" if "network" in facts else "What was searched"
    return Section(title).add_facts(facts)


def fabrics_section(networks: Networks) -> Section:
    """The drawn architectures; as text only where matplotlib is missing."""
    section = Section("Architectures")
    graphs: dict[str, Architecture | Baseline] = {}
    for name, network in networks.items():
        if network.get("architecture") is not None:
            graphs[name] = network["architecture"]
    for name, graph in graphs.items():
        caption = f"{name}, {graph.digest()}"
        if isinstance(graph, Baseline):
            section.add_text(f"{caption}: a baseline, {graph.network}; nothing in it is searched.")
            section.add_details(f"{name} as text", describe_architecture(graph))
            continue
        try:
            data = architecture_image(graph, title=name, columns=2)
        except PosefabricError as error:
            section.add_text(f"{name}: {error}")
        else:
            section.add_figure(data, caption=caption, least_width=820)
        section.add_details(f"{name} as text", describe_architecture(graph))
    return section


def curves_section(records: Records) -> Section:
    """Loss, learning rate, entropies and validation over the steps; a line a run and phase."""
    section = Section("Training")
    phases = {name: _phases(rows) for name, rows in records.items()}
    validated = {key for rows in records.values() for row in rows for key in row}
    titles = dict(_CURVES)
    titles.update({key: _validation_title(key) for key in sorted(validated) if "val_" in key[:4]})
    charts: dict[str, list[Series]] = {}
    for key, title in titles.items():
        lines = []
        colour = 0
        for name, by_phase in phases.items():
            for phase, rows in by_phase.items():
                found = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
                label = name if len(by_phase) == 1 else f"{name}, {phase}"
                if found:
                    x, y = zip(*found, strict=True)
                    lines.append(Series(label, x, y, colour=colour))
                colour += 1
        if lines:
            charts[title] = lines
    return section.add_charts(charts) if charts else section


def joints_section(networks: Networks) -> Section:
    """PCK of every keypoint, a column a network."""
    tables = {name: pck_of(network).get("per_joint") or {} for name, network in networks.items()}
    return _shares_section("Keypoints", "keypoint", tables)


def parts_section(networks: Networks) -> Section:
    """PCK of every part: as evaluated, or the mean over the part's annotated joints."""
    tables = {}
    for name, network in networks.items():
        pck = pck_of(network)
        tables[name] = pck.get("per_part") or _parts_from_joints(pck, network.get("architecture"))
    return _shares_section("Parts", "part", tables)


def shipped_section(table: Mapping[str, Any]) -> Section:
    """The exported files: size, accuracy and loss, latency by runtime and batch size."""
    measures = measure_names(table)
    sizes = list(table["rows"][0]["latency"])
    rows: list[list[Cell | str]] = []
    for row in table["rows"]:
        cells: list[Cell | str] = list(cells_of(row, measures, sizes))
        if not row.get("written", True):
            cells[0] = Cell(f"{row['variant']} (lost too much, not written)", tone="bad")
        rows.append(cells)
    section = Section("Shipped").add_table(headers_of(measures, sizes), rows)
    return section.add_text(table_caption(table).replace("\n", "\n\n"))


def pictures_section(pictures: Mapping[str, np.ndarray]) -> Section:
    section = Section("Pictures")
    if pictures:
        section.add_text(
            "Predictions are solid: left side warm, right side cool, neutral between; joints with "
            "low scores are faint or left out. Ground truth is thin, white and dashed. The "
            "caption is the person's row, the mean error in units of sqrt(box area), and the "
            "annotated joints within 0.2 torsos."
        )
    for caption, image in pictures.items():
        section.add_image(image, caption=caption)
    return section


def _shares_section(
    title: str, noun: str, tables: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Section:
    section = Section(title)
    tables = {name: table for name, table in tables.items() if table}
    rows: list[list[Cell | str]] = []
    names = list(dict.fromkeys(key for table in tables.values() for key in table))
    for key in names:
        entries = [table.get(key) or {} for table in tables.values()]
        values = [entry.get("value") for entry in entries]
        count = next((entry["count"] for entry in entries if "count" in entry), None)
        row: list[Cell | str] = [key.replace("_", " ")]
        row += [Cell(percent(value), bar=value) for value in values]
        if len(tables) > 1:
            row.append(change_cell(values[0], values[-1], False) or Cell(NONE))
        row.append(NONE if count is None else str(count))
        rows.append(row)
    if rows:
        change = ["change"] if len(tables) > 1 else []
        caption = "Share of annotated joints found, percent."
        section.add_table([noun, *tables, *change, "joints"], rows, caption=caption)
    return section


def _parts_from_joints(
    pck: Mapping[str, Any], graph: Architecture | Baseline | None
) -> dict[str, dict[str, Any]]:
    joints = pck.get("per_joint") or {}
    if graph is None or not joints:
        return {}
    parts = {}
    for part in graph.parts:
        entries = [joints.get(graph.keypoint_names[k]) or {} for k in part.keypoints]
        known = [e for e in entries if e.get("value") is not None and e.get("count")]
        count = sum(entry["count"] for entry in known)
        found = sum(entry["value"] * entry["count"] for entry in known)
        parts[part.name] = {"value": found / count if count else None, "count": count}
    return parts


def _phases(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if is_number(row.get("step")):
            phases.setdefault(str(row.get("phase", "")), []).append(row)
    return phases


def _validation_title(key: str) -> str:
    return "validation " + key.removeprefix("val_").replace("_", " ")
