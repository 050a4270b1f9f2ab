"""The table of exported files in words: headers, cells and caption, for terminal and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

MEASURES = ("PCK", "PCKh", "AP")


def measure_names(table: Mapping[str, Any]) -> list[str]:
    """Those of MEASURES that the table's rows have."""
    return [name for name in MEASURES if any(name in row for row in table["rows"])]


def printable(table: Mapping[str, Any]) -> Table:
    """The table for a terminal."""
    measures = measure_names(table)
    sizes = list(table["rows"][0]["latency"])
    made = Table(caption=table_caption(table), caption_justify="left")
    headers = headers_of(measures, sizes)
    for k, header in enumerate(headers):
        made.add_column(header, justify="right" if k else "left")
    for row in table["rows"]:
        made.add_row(*cells_of(row, measures, sizes))
    return made


def headers_of(measures: Sequence[str], sizes: Sequence[str]) -> list[str]:
    """The columns' titles, for the terminal and the report."""
    return [
        "variant",
        "MB",
        *(f"{name}, %" for name in measures),
        *(["loss, points"] if measures else []),
        *(f"ms, batch {size}" for size in sizes),
        *([f"times torch, batch {sizes[0]}"] if sizes else []),
    ]


def cells_of(row: Mapping[str, Any], measures: Sequence[str], sizes: Sequence[str]) -> list[str]:
    """One row's texts, as headers_of has the columns."""
    cells = [row["variant"], "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"]
    cells += [f"{row[name]:.2f}" if name in row else "–" for name in measures]
    if measures:
        losses = (row.get("loss") or {}).values()
        cells.append(f"{max(losses):+.2f}" if losses else "–")
    for size in sizes:
        found = row["latency"][size]
        cells.append(f"{found['ms']:.2f} ({found['low']:.2f} to {found['high']:.2f})")
    if sizes:
        cells.append(f"{row['latency'][sizes[0]]['ratio']:.2f}")
    return cells


def table_caption(table: Mapping[str, Any]) -> str:
    """Under which conditions the table was made, in words."""
    given, machine = table["conditions"], table["machine"]
    said = [
        f"{machine['cpu']}, {given['threads']} threads; a whole batch: median of "
        f"{given['latency_rounds']} rounds (first to last decile), all in one run"
    ]
    if measure_names(table):
        said.append(
            f"accuracy on {given['persons']} persons of {given['data']}, flip test "
            f"{'on' if given['flip'] else 'off'}, through each runtime; the loss is the largest "
            f"of the measures', against {given['losses_against']}"
        )
    return "\n".join(said)
