"""Latency tables: pieces, sums, fits, and budgets on them, from the command line to the network."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import command, make_supernet
from torch import nn

from posefabric.budget import Budget
from posefabric.config import Config, load_config
from posefabric.deploy.latency import (
    agreement,
    check_table,
    fit_line,
    measure_table,
    random_architectures,
    space_pieces,
)
from posefabric.deploy.latency_pieces import REPEATED, SideBySide, fused, piece_runs
from posefabric.derive.fit_budget import fit_budget, whole_cost
from posefabric.derive.fold import fold
from posefabric.models.compact import build_compact
from posefabric.run import RunFolder
from posefabric.space.latency import LatencyTable, Piece
from posefabric.structures import PosefabricError

SMALL = [
    "data.format=synthetic",
    "data.synthetic_train=16",
    "data.synthetic_val=4",
    "data.input_wh=[64,64]",
    "model.backbone=test_efficientnet",
    "model.weights=none",
    "model.channel_factor=2",
    "search.epochs=1",
    "search.log_every=1",
    "search.sparsity_start=0",
    "search.worth_persons=1",
    "search.rounds=2",
]


class Counting:
    """A table in which everything takes 1, and that counts."""

    def __init__(self) -> None:
        self.seen: Counter[Piece] = Counter()

    def of(self, piece: Piece) -> float:
        self.seen[piece] += 1
        return 1.0


def table_of(pieces: set[Piece], **changes: Any) -> LatencyTable:
    ms = {str(piece): 0.01 + 1e-5 * piece.width_in for piece in pieces}
    base = LatencyTable(
        ms=ms, runtime="torch", threads=1, device="x", packages={}, input_wh=(64, 64)
    )
    return replace(base, **changes)


def settings(runtime: str) -> Config:
    return load_config("demo", [*SMALL, f"search.latency_runtime={runtime}"])


def test_the_pieces_are_those_of_every_architecture_that_can_be_derived() -> None:
    mixture = make_supernet(operations=("zero", "skip", "sep_conv_3x3", "max_pool_3x3"))
    table = table_of(space_pieces(mixture.graph), overhead_ms=3.0, factor=2.0)
    graphs = list(random_architectures(mixture, 12, seed=1))
    assert len({graph.digest() for graph in graphs}) == 12
    sizes = [whole_cost(graph, table).ms for graph in graphs]
    assert all(3 < ms <= whole_cost(mixture.graph, table).ms for ms in sizes)
    assert len(set(sizes)) > 6, "small ones and large ones"


def test_a_graph_has_a_piece_for_each_module_of_its_network() -> None:
    mixture = make_supernet(operations=("zero", "skip", "sep_conv_3x3"))
    (graph,) = random_architectures(mixture, 1, seed=2)
    counting = Counting()
    whole_cost(graph, counting)
    kinds = Counter(piece.kind for piece in counting.seen.elements())
    network = build_compact(graph)
    cells = [cell for part in graph.parts for cell in part.cells if cell.edges]
    assert kinds["backbone"] == 1
    # Costs of equal pieces are remembered, so that each kind is asked for once.
    assert {(p.name, p.width_in) for p in counting.seen if p.kind == "operation"} == {
        (choice.operation, cell.width)
        for cell in cells
        for edge in cell.edges
        for choice in edge.choices
        if choice.operation != "zero"
    }
    pointwise = {(p.width_in, p.width_out) for p in counting.seen if p.kind == "pointwise"}
    built = {
        (m.in_channels, m.out_channels)
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and name.endswith(("keep", "head"))
    }
    assert built <= pointwise


def test_a_piece_by_its_side_computes_what_it_says() -> None:
    piece = Piece("source", "finer", 8, 16, (16, 16))
    module = SideBySide(piece, 2).eval()
    x, onto = torch.randn(1, 8, 16, 16), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        expected = onto + 0.5 + module.copies[0](x) + module.copies[1](x)
        assert torch.allclose(module(x, onto), expected)
        before = module(x, onto)
        assert torch.allclose(fused(module)(x, onto), before, atol=1e-5)
    assert REPEATED > 1


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_every_kind_of_piece_can_be_timed(runtime: Any) -> None:
    for piece in (
        Piece("operation", "dil_conv_3x3", 8, 8, (8, 8)),
        Piece("source", "coarser", 16, 8, (4, 4)),
        Piece("source", "same", 8, 8, (8, 8)),
        Piece("pointwise", "conv_1x1", 8, 4, (8, 8)),
        Piece("backbone", "test_efficientnet", 3, 2, (64, 64)),
    ):
        runs = piece_runs(piece, runtime=runtime, threads=1)
        assert set(runs) == ({"with"} if piece.kind == "backbone" else {"with", "without"})
        assert all(run() > 0 for run in runs.values())


def test_the_fit_finds_what_the_networks_are_made_of() -> None:
    sums = [1.0, 2.0, 3.0, 5.0]
    overhead, factor = fit_line(sums, [0.7 + 1.3 * value for value in sums])
    assert overhead == pytest.approx(0.7) and factor == pytest.approx(1.3)
    _, factor = fit_line([1.0, 2.0], [2.0, 1.0])
    assert factor > 0, "more pieces never take less"
    facts = agreement([1.1, 2.0, 2.7], [1.0, 2.0, 3.0])
    assert facts["median_error"] == pytest.approx(0.1) and facts["spearman"] == pytest.approx(1)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_table_is_measured_checked_and_kept(runtime: str, tmp_path: Path) -> None:
    config, said = settings(runtime), []
    table = measure_table(config, fitted=4, say=said.append)
    table = check_table(table, config, count=3)
    assert table.runtime == runtime and said and table.fitted["networks"] == 4
    checked = table.checked
    assert checked is not None and len(checked["measured_ms"]) == 3
    assert all(math.isfinite(v) and v > 0 for v in checked["measured_ms"])
    path = tmp_path / "table.json"
    path.write_text(table.to_json())
    again = LatencyTable.load(path)
    assert again.to_json() == table.to_json()
    backbone = next(name for name in table.ms if name.startswith("backbone"))
    assert table.ms[backbone] > 0


def test_a_budget_on_latency_is_kept() -> None:
    mixture = make_supernet(seed=5)
    table = table_of(space_pieces(mixture.graph))
    graph = mixture.architecture()
    limit = 0.7 * whole_cost(graph, table).ms
    found = fit_budget(graph, Budget("latency", limit), table)
    assert 0.5 * limit < whole_cost(found, table).ms <= limit
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.isfinite(fold(build_compact(found).eval())(images)).all()
    with pytest.raises(PosefabricError, match=r"latency=0.001ms: .* ms by the table; raise"):
        fit_budget(graph, Budget("latency", 0.001), table)


def test_a_table_of_other_conditions_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "table.json"
    path.write_text(table_of(set(), threads=2).to_json())
    for option, words in (
        ("search.latency_runtime=onnxruntime", "measured with runtime torch"),
        ("search.latency_runtime=torch", "measured with threads 2, but search.latency_threads=1"),
    ):
        budget = ["--budget", "latency=9ms", f"search.latency_table={path}", option]
        out = tmp_path / option
        assert command(monkeypatch, "search", "demo", *SMALL, *budget, "--out", out) == 1
        assert words in capsys.readouterr().err


def test_a_fabric_backbone_is_refused() -> None:
    config = load_config("demo", [*SMALL, "model.backbone=fabric_1", "model.frozen_stem=false"])
    with pytest.raises(PosefabricError, match=r"fabric_1: .* not timed; use a budget on macs"):
        measure_table(config, say=print)


def test_what_a_table_does_not_know_it_says() -> None:
    with pytest.raises(PosefabricError, match=r"no operation skip 4>4 at 8x8;.*posefabric latency"):
        table_of(set()).of(Piece("operation", "skip", 4, 4, (8, 8)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0}', '{"version": 1, "ms": {}}'])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(PosefabricError, match=r"table\.json: not a latency table"):
        LatencyTable.load(path)
    with pytest.raises(PosefabricError, match=r"none\.json: not found.*posefabric latency"):
        LatencyTable.load(tmp_path / "none.json")


def test_from_the_table_to_the_network_by_commands(tmp_path: Path, monkeypatch, capsys) -> None:
    path, run = tmp_path / "table.json", tmp_path / "run"
    runtime = "search.latency_runtime=torch"
    made = ["latency", "demo", *SMALL, runtime, "--out", path, "--check", 2]
    assert command(monkeypatch, *made) == 0
    printed = capsys.readouterr().out
    assert "checked: 2 networks" in printed and "Spearman" in printed
    # Invented times, since those of this minute prove nothing.
    tree = json.loads(path.read_text())
    tree["ms"] = {name: 1.0 for name in tree["ms"]}
    tree.update(factor=1.0, overhead_ms=0.0)
    path.write_text(json.dumps(tree))
    budget = ["--budget", "latency=36ms", f"search.latency_table={path}", runtime]
    assert command(monkeypatch, "search", "demo", *SMALL, *budget, "--out", run) == 0
    assert LatencyTable.load(run / "latency.json").ms == tree["ms"]
    readings = [r for r in RunFolder.open(run).metrics() if "expected_latency" in r]
    assert readings and readings[0]["expected_latency"] > 0
    capsys.readouterr()
    assert command(monkeypatch, "derive", run) == 0
    assert "ms by the table, within latency=36ms" in capsys.readouterr().out
    record = RunFolder.open(run).resolve("compact").read_json("derivation.json")
    assert 20 < record["predicted_ms"] <= 36
    assert command(monkeypatch, "derive", run, "--budget", "latency=1ms") == 1
    assert "ms by the table" in capsys.readouterr().err
