"""The table of the paper's experiments: figures here, figures published, reasons."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from posefabric.study.paper import UNIT, Compared, PaperRow


def paper_table(rows: Sequence[PaperRow]) -> Table:
    """One line a configuration; figures that differ by more than 1 % have a star and a reason."""
    table = Table(title="The paper's experiments: here / published")
    table.add_column("configuration", no_wrap=True)
    for title in ("params used, M", "as the paper counts, M", "multiply-adds", "published result"):
        table.add_column(title, justify="right")
    table.add_column("why it differs")
    for row in rows:
        unit = "" if row.unit == UNIT else " (10^9)"
        why = row.why
        if row.backbone.published is not None:
            why = f"backbone {_pair(row.backbone)} M: {why}"
        table.add_row(
            row.name,
            f"{row.params_used:.2f}",
            _pair(row.params),
            _pair(row.macs) + unit,
            row.result,
            why,
        )
    table.caption = "multiply-adds in units of 2^30 unless said; * differs by more than 1 %"
    return table


def _pair(figure: Compared) -> str:
    if figure.published is None:
        return f"{figure.here:.2f} / -"
    return f"{figure.here:.2f} / {figure.published:g}{'' if figure.agrees else ' *'}"
