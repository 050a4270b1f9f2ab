"""Study files: what they say, what they come to, and what tells two runs apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_studies import SIMPLE, TINY, write_study

from posefabric.evaluate.profile import count_parameters
from posefabric.models.build import build_supernet
from posefabric.structures import PosefabricError
from posefabric.study.plan import EQUAL, load_study, plan_runs, shipped_studies


def plan(path: Path, *given: str, **sections):
    return plan_runs(load_study(str(write_study(path, **sections))), given)


def test_runs_are_arms_by_seeds_by_budgets(tmp_path: Path) -> None:
    arms = {"a": {"steps": "search"}, "b": {"overrides": ["search.strategy=uniform"]}}
    runs = plan(
        tmp_path / "s.yaml",
        seeds=[3, 5],
        arms=arms,
        budgets={"short": ["search.epochs=1"], "long": ["search.epochs=2"]},
    )
    assert [(r.budget, r.seed, r.arm) for r in runs] == [
        (b, s, a) for b in ("short", "long") for s in (3, 5) for a in ("a", "b")
    ]
    assert len({r.key for r in runs}) == len({r.folder for r in runs}) == 8
    assert {(r.budget, r.config.search.epochs) for r in runs} == {("short", 1), ("long", 2)}
    assert all(r.config.seed == r.seed for r in runs)
    assert runs[1].config.search.strategy == "uniform" and runs[1].steps == "search+finetune"


def test_the_hash_says_what_is_computed_not_where(tmp_path: Path) -> None:
    def key(*given: str, **sections) -> str:
        return plan(tmp_path / "s.yaml", *given, **sections)[0].key

    first = key()
    assert key("data.workers=1", "threads=1", "data.root=elsewhere", "name=other") == first
    assert key(name="renamed") == first, "a study's name changes no run"
    assert key(arms={"renamed": {"steps": "search"}}) == first
    others = [
        key("search.epochs=2"),
        key("data.synthetic_seed=1"),
        key(seeds=[1]),
        key(arms={"mixture": {"steps": "search+finetune"}}),
    ]
    assert len({first, *others}) == 5


def test_the_hash_follows_what_a_skeleton_file_says(tmp_path: Path) -> None:
    from posefabric.skeletons import shipped_skeletons

    source = shipped_skeletons()["coco17"].read_text()
    keys = []
    for name, text in (("a.yaml", source), ("b.yaml", source), ("c.yaml", source + "\n# new\n")):
        (tmp_path / name).write_text(text)
        keys.append(plan(tmp_path / "s.yaml", f"data.skeleton={tmp_path / name}")[0].key)
    assert keys[0] == keys[1] != keys[2]


def test_the_command_line_is_above_all(tmp_path: Path) -> None:
    arms = {"a": {"steps": "search", "overrides": ["search.epochs=2"]}}
    (run,) = plan(tmp_path / "s.yaml", "search.epochs=7", arms=arms)
    assert run.config.search.epochs == 7


def test_an_arm_may_have_few_of_the_seeds(tmp_path: Path) -> None:
    arms = {"slow": {"steps": "search", "seeds": [2]}, "quick": {"steps": "search"}}
    runs = plan(tmp_path / "s.yaml", arms=arms, seeds=[1, 2], overrides=[])
    assert [(r.seed, r.arm) for r in runs] == [(1, "quick"), (2, "slow"), (2, "quick")]
    arms["slow"]["seeds"] = [3]
    with pytest.raises(PosefabricError, match=r"arm slow: seeds: expected some of \[1, 2\]"):
        plan(tmp_path / "s.yaml", arms=arms, seeds=[1, 2])


def test_both_comparisons_are_two_runs_with_the_search_before(tmp_path: Path) -> None:
    arms = {
        "simple": {"steps": "train", "overrides": SIMPLE, "compute": "both"},
        "equal": {"steps": "train", "overrides": SIMPLE, "compute": "equal"},
        "searched": {"steps": ["search", "derive", "finetune"]},
    }
    runs = plan(tmp_path / "s.yaml", arms=arms)
    assert {r.arm for r in runs} == {"simple", "simple" + EQUAL, "equal", "searched"}
    searched = next(r for r in runs if r.arm == "searched")
    for run in runs:
        equal = run.arm in ("equal", "simple" + EQUAL)
        assert run.reference == (searched.key if equal else None)
        assert not equal or runs.index(run) > runs.index(searched)
    keys = {r.arm: r.key for r in runs}
    assert keys["simple"] != keys["simple" + EQUAL] == keys["equal"]


def test_equal_compute_is_that_of_the_same_seed_or_of_the_first_search(tmp_path: Path) -> None:
    arms = {
        "simple": {"steps": "train", "overrides": SIMPLE, "compute": "equal"},
        "searched": {"steps": "search+finetune", "seeds": [0, 1]},
    }
    runs = plan(tmp_path / "s.yaml", arms=arms, seeds=[0, 1, 2])
    searched = {r.seed: r.key for r in runs if r.arm == "searched"}
    wanted = {r.seed: r.reference for r in runs if r.arm == "simple"}
    assert wanted == {0: searched[0], 1: searched[1], 2: searched[0]}
    arms["searched"]["seeds"] = [1]
    with pytest.raises(PosefabricError, match=r"arm searched: .*first seed"):
        plan(tmp_path / "s.yaml", arms=arms, seeds=[0, 1])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (dict(arms={"a": {"step": "search"}}), ["arms.a.step"]),
        (dict(arms={"a/b": None}), ["a/b", "letters"]),
        (dict(arms={}), ["arms"]),
        (dict(seeds=[1, 1]), ["seeds"]),
        (dict(arms={"a": {"steps": "search", "compute": "equal"}}), ["steps: train"]),
        (dict(arms={"a": {"steps": "train", "compute": "equal"}}), ["compute_of", "none"]),
        (dict(claims=[{"claim": "c", "better": "a", "than": "b"}]), ["no arm a", "mixture"]),
        (dict(claims=[{"claim": "c", "better": "mixture"}]), ["than", "not_below"]),
        (
            dict(claims=[{"claim": "c", "better": "mixture", "than": "mixture"}]),
            ["compared with itself"],
        ),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, sections: dict, words: list[str]) -> None:
    with pytest.raises(PosefabricError) as told:
        plan(tmp_path / "wrong.yaml", **sections)
    assert all(word in str(told.value) for word in ["wrong.yaml", *words]), told.value


def test_an_arm_that_cannot_run_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(PosefabricError, match=r"arm odd.*search.epoch"):
        plan(tmp_path / "s.yaml", arms={"odd": {"overrides": ["search.epoch=1"]}})
    with pytest.raises(PosefabricError, match=r"arm base: .*nothing to search"):
        plan(tmp_path / "s.yaml", arms={"base": {"steps": "search", "overrides": SIMPLE}})
    with pytest.raises(PosefabricError, match=r"shipped: .*ablation"):
        load_study("no_such_study")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(PosefabricError, match="expected name"):
        load_study(str(tmp_path / "list.yaml"))


def test_a_configuration_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("search: {epochs: 9}")
    path = write_study(tmp_path / "s.yaml", config="own.yaml", overrides=TINY[:8])
    (run,) = plan_runs(load_study(str(path)))
    assert run.config.search.epochs == 9


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_a_shipped_study(name: str) -> None:
    assert shipped_studies()[name].read_text().startswith("#"), "what it is for, first"
    study = load_study(name)
    assert study.name == name and len(study.seeds) >= 3 and study.claims
    runs = plan_runs(study, ["data.root=DIR"])
    seeds = [len(study.arms[arm].seeds or study.seeds) for arm, _ in study.variants().values()]
    assert len(runs) == sum(seeds) == len({r.key for r in runs})


def test_the_strategies_see_equally_many_persons() -> None:
    for run in plan_runs(load_study("strategies_baselines")):
        search, train = run.config.search, run.config.finetune
        assert search.batch_size == train.batch_size
        share = 1 - search.architecture_share if "order" in search.strategy else 1
        assert search.epochs * share == pytest.approx(train.epochs)
        assert not search.sparsity and search.relaxation == "softmax"
        assert run.config.data.input_wh == (64, 64) and run.config.data.skeleton == "lsp14"


@pytest.mark.slow
def test_the_ablation_compares_equal_parameters() -> None:
    heads = {}
    for run in plan_runs(load_study("ablation")):
        if run.seed == 0 and run.arm.startswith("parts"):
            network = build_supernet(run.config, pretrained=False)
            heads[run.config.model.parts] = count_parameters(network.head_parameters())
    assert set(heads) == {1, 3, 5, 8}
    assert all(abs(count / heads[3] - 1) < 0.1 for count in heads.values()), heads
