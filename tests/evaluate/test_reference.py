"""The comparison with reference values: what passes, what does not, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import command
from released import make_state, specification

from posefabric.evaluate.reference import (
    Difference,
    compare_reference,
    fill_by_name,
    find_references,
    reference_quantities,
    relative_difference,
)
from posefabric.models.posenfs import load_posenfs
from posefabric.structures import PosefabricError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reference of a small network, made here."""
    spec = specification(depth=4, factor=1)
    state = make_state(spec)
    network = load_posenfs(spec, state)
    sizes = [2, 3, 64, 64], [2, 17, 16, 16]
    values = reference_quantities(network, *sizes, arch=network.arch_parameters())
    spec |= {"input": sizes[0], "output": sizes[1], "loss_train": values.pop("loss").item()}
    spec["state"] = {name: list(value.shape) for name, value in state.items()}
    (tmp_path / "small.json").write_text(json.dumps(spec))
    arrays: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
    np.savez(tmp_path / "small.npz", **arrays)
    return tmp_path


def change(folder: Path, name: str, factor: float) -> None:
    with np.load(folder / "small.npz") as stored:
        values = {key: stored[key].astype(np.float64) for key in stored}
    values[name].flat[int(np.abs(values[name]).argmax())] *= 1 + factor
    np.savez(folder / "small.npz", **values)


def test_the_quantities_and_their_limits(folder: Path, monkeypatch, capsys) -> None:
    (path,) = find_references(folder)
    rows = {row.quantity: row for row in compare_reference(path)}
    assert list(rows) == [
        "heatmaps_train",
        "heatmaps_eval",
        "loss",
        "grad.whole_body.alphas",
        "grad.whole_body.betas",
    ]
    assert all(row.passed and row.difference < 1e-12 for row in rows.values())
    assert [row.limit for row in rows.values()] == [1e-6, 1e-6, 1e-8, 1e-8, 1e-8]
    assert command(monkeypatch, "reference", folder) == 0
    assert "all within their limits" in capsys.readouterr().out
    # Above the limit of a gradient, below that of heatmaps.
    change(folder, "heatmaps_eval", 1e-7)
    change(folder, "grad.whole_body.betas", 1e-7)
    failed = [row.quantity for row in compare_reference(path) if not row.passed]
    assert failed == ["grad.whole_body.betas"]
    assert command(monkeypatch, "reference", folder) == 1
    captured = capsys.readouterr()
    assert captured.out.count("TOO LARGE") == 1 and "1 quantities differ" in captured.err


def test_references_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PosefabricError, match="holds no reference, expected NAME"):
        find_references(tmp_path / "elsewhere")
    path = folder / "small.json"
    with np.load(folder / "small.npz") as stored:
        values = dict(stored)
    del values["heatmaps_eval"]
    np.savez(folder / "small.npz", **values)
    with pytest.raises(PosefabricError, match=r"small\.json: heatmaps_eval: only one side"):
        compare_reference(path)
    path.write_text("{}")
    with pytest.raises(PosefabricError, match=r"small\.json: not a readable reference"):
        compare_reference(path)


def test_differences_are_relative_to_the_largest_value() -> None:
    assert relative_difference(np.array([1.0, -4.0]), np.array([2.0, -4.0])) == 0.25
    assert relative_difference(np.zeros(2), np.zeros(3)) == np.inf
    assert not Difference("x", float("nan"), 1.0).passed


def test_values_follow_from_names_alone() -> None:
    one, two = (fill_by_name({"a.weight": (2, 3), **more}) for more in ({}, {"b.bias": (4,)}))
    assert (one["a.weight"] == two["a.weight"]).all()
    assert two["b.bias"].abs().max() < 0.5
    final = fill_by_name({"x.final_layer.weight": (100, 100)})["x.final_layer.weight"]
    assert final.std() == pytest.approx(0.025, rel=0.05)
