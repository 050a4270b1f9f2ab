import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from posefabric.skeletons import FALLBACK_SIGMA, load_skeleton, shipped_skeletons
from posefabric.structures import PosefabricError

SHARED = Path(__file__).resolve().parents[2] / "shared"

HAND = {
    "name": "hand",
    "keypoints": ["wrist", "thumb", "index"],
    "flip_pairs": [],
    "limbs": [["wrist", "thumb"], ["wrist", "index"]],
}
PET = {
    "name": "pet",
    "keypoints": ["left_eye", "right_eye", "nose"],
    "flip_pairs": [["left_eye", "right_eye"]],
    "limbs": [["left_eye", "nose"]],
}


def load(tmp_path, tree):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_skeleton(str(path))


@pytest.mark.parametrize("name", ["coco17", "mpii16", "lsp14"])
def test_shipped_skeletons_are_whole(name):
    skeleton = load_skeleton(name)
    count = int(name[-2:])
    assert name in shipped_skeletons()
    assert skeleton.name == name
    assert skeleton.num_keypoints == count
    assert skeleton.sigmas.shape == (count,)
    assert list(skeleton.groupings) == [1, 3, 5, 8]
    assert skeleton.groupings[1]["all"] == tuple(range(count))
    for parts, group in skeleton.groupings.items():
        assert len(group) == parts
        assert {k for members in group.values() for k in members} == set(range(count))
    flip = skeleton.flip_index
    assert (flip[flip] == np.arange(count)).all()
    for index, keypoint in enumerate(skeleton.keypoints):
        mirrored = keypoint.replace("left", "?").replace("right", "left").replace("?", "right")
        assert skeleton.keypoints[flip[index]] == mirrored
    assert [skeleton.keypoints[k] for k in skeleton.torso] == ["left_shoulder", "right_hip"]
    lower = {
        name
        for name in skeleton.keypoints
        if name.split("_")[-1] in ("hip", "knee", "ankle", "pelvis")
    }
    upper = {skeleton.keypoints[k] for k in skeleton.upper_body}
    assert upper | lower == set(skeleton.keypoints)
    assert not upper & lower
    assert all(
        pair[0].startswith("left_") and pair[1].startswith("right_")
        for pair in ([skeleton.keypoints[k] for k in p] for p in skeleton.flip_pairs)
    )


def test_coco_is_what_pycocotools_uses():
    from pycocotools.cocoeval import Params

    skeleton = load_skeleton("coco17")
    theirs = Params(iouType="keypoints").kpt_oks_sigmas
    np.testing.assert_allclose(skeleton.sigmas, theirs, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("coco17", "data/coco_mini/annotations/person_keypoints_val2017.json"),
        ("lsp14", "data/lspet/annotations/val.json"),
    ],
)
def test_order_is_that_of_the_data(name, file):
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"needs ../shared/{file}")
    category = json.loads(path.read_text())["categories"][0]
    skeleton = load_skeleton(name)
    assert list(skeleton.keypoints) == category["keypoints"]
    given = {frozenset((a - 1, b - 1)) for a, b in category["skeleton"]}
    assert {frozenset(limb) for limb in skeleton.limbs} <= given


def test_mpii_parts_of_the_paper():
    skeleton = load_skeleton("mpii16")
    named = {
        count: {part: {skeleton.keypoints[k] for k in members} for part, members in group.items()}
        for count, group in skeleton.groupings.items()
    }
    assert named[3]["head"] == {"head_top", "upper_neck", "thorax"}
    assert "pelvis" in named[3]["lower_limbs"]
    assert named[5]["thigh"] == {"left_hip", "right_hip", "pelvis"}
    assert named[8]["thigh"] == {"left_hip", "right_hip", "left_knee", "right_knee", "pelvis"}
    assert named[8]["left_lower_arm"] == {"left_elbow", "left_wrist"}
    assert skeleton.keypoints[:6] == (
        "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle",
    )  # fmt: skip
    assert "fallback" in skeleton.sigmas_source


def test_a_users_skeleton_may_leave_out_much(tmp_path):
    hand = load(tmp_path, HAND)
    assert hand.groupings == {1: {"all": (0, 1, 2)}}
    assert hand.torso is None
    assert hand.upper_body == ()
    assert hand.flip_index.tolist() == [0, 1, 2]
    assert hand.sigmas.tolist() == [FALLBACK_SIGMA] * 3
    assert hand.sigmas_source.startswith("fallback")


def test_sigmas_by_list_and_by_name_are_the_same(tmp_path):
    by_list = load(tmp_path, {**HAND, "sigmas": [0.1, 0.2, 0.3]})
    by_name = load(tmp_path, {**HAND, "sigmas": {"index": 0.3, "thumb": 0.2, "wrist": 0.1}})
    assert by_list.sigmas.tolist() == by_name.sigmas.tolist() == [0.1, 0.2, 0.3]
    assert "fallback" not in by_name.sigmas_source


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({**HAND, "limbs": [["wrist", "tumb"]]}, r"limbs, entry 1: unknown.*did you mean thumb"),
        ({k: v for k, v in HAND.items() if k != "flip_pairs"}, r"write `flip_pairs: \[\]`"),
        ({**PET, "flip_pairs": [["left_eye", "right_eye"], ["nose", "left_eye"]]},
         "left_eye is in entry 1 and in entry 2"),
        ({**PET, "flip_pairs": [["left_eye", "left_eye"]]}, "named twice"),
        ({**PET, "flip_pairs": [["left_eye"]]}, "expected two keypoint names"),
        ({**HAND, "groupings": {2: {"a": ["wrist"], "b": ["thumb"]}}}, "no part holds index"),
        ({**HAND, "groupings": {3: {"a": ["wrist", "thumb"], "b": ["index"]}}},
         "expected 3 named parts, got 2"),
        ({**HAND, "groupings": {1: {"a.b": ["wrist", "thumb", "index"]}}}, r"'a\.b'.*without dots"),
        ({**HAND, "groupings": {2: {"a": ["wrist", "thumb", "index"], "b": []}}},
         "no keypoint in b"),
        ({**HAND, "sigmas": [0.1, 0.2]}, "expected 3 values.*got 2"),
        ({**HAND, "sigmas": {"wrist": 0.1}}, "missing for thumb, index"),
        ({**HAND, "sigmas": [0.1, -1, 0.2]}, "thumb has -1"),
        ({**HAND, "keypoints": ["wrist", "thumb", "thumb"]}, "more than once: thumb"),
        ({**HAND, "keypoints": ["wrist", "thumb", False]}, "entry 3 is False"),
        ({**HAND, "limb": []}, "unknown entry 'limb'.*did you mean limbs"),
        (["wrist"], "expected entries"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, tree, message):
    with pytest.raises(PosefabricError, match=message) as raised:
        load(tmp_path, tree)
    assert "own.yaml" in str(raised.value)


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(PosefabricError, match=r"did you mean coco17.*shipped: coco17, lsp14"):
        load_skeleton("coco_17")


def test_broken_yaml(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("name: [")
    with pytest.raises(PosefabricError, match=r"own.yaml: cannot be read as YAML"):
        load_skeleton(str(path))
