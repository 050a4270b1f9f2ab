"""Parts from data: the estimator, the clustering, and what they find in people."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from networks import command
from trainings import make_config, people

from posefabric.data.synthetic import synthetic_people
from posefabric.evaluate.groups import (
    learn_parts,
    mutual_information,
    normalised_positions,
    part_count,
    sample_persons,
    spectral_clusters,
)
from posefabric.run import RunFolder
from posefabric.skeletons import load_skeleton
from posefabric.space.parts import choose_parts
from posefabric.structures import DataError, PersonDataset, PosefabricError, Predictions


@pytest.fixture(scope="module")
def crowd() -> PersonDataset:
    return synthetic_people(count=300, seed=1, skeleton=load_skeleton("coco17"))


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.95])
def test_information_of_gaussians_is_their_closed_form(correlation: float) -> None:
    """Each of two coordinates adds -log(1 - r^2) / 2 nats."""
    rng = np.random.default_rng(0)
    first, other = rng.normal(size=(2, 3000, 2))
    second = correlation * first + np.sqrt(1 - correlation**2) * other
    points, seen = np.stack([first, second], axis=1), np.ones((3000, 2), dtype=bool)
    found = mutual_information(points, seen)
    expected = -np.log(1 - correlation**2)
    assert found[0, 1] == found[1, 0] == pytest.approx(expected, abs=0.08)
    assert found[0, 0] == 0


def test_information_sees_what_correlation_does_not() -> None:
    rng = np.random.default_rng(0)
    first = rng.uniform(-1, 1, size=(2000, 2))
    points = np.stack([first, np.abs(first)], axis=1)
    assert abs(np.corrcoef(points[:, 0, 0], points[:, 1, 0])[0, 1]) < 0.05
    assert mutual_information(points, np.ones((2000, 2), dtype=bool))[0, 1] > 1


def test_pairs_hardly_seen_together_tell_nothing() -> None:
    points = np.repeat(np.random.default_rng(0).normal(size=(60, 1, 2)), 2, axis=1)
    seen = np.ones((60, 2), dtype=bool)
    assert mutual_information(points, seen)[0, 1] > 1
    seen[19:, 1] = False
    assert mutual_information(points, seen)[0, 1] == 0


def test_clusters_are_the_blocks_and_the_gap_counts_them() -> None:
    truth = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2])
    affinity = np.where(truth[:, None] == truth, 1.0, 0.02)
    np.fill_diagonal(affinity, 0)
    for count in (None, 3):
        labels, eigenvalues = spectral_clusters(affinity, count)
        assert len({(a, b) for a, b in zip(labels.tolist(), truth.tolist(), strict=True)}) == 3
        assert eigenvalues[0] == pytest.approx(0, abs=1e-9) and (np.diff(eigenvalues) >= 0).all()
    assert len(set(spectral_clusters(affinity, 2)[0].tolist())) == 2
    assert spectral_clusters(affinity, 10)[0].tolist() == list(range(10))


def test_people_fall_into_their_limbs(crowd: PersonDataset) -> None:
    found = learn_parts(crowd, 5)
    groups = [set(members) for members in found.parts.values()]
    assert len(groups) == 5 and set.union(*groups) == set(crowd.skeleton.keypoints)
    assert sum(map(len, groups)) == 17, "each keypoint in one part"
    assert any({"nose", "left_eye", "right_eye"} <= group for group in groups)
    assert learn_parts(crowd, 5).parts == found.parts
    parts = choose_parts(crowd.skeleton, found.parts)
    assert sorted(k for members in parts.values() for k in members) == list(range(17))


def test_errors_take_the_positions_place(crowd: PersonDataset) -> None:
    """Errors that left and right share, of another size each: pairs belong together."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(300, 17, 2)) * 5
    for left, right in crowd.skeleton.flip_pairs:
        shared[:, right] = shared[:, left]
    keypoints = np.stack([p.keypoints for p in crowd.persons]) + shared
    predictions = Predictions(
        keypoints=keypoints.astype(np.float32),
        scores=np.ones((300, 17), dtype=np.float32),
        index=np.arange(300),
    )
    found = learn_parts(crowd, 9, predictions=predictions)
    assert found.source == "errors"
    part_of = {name: part for part, members in found.parts.items() for name in members}
    assert all(
        part_of[crowd.skeleton.keypoints[a]] == part_of[crowd.skeleton.keypoints[b]]
        for a, b in crowd.skeleton.flip_pairs
    )


def test_a_sample_is_drawn_from_all_persons(crowd: PersonDataset) -> None:
    some = sample_persons(crowd, 40, seed=3)
    ids = [person.annotation_id for person in some.persons]
    assert len(ids) == len(set(ids)) == 40 and max(ids) > 200
    assert ids == [p.annotation_id for p in sample_persons(crowd, 40, seed=3).persons]
    assert sample_persons(crowd, 300) is crowd


def test_positions_do_not_depend_on_place_and_size(crowd: PersonDataset) -> None:
    moved = replace(
        crowd,
        persons=[
            replace(p, box_xywh=p.box_xywh * 2 + [7, 9, 0, 0], keypoints=p.keypoints * 2 + [7, 9])
            for p in crowd.persons
        ],
    )
    here, there = normalised_positions(crowd), normalised_positions(moved)
    np.testing.assert_allclose(here[0], there[0], atol=1e-5)


def test_what_cannot_be_grouped_is_said(crowd: PersonDataset) -> None:
    with pytest.raises(PosefabricError, match=r"learned:18.*17 keypoints"):
        learn_parts(crowd, 18)
    with pytest.raises(DataError, match=r"annotated for 1\d persons.* 20 or more"):
        learn_parts(people(16), 3)
    with pytest.raises(PosefabricError, match="posefabric data parts"):
        choose_parts(crowd.skeleton, "learned:3")
    with pytest.raises(PosefabricError, match="learned:4"):
        make_config(model=dict(parts="learnt:3"))
    assert part_count("learned") is None and part_count("learned:4") == 4


def test_a_search_keeps_the_parts_it_learned(tmp_path: Path, monkeypatch, capsys) -> None:
    options = [
        "data.format=synthetic",
        "data.synthetic_train=60",
        "data.synthetic_val=4",
        "search.worth_persons=8",
    ]
    out = tmp_path / "parts"
    assert command(monkeypatch, "data", "parts", "demo", *options, "--count=3", "--out", out) == 0
    record = json.loads((out / "parts.json").read_text())
    assert (out / "parts.png").read_bytes()[:4] == b"\x89PNG"
    assert "3 parts, from the positions of" in capsys.readouterr().out
    small = ["data.input_wh=[32,32]", "model.channel_factor=1", "search.epochs=0.05"]
    run = tmp_path / "run"
    made = ["search", "demo", *options, *small, "--parts", "learned:3", "--out", run]
    assert command(monkeypatch, *made) == 0
    kept = RunFolder.open(run).config.model.parts
    assert {name: list(members) for name, members in kept.items()} == record["parts"]  # type: ignore[union-attr]
