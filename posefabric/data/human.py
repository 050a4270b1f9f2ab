"""The human body of the synthetic pictures, as tables; lengths in body heights."""

from __future__ import annotations

from posefabric.data.figure import (
    Body,
    Cover,
    Joint,
    Move,
    Part,
    Turn,
    mirrored_joints,
    mirrored_parts,
)

_ORIGIN = (0.0, 0.0, 0.0)

_JOINTS = mirrored_joints(
    Joint("pelvis", None, _ORIGIN),
    Joint("spine", "pelvis", (0, 0.10, 0), 0.06),
    Joint("thorax", "spine", (0, 0.185, 0), 0.06),
    Joint("neck", "thorax", (0, 0.025, 0.005)),
    Joint("head_base", "thorax", (0, 0.06, 0.012), 0.15),
    Joint("head_top", "head_base", (0, 0.15, 0.0)),
    Joint("nose", "head_base", (0, 0.052, 0.070)),
    Joint("left_eye", "head_base", (0.021, 0.080, 0.051)),
    Joint("left_ear", "head_base", (0.054, 0.070, -0.004)),
    Joint("left_shoulder", "thorax", (0.105, -0.008, 0), 0.07),
    Joint("left_elbow", "left_shoulder", (0, -0.165, 0), 0.08),
    Joint("left_wrist", "left_elbow", (0, -0.145, 0), 0.08),
    Joint("left_hand", "left_wrist", (0, -0.05, 0)),
    Joint("left_hip", "pelvis", (0.055, -0.012, 0), 0.08),
    Joint("left_knee", "left_hip", (0, -0.235, 0), 0.08),
    Joint("left_ankle", "left_knee", (0, -0.23, 0), 0.08),
    Joint("left_toe", "left_ankle", (0, -0.032, 0.09), 0.08),
)

_TRUNK = ("left_shoulder", "right_shoulder", "neck", "thorax", "pelvis", "left_hip", "right_hip")

_PARTS = mirrored_parts(
    Part(
        "belly", ("pelvis", (0, 0.0, 0)), ("spine", (0, 0.03, 0)), (0.058, 0.056), "trunk",
        width=(0.042, 0.040), shows=_TRUNK,
    ),
    Part(
        "chest", ("spine", (0, 0.02, 0)), ("thorax", (0, -0.045, 0)), (0.056, 0.054), "trunk",
        width=(0.040, 0.066), span=(1, 2), shows=_TRUNK,
    ),
    Part(
        "collar", ("thorax", (0, -0.02, 0)), ("thorax", (0, 0.01, 0)), (0.044, 0.026), "trunk",
        width=(0.085, 0.03), span=(2, 3),
        shows=("left_shoulder", "right_shoulder", "neck", "thorax", "upper_neck"), grows=False,
    ),
    Part(
        "throat", ("thorax", _ORIGIN), ("head_base", (0, 0.03, 0)), (0.034, 0.030), "skin",
        shows=("neck", "thorax", "upper_neck"), grows=False,
    ),
    Part(
        "head", ("head_base", (0, 0.042, 0.018)), ("head_base", (0, 0.093, 0.006)), (0.044, 0.053),
        "face", shows=("head_top", "upper_neck"), grows=False,
    ),
    Part(
        "nose", ("head_base", (0, 0.075, 0.060)), ("nose", (0, 0, -0.004)), (0.006, 0.011), "face",
        shows=("nose",), grows=False,
    ),
    Part(
        "mouth", ("head_base", (-0.014, 0.027, 0.052)), ("head_base", (0.014, 0.027, 0.052)),
        (0.007, 0.007), "lips", grows=False,
    ),
    Part(
        "left_eye", ("left_eye", _ORIGIN), ("left_eye", (0.004, 0, -0.001)), (0.009, 0.009), "eye",
        shows=("left_eye",), grows=False,
    ),
    Part(
        "left_brow", ("left_eye", (-0.008, 0.018, 0.0)), ("left_eye", (0.014, 0.016, -0.006)),
        (0.005, 0.005), "hair", grows=False,
    ),
    Part(
        "left_ear", ("left_ear", (0, 0.008, 0)), ("left_ear", (0, -0.012, 0)), (0.014, 0.010),
        "face", shows=("left_ear",), grows=False,
    ),
    Part(
        "hair", ("head_base", (0, 0.076, -0.018)), ("head_base", (0, 0.108, 0.0)), (0.050, 0.052),
        "hair", shows=("head_top",), option="hair", grows=False,
    ),
    Part(
        "locks", ("head_base", (0, 0.07, -0.024)), ("head_base", (0, -0.05, -0.042)),
        (0.048, 0.026), "hair", width=(0.012, 0.020), option="long_hair", grows=False,
    ),
    Part(
        "bun", ("head_base", (0, 0.12, -0.065)), ("head_base", (0, 0.13, -0.07)), (0.026, 0.026),
        "hair", option="bun", grows=False,
    ),
    Part(
        "cap", ("head_base", (0, 0.108, -0.006)), ("head_base", (0, 0.110, 0.004)), (0.055, 0.055),
        "hat", shows=("head_top",), option="cap", grows=False,
    ),
    Part(
        "visor", ("head_base", (0, 0.106, 0.045)), ("head_base", (0, 0.100, 0.085)), (0.012, 0.008),
        "hat", width=(0.034, 0.026), option="cap", grows=False,
    ),
    Part(
        "left_upper_arm", ("left_shoulder", _ORIGIN), ("left_elbow", _ORIGIN), (0.041, 0.030),
        "arm", shows=("left_shoulder", "left_elbow"),
    ),
    Part(
        "left_forearm", ("left_elbow", _ORIGIN), ("left_wrist", _ORIGIN), (0.030, 0.021), "arm",
        span=(1, 2), shows=("left_elbow", "left_wrist"),
    ),
    Part(
        "left_hand", ("left_wrist", (0, -0.006, 0)), ("left_hand", _ORIGIN), (0.020, 0.022), "skin",
        shows=("left_wrist",),
    ),
    Part(
        "left_thumb", ("left_wrist", (0, -0.012, 0.01)), ("left_hand", (0, 0.008, 0.030)),
        (0.010, 0.008), "skin", shows=("left_wrist",),
    ),
    Part(
        "left_thigh", ("left_hip", _ORIGIN), ("left_knee", _ORIGIN), (0.061, 0.041), "leg",
        shows=("left_hip", "left_knee"),
    ),
    Part(
        "left_shank", ("left_knee", _ORIGIN), ("left_ankle", _ORIGIN), (0.041, 0.026), "leg",
        span=(1, 2), shows=("left_knee", "left_ankle"),
    ),
    Part(
        "left_foot", ("left_ankle", (0, -0.016, -0.014)), ("left_toe", _ORIGIN), (0.028, 0.020),
        "shoe", shows=("left_ankle",),
    ),
    Part(
        "skirt", ("pelvis", (0, 0.02, 0)), ("knees", (0, 0.06, 0)), (0.062, 0.080), "skirt",
        width=(0.040, 0.075), shows=("pelvis", "left_hip", "right_hip"), option="skirt",
    ),
    # Marks of the front: a zip, buttons or a print, and of the back: a bag.
    Part(
        "zip", ("spine", (0, -0.02, 0.060)), ("thorax", (0, -0.03, 0.057)), (0.007, 0.007), "mark",
        shows=("thorax",), option="zip",
    ),
    *(
        Part(
            f"button_{number}", ("spine", (0, -0.03 + 0.05 * number, 0.057)),
            ("spine", (0, -0.028 + 0.05 * number, 0.057)), (0.010, 0.010), "mark", option="buttons",
        )
        for number in range(4)
    ),
    Part(
        "print", ("spine", (0, 0.085, 0.045)), ("spine", (0, 0.125, 0.045)), (0.017, 0.017), "mark",
        width=(0.028, 0.028), option="print",
    ),
    Part(
        "bag", ("spine", (0, 0.01, -0.085)), ("thorax", (0, -0.03, -0.075)), (0.050, 0.045), "bag",
        width=(0.045, 0.040), option="bag",
    ),
)  # fmt: skip


def _turn(flex: tuple[int, int], abduct: tuple[int, int] = (0, 0), twist=(0, 0)) -> Turn:
    return flex, abduct, twist


_LEGS = (
    Move(
        "stand", 4, {"both_hip": _turn((-8, 14), (-2, 16), (-5, 25)), "both_knee": _turn((-16, 0)),
        "both_ankle": _turn((-5, 5), (0, 0), (-5, 15))},
    ),
    Move(
        "walk", 3, {"left_hip": _turn((12, 48), (-3, 8), (-5, 15)),
        "right_hip": _turn((-32, 0), (-3, 8), (-5, 15)), "left_knee": _turn((-28, 0)),
        "right_knee": _turn((-75, -5)), "right_ankle": _turn((-30, 5))},
    ),
    Move(
        "sit", 2, {"both_hip": _turn((65, 105), (-3, 32), (-15, 30)),
        "both_knee": _turn((-115, -35)), "both_ankle": _turn((-15, 10))},
    ),
    Move(
        "crouch", 1, {"both_hip": _turn((50, 125), (-5, 35), (-10, 30)),
        "both_knee": _turn((-145, -70)), "both_ankle": _turn((-20, 20))},
    ),
    Move(
        "free", 2.5, {"both_hip": _turn((-35, 110), (-10, 65), (-25, 40)),
        "both_knee": _turn((-130, 0)), "both_ankle": _turn((-40, 15), (-10, 10), (-15, 20))},
    ),
)  # fmt: skip

_ARMS = (
    Move(
        "hang", 2.5, {"both_shoulder": _turn((-20, 30), (8, 34), (-60, 25)),
        "both_elbow": _turn((0, 50))},
    ),
    Move(
        "swing", 2, {"left_shoulder": _turn((-50, 0), (7, 24), (-30, 10)),
        "right_shoulder": _turn((0, 50), (7, 24), (-30, 10)), "both_elbow": _turn((5, 100))},
    ),
    Move(
        "akimbo", 1, {"both_shoulder": _turn((-35, 10), (30, 60), (-70, -20)),
        "both_elbow": _turn((70, 120))},
    ),
    Move(
        "raised", 2, {"both_shoulder": _turn((-20, 30), (95, 175), (-60, 90)),
        "both_elbow": _turn((0, 120))},
    ),
    Move(
        "forward", 2, {"both_shoulder": _turn((30, 120), (-20, 40), (-60, 20)),
        "both_elbow": _turn((0, 120))},
    ),
    Move(
        "free", 3, {"both_shoulder": _turn((-45, 175), (-15, 140), (-80, 50)),
        "both_elbow": _turn((0, 140)), "both_wrist": _turn((-40, 40), (-20, 20), (-60, 60))},
    ),
)  # fmt: skip

_SPINE = (
    Move(
        "upright", 5, {"pelvis": _turn((-12, 8), (-6, 6)),
        "spine": _turn((-12, 8), (-8, 8), (-15, 15)), "thorax": _turn((-8, 5), (-5, 5), (-12, 12))},
    ),
    Move(
        "bent", 1.5, {"pelvis": _turn((-45, -5), (-8, 8)),
        "spine": _turn((-50, -10), (-12, 12), (-20, 20)),
        "thorax": _turn((-25, 0), (-5, 5), (-12, 12))},
    ),
    Move(
        "free", 1.5, {"pelvis": _turn((-40, 25), (-35, 35), (-20, 20)),
        "spine": _turn((-40, 25), (-22, 22), (-30, 30)),
        "thorax": _turn((-20, 15), (-12, 12), (-20, 20))},
    ),
)  # fmt: skip

_HEAD = (Move("look", 1, {"head_base": _turn((-32, 22), (-18, 18), (-55, 55))}),)

_SAME = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
    "left_knee", "right_knee", "left_ankle", "right_ankle", "pelvis", "thorax", "neck", "head_top",
)  # fmt: skip

HUMAN = Body(
    name="human",
    joints=_JOINTS,
    middles={"knees": ("left_knee", "right_knee")},
    parts=_PARTS,
    covers={
        "trunk": Cover("bottom", "top", (-0.2, 0.8)),
        "arm": Cover("top", "skin", (0.15, 2.6)),
        "leg": Cover("bottom", "skin", (0.25, 2.8)),
        "skirt": Cover("bottom", "bottom", (0, 1)),
        "shoe": Cover("shoe", "shoe", (0, 1)),
        "skin": Cover("skin", "skin", (0, 1)),
        "face": Cover("skin", "skin", (0, 1)),
        "lips": Cover("lips", "lips", (0, 1)),
        "eye": Cover("eye", "eye", (0, 1)),
        "hair": Cover("hair", "hair", (0, 1)),
        "hat": Cover("hat", "hat", (0, 1)),
        "mark": Cover("mark", "mark", (0, 1)),
        "bag": Cover("bag", "bag", (0, 1)),
    },
    materials={
        "top": "cloth",
        "bottom": "cloth",
        "shoe": "plain",
        "skin": "skin",
        "lips": "lips",
        "eye": "eye",
        "hair": "hair",
        "hat": "cloth",
        "mark": "plain",
        "bag": "cloth",
    },
    options={
        "hair": 0.95,
        "long_hair": 0.35,
        "bun": 0.1,
        "cap": 0.12,
        "skirt": 0.15,
        "zip": 0.3,
        "buttons": 0.3,
        "print": 0.35,
        "bag": 0.12,
    },
    moves=(_LEGS, _ARMS, _SPINE, _HEAD),
    keypoints={name: name for name in _SAME} | {"upper_neck": "head_base"},
    build={"stoutness": (0.82, 1.3), "head": (0.85, 1.25)},
)
