"""A four-legged animal for the synthetic pictures, as tables; lengths in trunk lengths.

Its keypoints carry AP-10K's 17 names (Yu et al., NeurIPS 2021 data sets), so that a network
searched here meets the same skeleton as one for real animals.
"""

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
    Joint("rump", None, _ORIGIN),
    Joint("root_of_tail", "rump", (0, 0.09, -0.15)),
    Joint("tail_middle", "root_of_tail", (0, -0.16, -0.10), 0.3),
    Joint("tail_end", "tail_middle", (0, -0.18, -0.04), 0.3),
    Joint("loin", "rump", (0, 0.02, 0.36), 0.10),
    Joint("withers", "loin", (0, 0.02, 0.36), 0.10),
    Joint("neck", "withers", (0, 0.06, 0.12)),
    Joint("head_base", "neck", (0, 0.24, 0.17), 0.3),
    Joint("nose", "head_base", (0, -0.06, 0.27), 0.2),
    Joint("left_eye", "head_base", (0.075, 0.055, 0.085)),
    Joint("left_ear", "head_base", (0.065, 0.09, -0.03)),
    Joint("left_shoulder", "withers", (0.10, -0.12, 0.05), 0.1),
    Joint("left_elbow", "left_shoulder", (0, -0.24, -0.06), 0.15),
    Joint("left_carpus", "left_elbow", (0, -0.23, 0.03), 0.25),
    Joint("left_front_paw", "left_carpus", (0, -0.12, 0.02), 0.15),
    Joint("left_hip", "rump", (0.10, -0.04, -0.02), 0.1),
    Joint("left_knee", "left_hip", (0, -0.24, 0.08), 0.15),
    Joint("left_hock", "left_knee", (0, -0.20, -0.14), 0.2),
    Joint("left_back_paw", "left_hock", (0, -0.18, 0.03), 0.15),
)

_BACK = ("neck", "left_shoulder", "right_shoulder", "left_hip", "right_hip", "root_of_tail")

_PARTS = mirrored_parts(
    Part(
        "rear", ("rump", (0, -0.01, -0.04)), ("loin", (0, -0.01, 0.02)), (0.14, 0.14), "trunk",
        width=(0.03, 0.03), shows=_BACK,
    ),
    Part(
        "ribs", ("loin", (0, -0.01, -0.02)), ("withers", (0, -0.04, 0.04)), (0.15, 0.16), "trunk",
        width=(0.03, 0.03), span=(1, 2), shows=_BACK,
    ),
    Part(
        "throat", ("withers", (0, -0.02, 0.04)), ("head_base", (0, 0.0, -0.02)), (0.13, 0.085),
        "trunk", span=(2, 3), shows=("neck", "left_shoulder", "right_shoulder"),
    ),
    Part(
        "skull", ("head_base", (0, 0.01, -0.01)), ("head_base", (0, 0.01, 0.06)), (0.095, 0.085),
        "coat", grows=False,
    ),
    Part(
        "muzzle", ("head_base", (0, -0.01, 0.09)), ("nose", (0, 0, -0.05)), (0.068, 0.048),
        "muzzle", grows=False,
    ),
    Part(
        "nose", ("nose", (0, 0.012, -0.02)), ("nose", (0, 0.006, 0.0)), (0.028, 0.024), "dark",
        shows=("nose",), grows=False,
    ),
    Part(
        "left_eye", ("left_eye", _ORIGIN), ("left_eye", (0.002, 0, 0.004)), (0.020, 0.020), "eye",
        shows=("left_eye",), grows=False,
    ),
    Part(
        "left_ear", ("left_ear", _ORIGIN), ("left_ear", (0.03, 0.12, -0.02)), (0.042, 0.014),
        "dark", option="upright_ears", grows=False,
    ),
    Part(
        "left_flap", ("left_ear", _ORIGIN), ("left_ear", (0.065, -0.11, 0.01)), (0.034, 0.040),
        "dark", option="hanging_ears", grows=False,
    ),
    Part(
        "tail", ("root_of_tail", (0, -0.01, 0.02)), ("tail_middle", _ORIGIN), (0.036, 0.028),
        "coat", shows=("root_of_tail",),
    ),
    Part("tail_tip", ("tail_middle", _ORIGIN), ("tail_end", _ORIGIN), (0.028, 0.024), "coat"),
    Part(
        "mane", ("withers", (0, 0.09, 0.04)), ("head_base", (0, 0.08, -0.06)), (0.055, 0.045),
        "dark", option="mane", shows=("neck",),
    ),
    Part(
        "left_upper_front", ("left_shoulder", _ORIGIN), ("left_elbow", _ORIGIN), (0.085, 0.055),
        "leg", shows=("left_shoulder", "left_elbow"),
    ),
    Part(
        "left_lower_front", ("left_elbow", _ORIGIN), ("left_carpus", _ORIGIN), (0.052, 0.036),
        "leg", span=(1, 2), shows=("left_elbow",),
    ),
    Part(
        "left_front_foot", ("left_carpus", _ORIGIN), ("left_front_paw", _ORIGIN), (0.036, 0.034),
        "leg", span=(2, 3), shows=("left_front_paw",),
    ),
    Part(
        "left_front_toes", ("left_front_paw", _ORIGIN), ("left_front_paw", (0, -0.01, 0.06)),
        (0.038, 0.030), "leg", span=(2.8, 3.2), shows=("left_front_paw",),
    ),
    Part(
        "left_upper_back", ("left_hip", _ORIGIN), ("left_knee", _ORIGIN), (0.115, 0.065),
        "leg", shows=("left_hip", "left_knee"),
    ),
    Part(
        "left_lower_back", ("left_knee", _ORIGIN), ("left_hock", _ORIGIN), (0.065, 0.036),
        "leg", span=(1, 2), shows=("left_knee",),
    ),
    Part(
        "left_back_foot", ("left_hock", _ORIGIN), ("left_back_paw", _ORIGIN), (0.036, 0.033),
        "leg", span=(2, 3), shows=("left_back_paw",),
    ),
    Part(
        "left_back_toes", ("left_back_paw", _ORIGIN), ("left_back_paw", (0, -0.01, 0.06)),
        (0.038, 0.030), "leg", span=(2.8, 3.2), shows=("left_back_paw",),
    ),
)  # fmt: skip


def _turn(flex: tuple[int, int], abduct: tuple[int, int] = (0, 0), twist=(0, 0)) -> Turn:
    return flex, abduct, twist


_LEGS = (
    Move("stand", 2, {
        "both_shoulder": _turn((-12, 12), (-4, 6)), "both_elbow": _turn((-8, 8)),
        "both_hip": _turn((-12, 12), (-4, 6)), "both_knee": _turn((-10, 10)),
    }),
    Move("walk", 3, {
        "left_shoulder": _turn((5, 40)), "right_shoulder": _turn((-40, 0)),
        "left_elbow": _turn((-5, 30)), "right_elbow": _turn((-20, 40)),
        "both_carpus": _turn((-70, 10)),
        "left_hip": _turn((-35, 5)), "right_hip": _turn((0, 40)), "both_knee": _turn((-25, 15)),
        "both_hock": _turn((-25, 25)),
    }),
    Move("gallop", 1.5, {
        "both_shoulder": _turn((-55, 65), (-5, 8)), "both_elbow": _turn((-20, 70)),
        "both_carpus": _turn((-90, 10)),
        "both_hip": _turn((-50, 60), (-5, 10)), "both_knee": _turn((-60, 30)),
        "both_hock": _turn((-30, 60)),
    }),
    Move("sit", 1, {
        "rump": _turn((25, 45)), "both_shoulder": _turn((-45, -20), (-4, 6)),
        "both_hip": _turn((20, 60), (0, 15)), "both_knee": _turn((-50, -20)),
        "both_hock": _turn((30, 70)),
    }),
    Move("lie", 1, {
        "both_shoulder": _turn((-10, 40), (-5, 15)), "both_elbow": _turn((40, 90)),
        "both_hip": _turn((40, 90), (0, 30)), "both_knee": _turn((-90, -40)),
        "both_hock": _turn((40, 90)),
    }),
)  # fmt: skip

_SPINE = (
    Move("level", 1, {"loin": _turn((-10, 10), (-4, 4), (-14, 14)),
                      "withers": _turn((-8, 8), (0, 0), (-12, 12))}),
)  # fmt: skip

_HEAD = (
    Move("look", 3, {"neck": _turn((-15, 25), (-10, 10), (-40, 40)),
                     "head_base": _turn((-30, 25), (-20, 20), (-45, 45))}),
    Move("graze", 1, {"neck": _turn((-110, -40), (0, 0), (-20, 20)),
                      "head_base": _turn((-20, 40), (0, 0), (-20, 20))}),
)  # fmt: skip

_TAIL = (
    Move("wag", 1, {"root_of_tail": _turn((-20, 100), (-45, 45)),
                    "tail_middle": _turn((-30, 50), (-40, 40))}),
)  # fmt: skip

_KEYPOINTS = (
    "left_eye", "right_eye", "nose", "neck", "root_of_tail",
    "left_shoulder", "left_elbow", "left_front_paw",
    "right_shoulder", "right_elbow", "right_front_paw",
    "left_hip", "left_knee", "left_back_paw", "right_hip", "right_knee", "right_back_paw",
)  # fmt: skip

QUADRUPED = Body(
    name="quadruped",
    joints=_JOINTS,
    middles={},
    parts=_PARTS,
    covers={
        "trunk": Cover("coat", "second", (0.8, 4.0)),
        "coat": Cover("coat", "coat", (0, 1)),
        "muzzle": Cover("second", "second", (0, 1)),
        "leg": Cover("coat", "second", (0.5, 4.0)),
        "dark": Cover("dark", "dark", (0, 1)),
        "eye": Cover("eye", "eye", (0, 1)),
    },
    materials={"coat": "fur", "second": "fur", "dark": "hair", "eye": "eye"},
    options={"upright_ears": 0.6, "hanging_ears": 0.35, "mane": 0.25},
    moves=(_LEGS, _SPINE, _HEAD, _TAIL),
    keypoints={name: name for name in _KEYPOINTS},
    build={"stoutness": (0.75, 1.25), "head": (0.8, 1.2)},
)
