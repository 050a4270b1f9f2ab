"""Tables in a file are not cut to a terminal that is not there."""

from __future__ import annotations

import pytest
from rich.table import Table

from posefabric.cli_output import show


def wide() -> Table:
    table = Table("name", "what")
    table.add_row("a" * 60, "b" * 60)
    return table


def test_a_table_is_whole_in_a_file(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show(wide())
    printed = capsys.readouterr().out
    assert "a" * 60 in printed and "b" * 60 in printed


def test_columns_says_otherwise(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    show(wide())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60
