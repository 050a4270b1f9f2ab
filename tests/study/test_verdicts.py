"""Verdicts on made-up rows: effects, intervals over the same persons, sentences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posefabric.structures import PosefabricError
from posefabric.study.hits import Hits
from posefabric.study.plan import Claim
from posefabric.study.verdicts import judge

KEYPOINTS = np.array(["nose", "left_wrist"])


def make_row(folder: Path, arm: str, seed: int, found: np.ndarray, **more) -> dict:
    """``found`` (N,): whether a person's nose is found; the wrist of all is found."""
    hits = np.stack([found, np.ones_like(found)], axis=1).astype(bool)
    key = f"{arm}{seed}"
    np.savez(
        folder / f"{key}.npz",
        found=hits,
        counted=np.ones_like(hits),
        person=np.arange(len(found)),
        keypoints=KEYPOINTS,
    )
    return {
        "arm": arm,
        "hash": key,
        "counts": f"{key}.npz",
        "PCK": float(hits.mean()),
        "PCK_limbs": 1.0,
        **more,
    }


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """``good`` finds what ``bad`` finds and 10 persons' noses more, of 100."""
    base = np.random.default_rng(0).random(100) < 0.5
    missed = np.flatnonzero(~base)
    made = []
    for seed in range(4):
        better = base.copy()
        better[missed[: 10 + seed]] = True
        made.append(make_row(tmp_path, "good", seed, better, macs=10 - seed))
        made.append(make_row(tmp_path, "bad", seed, base, macs=1 + seed))
    return made


def claim(**more) -> Claim:
    return Claim(**{"claim": "c", "better": "good", "than": "bad", **more})


def test_a_claim_that_holds(rows: list[dict], tmp_path: Path) -> None:
    verdict = judge(claim(), rows, Hits(rows, tmp_path))
    # 11.5 noses more on average, of 200 keypoints.
    assert verdict.effect == pytest.approx(5.75)
    assert verdict.p == pytest.approx(1 / 70) and verdict.holds is True
    assert verdict.interval is not None
    low, high = verdict.interval
    # Paired: the persons in which the arms agree do not blur the difference.
    assert 2.5 < low < 4.5 and 7 < high < 9
    assert set(verdict.as_json()) == {"claim", "effect", "interval", "p", "holds"}
    assert verdict.text.startswith("Holds: good has 5.75 points more PCK than bad (4 against 4")


def test_the_other_way_round(rows: list[dict], tmp_path: Path) -> None:
    hits = Hits(rows, tmp_path)
    verdict = judge(claim(better="bad", than="good"), rows, hits)
    assert verdict.effect == pytest.approx(-5.75) and verdict.p == 1 and verdict.holds is False
    assert "5.75 points less" in verdict.text
    limbs = judge(claim(measure="PCK_limbs"), rows, hits)
    assert limbs.effect == 0 and limbs.interval == (0, 0) and limbs.holds is False


def test_too_few_runs_are_said_to_be(rows: list[dict], tmp_path: Path) -> None:
    verdict = judge(claim(), rows[:4], Hits(rows, tmp_path))
    assert verdict.p == pytest.approx(1 / 6) and verdict.holds is False
    assert "cannot be below 0.167" in verdict.text and "more seeds" in verdict.text


def test_missing_runs_decide_nothing(rows: list[dict], tmp_path: Path) -> None:
    verdict = judge(claim(than="absent"), rows, Hits(rows, tmp_path), budget="short")
    assert verdict.holds is None and verdict.p is None and "absent" in verdict.text
    assert verdict.claim == "c (short)"


def test_not_below_the_best(rows: list[dict], tmp_path: Path) -> None:
    same = np.zeros(100)
    rows.append(make_row(tmp_path, "none", 0, same, macs=1))
    hits = Hits(rows, tmp_path)
    verdict = judge(claim(than=[], not_below=["none", "bad"]), rows, hits)
    assert verdict.holds is True and verdict.effect == pytest.approx(5.75)
    assert "the best of them, bad" in verdict.text
    below = claim(better="bad", than=[], not_below="good")
    assert judge(below, rows, hits).holds is False
    assert judge(below.model_copy(update={"margin": 5.8}), rows, hits).holds is True


def test_a_measure_without_persons_is_resampled_over_runs(rows, tmp_path: Path) -> None:
    verdict = judge(claim(measure="macs"), rows, Hits(rows, tmp_path))
    assert verdict.effect == pytest.approx(6) and verdict.holds is True
    assert verdict.interval is not None and 4 < verdict.interval[0] < 6 < verdict.interval[1] < 8
    assert "over runs" in verdict.text


def test_missing_counts_are_told(rows: list[dict], tmp_path: Path) -> None:
    (tmp_path / "good0.npz").unlink()
    with pytest.raises(PosefabricError, match=r"good0\.npz.*measured anew"):
        Hits(rows, tmp_path)


def test_a_person_one_run_could_not_read(tmp_path: Path) -> None:
    rows = [make_row(tmp_path, "good", 0, np.ones(6)), make_row(tmp_path, "bad", 0, np.ones(6))]
    with np.load(tmp_path / "bad0.npz") as kept:
        arrays = {name: kept[name] for name in kept.files}
    for name in ("found", "counted", "person"):
        arrays[name] = arrays[name][:3]
    np.savez(tmp_path / "bad0.npz", **arrays)
    hits = Hits(rows, tmp_path)
    assert hits.persons == 6
    assert hits.paired_interval(rows[:1], rows[1:], "PCK")[1] == pytest.approx(0, abs=1)
