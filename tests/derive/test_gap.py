"""The accuracy that each step of a derivation leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from networks import command
from trainings import make_config

from posefabric.config import Config
from posefabric.data.pipeline import open_dataset
from posefabric.data.synthetic import synthetic_people
from posefabric.derive.gap import gap_lines, gaps, make_measure, spread
from posefabric.derive.run_derive import derive
from posefabric.distributed.launch import Launch
from posefabric.models.build import build_supernet, load_network
from posefabric.models.weights import save_weights
from posefabric.run import RunFolder
from posefabric.skeletons import load_skeleton
from posefabric.train.phase import evaluate

COCO17 = load_skeleton("coco17")


def test_one_of_several_processes_measures_nothing(monkeypatch) -> None:
    """It derives alone, and a measurement would wait for the others for ever."""
    config = with_gap(make_config(), gap_persons=4)
    assert make_measure(config) is not None
    monkeypatch.setattr("posefabric.derive.gap.place", lambda: Launch(rank=0, ranks=2))
    assert make_measure(config) is None


def with_gap(config: Config, **settings) -> Config:
    return config.model_copy(update={"derive": config.derive.model_copy(update=settings)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = make_config()
    network = build_supernet(config)
    made = RunFolder.create(tmp_path_factory.mktemp("gap") / "run", config=config, kind="search")
    save_weights(made.weights_path, network)
    made.write_text(made.architecture_path.name, network.architecture().to_json())
    made.set_state("finished")
    return made


def test_steps_without_loss_have_no_gap_and_cutting_has_its_own(run: RunFolder) -> None:
    config = with_gap(run.config, operations_kept=1, sources_kept=1)
    compact, record = derive(run, run.new_child("derive", config))
    accuracy = record["accuracy"]
    assert list(accuracy) == ["mixture", "prune", "discretize", "fold"]
    assert accuracy["prune"] == pytest.approx(accuracy["mixture"], abs=1e-6)
    assert accuracy["fold"] == pytest.approx(accuracy["discretize"], abs=1e-6)
    measure = make_measure(config)
    assert measure is not None and measure(compact) == accuracy["discretize"]
    assert measure(load_network(run)) == accuracy["mixture"]


def test_it_is_the_evaluation_of_those_persons(run: RunFolder) -> None:
    dataset = synthetic_people(count=7, seed=3, skeleton=COCO17)
    assert spread(dataset, 3).persons == [dataset.persons[i] for i in (0, 3, 6)]
    assert spread(dataset, 9).persons == dataset.persons
    everyone = with_gap(run.config, gap_persons=10_000)
    measure, network = make_measure(everyone), load_network(run)
    assert measure is not None
    whole = open_dataset(run.config.data, "val", evaluating=True)
    found = evaluate(network, run.config, whole, flip=False)
    assert measure(network)["PCK"] == pytest.approx(found["pck"]["PCK"], abs=1e-6)


def test_headboxes_go_with_their_persons() -> None:
    dataset = synthetic_people(count=5, seed=0, skeleton=COCO17)
    boxes = np.arange(20.0).reshape(5, 2, 2)
    assert np.array_equal(spread(replace(dataset, headboxes=boxes), 2).headboxes, boxes[[0, 4]])


def test_nothing_is_measured_without_persons_or_data(run: RunFolder, tmp_path: Path) -> None:
    assert make_measure(with_gap(run.config, gap_persons=0)) is None
    data = run.config.data.model_copy(update={"format": "coco", "root": None})
    assert make_measure(run.config.model_copy(update={"data": data})) is None
    _, record = derive(run, run.new_child("derive", with_gap(run.config, gap_persons=0)))
    assert record["accuracy"] == {}


def test_points_below_the_mixture() -> None:
    accuracy = {"mixture": {"PCK": 0.5, "AP": 0.25}, "fold": {"PCK": 0.47, "AP": 0.26}}
    assert gaps(accuracy) == {"fold": pytest.approx({"PCK": 3.0, "AP": -1.0})}
    said = "fold: below the mixture, untrained: +3.00 points of PCK, -1.00 points of AP"
    assert gap_lines(accuracy) == [said] and gap_lines({}) == []


def test_the_command_says_it(run: RunFolder, monkeypatch, capsys) -> None:
    assert command(monkeypatch, "derive", run.path, "derive.operations_kept=1") == 0
    said = capsys.readouterr().out
    for step in ("prune", "discretize", "fold"):
        assert f"{step}: below the mixture, untrained: " in said
    assert "points of PCK" in said
