"""Search, derive and finetune on few synthetic people, and what each leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trainings import make_config

from posefabric.derive.run_derive import count_choices, derive, finetune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.build import build_supernet, load_network
from posefabric.models.compact import CompactNetwork, build_compact
from posefabric.models.weights import read_weights, save_weights
from posefabric.run import RunFolder
from posefabric.search.run_search import search
from posefabric.space.architecture import Architecture
from posefabric.structures import PosefabricError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = make_config(
        model=dict(parts=3, frozen_stem=True),
        search=dict(epochs=0.75, relaxation="sparsemax", architecture_learning_rate=0.5),
    )
    run = RunFolder.create(tmp_path_factory.mktemp("search") / "run", config=config, kind="search")
    search(run)
    return run


def child_of(run: RunFolder, **settings) -> RunFolder:
    config = run.config.model_copy(update={"derive": run.config.derive.model_copy(update=settings)})
    return run.new_child("derive", config)


def test_a_derivation_without_limits_computes_the_same(searched: RunFolder) -> None:
    child = child_of(searched)
    compact, record = derive(searched, child)
    assert child.state == "finished" and json.loads(
        (child.path / "derivation.json").read_text()
    ) == json.loads(json.dumps(record))
    assert record["parent"] == "run"
    assert record["steps"]["mixture"] == {"cells": 18, "sources": 45, "operations": 72}
    assert record["steps"]["prune"] == count_choices(compact.architecture())
    assert record["steps"]["prune"]["operations"] <= 54, "zero is gone"
    assert set(record["differences"]) == {"prune", "fold"}
    assert all(0 <= value < 1e-5 for value in record["differences"].values())
    with torch.no_grad():
        expected = load_network(searched)(IMAGES)
        assert float((compact(IMAGES) - expected).abs().max() / expected.abs().max()) < 1e-5
        loaded = load_network(child)
        assert isinstance(loaded, CompactNetwork)
        assert torch.equal(loaded(IMAGES), compact(IMAGES))
    assert Architecture.load(child.architecture_path) == compact.architecture()


def test_limits_are_kept_and_what_they_cost_is_said(searched: RunFolder) -> None:
    child = child_of(searched, operations_kept=1, sources_kept=1, threshold=0.05)
    compact, record = derive(searched, child)
    assert list(record["steps"]) == ["mixture", "prune", "threshold", "discretize"]
    assert record["differences"]["discretize"] > 1e-4 > record["differences"]["fold"]
    for part in compact.architecture().parts:
        assert [cell.layer for cell in part.cells] == [3, 4, 5], "one source: a single path"
        for cell in part.cells:
            assert len(cell.sources) == 1 and len(cell.edges[0].choices) == 1
    assert record["steps"]["discretize"] == {"cells": 9, "sources": 9, "operations": 9}


def test_new_weights_are_those_of_before_the_search(searched: RunFolder) -> None:
    kept, record = derive(searched, child_of(searched, operations_kept=1))
    anew, other = derive(searched, child_of(searched, operations_kept=1, inherit=False))
    assert record["inherited"] and not other["inherited"]
    assert anew.architecture() == kept.architecture()
    assert other["accuracy"] == record["accuracy"], "the steps are measured as they are"
    fresh = build_compact(anew.architecture())
    transfer_weights(build_supernet(searched.config), fresh)
    for name, value in fresh.state_dict().items():
        assert torch.equal(anew.state_dict()[name], value), name
    moved = [n for n, v in kept.state_dict().items() if not torch.equal(v, anew.state_dict()[n])]
    assert any(".cells." in name for name in moved)


def test_finetuning_a_derived_network(searched: RunFolder) -> None:
    child = child_of(searched, operations_kept=2)
    derived, _ = derive(searched, child)
    trained_run = child.new_child("train", child.config)
    trained, result = finetune(child, trained_run)
    assert trained_run.state == "finished" and result["train_steps"] == 4
    assert (trained_run.path / "evaluation.json").is_file()
    assert trained.architecture() == derived.architecture()
    assert Architecture.load(trained_run.architecture_path) == derived.architecture()
    before, _ = read_weights(child.weights_path)
    after, _ = read_weights(trained_run.weights_path)
    frozen = {n for n, p in trained.named_parameters() if not p.requires_grad}
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert frozen and not frozen & moved
    assert any(".head." in n for n in moved) and any("backbone" in n for n in moved)
    loaded = load_network(trained_run)
    with torch.no_grad():
        # Not to the last bit: the trained one lies in memory channels last.
        torch.testing.assert_close(loaded(IMAGES), trained.eval()(IMAGES), rtol=1e-4, atol=1e-6)
    assert trained_run.resolve("mixture").path == searched.path


def test_runs_of_the_wrong_kind(searched: RunFolder, tmp_path: Path) -> None:
    child = child_of(searched)
    derive(searched, child)
    with pytest.raises(
        PosefabricError, match="a derive run holds no mixture; derive from a search"
    ):
        derive(child, child_of(searched))
    other = RunFolder.create(tmp_path / "train", config=searched.config, kind="train")
    with pytest.raises(PosefabricError, match="holds a mixture; `posefabric derive` it first"):
        finetune(searched, other)


def test_an_unfinished_search_is_not_derived_from(tmp_path: Path) -> None:
    config = make_config()
    run = RunFolder.create(tmp_path / "run", config=config, kind="search")
    with pytest.raises(PosefabricError, match=r"has no weights\.safetensors.*--resume"):
        derive(run, run.new_child("derive", config))


def test_weights_of_another_network_do_not_transfer() -> None:
    network = build_supernet(make_config())
    wider = build_supernet(make_config(model=dict(channel_factor=3)))
    with pytest.raises(PosefabricError, match=r"the larger network has \(8, .*derived one needs"):
        transfer_weights(network, build_compact(wider.architecture()))
    parts = build_supernet(make_config(model=dict(parts=3)))
    with pytest.raises(PosefabricError, match="the larger network has no such tensor"):
        transfer_weights(network, build_compact(parts.architecture()))


def test_a_run_whose_weights_are_of_another_graph(searched: RunFolder) -> None:
    child = child_of(searched)
    derive(searched, child)
    save_weights(child.weights_path, build_supernet(searched.config))
    with pytest.raises(PosefabricError, match=r"weights\.safetensors: does not fit"):
        load_network(child)
