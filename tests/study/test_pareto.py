"""The front of costs and values, and its picture."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from posefabric.study.pareto import Point, pareto_front, plot_pareto

POINTS = [
    Point("cheap", 1, 50),
    Point("middle", 2, 60, 1.5),
    Point("dominated", 3, 55),
    Point("dear", 4, 70),
    Point("as dear, worse", 4, 60),
]


def test_the_front_is_what_no_other_beats() -> None:
    assert [p.name for p in pareto_front(POINTS)] == ["cheap", "middle", "dear"]
    twins = [Point("a", 1, 1), Point("b", 1, 1)]
    assert pareto_front(twins) == twins, "equal ones do not beat each other"
    assert pareto_front([]) == []


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_pareto(POINTS, tmp_path / "p.png", x_label="x", y_label="y")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_none(tmp_path: Path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not plot_pareto(POINTS, tmp_path / "p.png", x_label="x", y_label="y")
    assert not list(tmp_path.iterdir())
