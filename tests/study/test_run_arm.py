"""What an arm without a search begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainings import make_config

from posefabric.derive.fit_budget import whole_cost
from posefabric.models.build import load_network
from posefabric.space.architecture import Architecture
from posefabric.study.run_arm import derived_of, drawn_run


@pytest.mark.parametrize("seed", range(3))
def test_a_random_architecture_under_a_budget_has_its_cost(tmp_path: Path, seed: int) -> None:
    config = make_config(
        seed=seed,
        search=dict(strategy="random", budget="macs=9.4M"),
        derive=dict(operations_kept=1, threshold=0.25, gap_persons=0),
    )
    derived = derived_of(drawn_run(tmp_path / "run", config), config)
    steps = derived.read_json("derivation.json")["steps"]
    assert steps["budget"] == steps["discretize"], "nothing was dropped to make it fit"
    assert 0.95 * 9.4e6 <= whole_cost(Architecture.load(derived.architecture_path)).macs <= 9.4e6


def test_without_a_budget_it_is_the_first_draw(tmp_path: Path) -> None:
    config = make_config(search=dict(strategy="random"))
    run = drawn_run(tmp_path / "run", config)
    once = load_network(run).architecture()
    again = load_network(drawn_run(tmp_path / "again", config)).architecture()
    assert once == again
    other = drawn_run(tmp_path / "other", make_config(seed=1, search=dict(strategy="random")))
    assert load_network(other).architecture() != once
