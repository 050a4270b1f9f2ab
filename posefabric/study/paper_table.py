"""The table of the paper's experiments: figures here, figures published, reasons."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from posefabric.study.paper import PREFIX, UNIT, Compared, PaperRow


def paper_table(rows: Sequence[PaperRow]) -> Table:
    """One line a configuration; a star where figures differ by more than 1 %."""
    table = Table(title="The paper's experiments: here / published")
    table.add_column("paper/...", no_wrap=True)
    for title in ("used, M", "counted, M", "MACs, G", "published"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name.removeprefix(PREFIX),
            f"{row.params_used:.2f}",
            _pair(row.params),
            _pair(row.macs),
            row.result,
        )
    table.caption = (
        "used: parameters of the network; counted: as the paper counts them; G = 2^30 unless said "
        "below; published: PCKh@0.5 / @0.1 of MPII or AP of COCO; * differs by more than 1 %"
    )
    return table


def reasons(rows: Sequence[PaperRow]) -> list[str]:
    """A line for every configuration of which there is something to say."""
    lines = []
    for row in rows:
        said = [row.why] if row.why else []
        if row.backbone.published is not None:
            said.insert(0, f"backbone {_pair(row.backbone)} M")
        if row.unit != UNIT:
            said.append(f"G = {row.unit:.0e} here, which is what the published figure fits")
        if said:
            lines.append(f"{row.name.removeprefix(PREFIX)}: {'; '.join(said)}")
    return lines


def _pair(figure: Compared) -> str:
    if figure.published is None:
        return f"{figure.here:.2f} / -"
    return f"{figure.here:.2f} / {figure.published:g}{'' if figure.agrees else ' *'}"
