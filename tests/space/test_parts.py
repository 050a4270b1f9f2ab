"""Which keypoints each part predicts, and how parts are joined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posefabric.skeletons import load_skeleton
from posefabric.space.parts import SumOfParts, choose_parts
from posefabric.structures import PosefabricError

COCO = load_skeleton("coco17")


def named(parts: dict[str, tuple[int, ...]]) -> list[set[str]]:
    return [{COCO.keypoints[k] for k in keypoints} for keypoints in parts.values()]


def test_the_papers_three_parts() -> None:
    """PAPER section 2, P = 3."""
    head = {"nose", "left_eye", "right_eye", "left_ear", "right_ear"}
    groups = [("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")]
    limbs = [{f"{side}_{n}" for side in ("left", "right") for n in group} for group in groups]
    found = named(choose_parts(COCO, 3))
    assert len(found) == 3 and all(wanted in found for wanted in (head, *limbs))


@pytest.mark.parametrize("parts", [1, 3, 5, 8])
def test_every_grouping_covers_the_skeleton(parts: int) -> None:
    chosen = choose_parts(COCO, parts)
    assert len(chosen) == parts
    assert {k for keypoints in chosen.values() for k in keypoints} == set(range(17))


def test_an_unknown_grouping_names_the_known_ones() -> None:
    with pytest.raises(PosefabricError, match=r"parts=4.*coco17.*P = 1, 3, 5, 8"):
        choose_parts(COCO, 4)


def test_random_parts_are_a_seeded_partition() -> None:
    chosen = choose_parts(COCO, "random", seed=3)
    assert [len(k) for k in chosen.values()] == [6, 6, 5]
    dealt = [k for keypoints in chosen.values() for k in keypoints]
    assert sorted(dealt) == list(range(17))
    assert choose_parts(COCO, "random", seed=3) == chosen
    draws = {tuple(choose_parts(COCO, "random", seed=s).values()) for s in range(20)}
    assert len(draws) == 20
    assert choose_parts(COCO, "random:3", seed=3) == chosen


@given(count=st.integers(1, 17), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_random_parts_of_any_number(count: int, seed: int) -> None:
    chosen = choose_parts(COCO, f"random:{count}", seed=seed)
    sizes = [len(keypoints) for keypoints in chosen.values()]
    assert len(sizes) == count and max(sizes) - min(sizes) <= 1
    assert sorted(k for keypoints in chosen.values() for k in keypoints) == list(range(17))
    assert list(chosen) == [f"random_{i}" for i in range(count)]


@pytest.mark.parametrize("parts", ["random:0", "random:18", "random:", "random:-1", "randon", "3"])
def test_random_parts_that_cannot_be(parts: str) -> None:
    with pytest.raises(PosefabricError, match=f"model.parts={parts}: .*random:P.*the 17 keypoints"):
        choose_parts(COCO, parts)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_shared_keypoints_are_summed(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    part = st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True)
    parts = [*data.draw(st.lists(part, max_size=4)), list(range(count))]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, len(p), 3, 2, generator=generator) for p in parts]
    expected = np.zeros((2, count, 3, 2))
    for keypoints, own in zip(parts, maps, strict=True):
        for row, keypoint in enumerate(keypoints):
            expected[:, keypoint] += own[:, row].double().numpy()
    joined = SumOfParts(parts, count)(maps)
    np.testing.assert_allclose(joined.numpy(), expected, rtol=0, atol=1e-5)


def test_joining_keeps_no_state() -> None:
    assert SumOfParts([[1, 0]], 2).state_dict() == {}


def test_keypoints_that_no_part_predicts_or_that_do_not_exist() -> None:
    with pytest.raises(PosefabricError, match=r"no part predicts keypoints \[1, 3\]"):
        SumOfParts([[0], [2]], 4)
    with pytest.raises(PosefabricError, match=r"keypoints \[4\], there are 0 \.\. 3"):
        SumOfParts([[0, 1, 2, 3], [4]], 4)


def test_a_grouping_of_ones_own_keeps_its_order() -> None:
    chosen = choose_parts(COCO, {"face": ["right_eye", "nose"], "rest": ["left_hip"]})
    assert chosen == {"face": (2, 0), "rest": (11,)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": ["tail"]}, "part a has tail; expected different ones of coco17: nose"),
        ({"a": ["nose", "nose"]}, "part a has nose, nose"),
        ({"a": []}, "part a has no keypoints"),
        ({"a.b": ["nose"]}, r"no part can be called 'a\.b'"),
        ({"items": ["nose"]}, "no part can be called 'items'"),
    ],
)
def test_a_grouping_of_ones_own_is_checked(parts: dict, message: str) -> None:
    with pytest.raises(PosefabricError, match=message):
        choose_parts(COCO, parts)
