"""Derivation inside a budget."""

from __future__ import annotations

import pytest
import torch
from networks import command, make_compact, make_supernet

from posefabric.budget import Budget
from posefabric.config import load_config
from posefabric.derive.fit_budget import fit_budget, whole_cost
from posefabric.derive.fold import fold
from posefabric.derive.prune import prune
from posefabric.evaluate.profile import profile
from posefabric.run import RunFolder
from posefabric.space.architecture import Architecture
from posefabric.space.cost import fabrics_cost
from posefabric.structures import PosefabricError


@pytest.fixture(scope="module")
def graph() -> Architecture:
    return prune(make_supernet(seed=5).architecture())


@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_the_network_fits_its_budget(graph: Architecture, measure: str, share: float) -> None:
    whole, searched = whole_cost(graph), fabrics_cost(graph)
    limit = getattr(whole, measure) - (1 - share) * getattr(searched, measure)
    found = fit_budget(graph, Budget(measure, limit))  # type: ignore[arg-type]
    built = profile(fold(make_compact(found)), found.input_wh, repeats=1, warmup=0)
    assert built["macs"] == pytest.approx(whole_cost(found).macs, rel=0.01)
    assert built["params"] == pytest.approx(whole_cost(found).params, rel=0.01)
    spent = getattr(whole_cost(found), measure)
    assert spent <= limit
    # Dropping a level's last reader saves much at once: the backbone's last stages.
    assert found == graph if share == 1.0 else spent > 0.6 * limit


def test_sums_of_weights_stay(graph: Architecture) -> None:
    limit = whole_cost(graph).macs * 0.8
    found = fit_budget(graph, Budget("macs", limit))
    before = {(p.name, c.layer, c.scale): c for p in graph.parts for c in p.cells}
    for part in found.parts:
        for cell in part.cells:
            was = before[part.name, cell.layer, cell.scale]
            assert sum(s.weight for s in cell.sources) == pytest.approx(
                sum(s.weight for s in was.sources)
            )
            for edge, old in zip(cell.edges, was.edges, strict=True):
                assert edge.choices and sum(c.weight for c in edge.choices) == pytest.approx(
                    sum(c.weight for c in old.choices)
                )
    with torch.no_grad():
        outputs = make_compact(found).eval()(torch.zeros(1, 3, 64, 64))
    assert torch.isfinite(outputs).all()


def test_what_cannot_fit_says_what_could(graph: Architecture) -> None:
    with pytest.raises(PosefabricError, match=r"budget=macs=1K: the smallest .* raise the budget"):
        fit_budget(graph, Budget("macs", 1000))


@pytest.mark.parametrize(
    "text", ["0.3G", "macs=fast", "latency=8", "latency=0ms", "macs=0", "params=2T"]
)
def test_a_budget_is_written_one_way(text: str) -> None:
    with pytest.raises(PosefabricError, match=r"macs=0\.3G"):
        load_config("demo", [f"search.budget={text}"])
    assert str(Budget.parse("macs=300M")) == "macs=300M"
    assert Budget.parse("params=2.5M").limit == 2.5e6
    assert str(Budget.parse("latency=8.5ms")) == "latency=8.5ms"


def test_search_and_derive_take_a_budget(tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    options = [
        "data.format=synthetic",
        "data.synthetic_train=16",
        "data.synthetic_val=4",
        "data.input_wh=[32,32]",
        "model.channel_factor=2",
        "search.epochs=1",
        "search.worth_persons=8",
        "search.log_every=1",
        "search.sparsity_start=0",
    ]
    made = ["search", "demo", *options, "--out", run, "--budget", "macs=9M"]
    assert command(monkeypatch, *made) == 0
    assert command(monkeypatch, "derive", run) == 0
    assert "within macs=9M" in capsys.readouterr().out
    assert RunFolder.open(run).resolve("compact").read_json("derivation.json")["macs"] <= 9e6
    assert command(monkeypatch, "derive", run, "--budget", "macs=1M") == 1
    assert "the smallest network of this search has" in capsys.readouterr().err
