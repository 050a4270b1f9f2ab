"""The released code's keypoints and parts (PAPER section 2), in that code's own order and names.

The names are in the checkpoints: a part's tensors begin with its name, and its maps are in the
order of its keypoints.
"""

from __future__ import annotations

from posefabric.structures import PosefabricError

SKELETONS = {"coco": "coco17", "mpii": "mpii16"}

_LIMBS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_SIDES = tuple(f"{side}_{limb}" for limb in _LIMBS for side in ("left", "right"))

# By our skeletons' names.
KEYPOINTS: dict[str, tuple[str, ...]] = {
    "coco": ("nose", "left_eye", "right_eye", "left_ear", "right_ear", *_SIDES),
    "mpii": ("head_top", "upper_neck", "thorax", *_SIDES, "pelvis"),
}
HEAD = {"coco": KEYPOINTS["coco"][:5], "mpii": KEYPOINTS["mpii"][:3]}


def released_parts(dataset: str, count: object) -> dict[str, list[int]]:
    """Part name to keypoint indices for P = 1, 3, 5 or 8 parts.

    Raises PosefabricError for another number.
    """
    head, names = HEAD[dataset], KEYPOINTS[dataset]
    pelvis = ("pelvis",) if dataset == "mpii" else ()
    hips, shoulders = ("left_hip", "right_hip"), ("left_shoulder", "right_shoulder")
    knees, ankles = ("left_knee", "right_knee"), ("left_ankle", "right_ankle")
    parts: dict[str, tuple[str, ...]]
    if count == 1:
        parts = {"whole_body": names}
    elif count == 3:
        parts = {
            "upper_limb_part": _SIDES[:6],
            "head_part": head,
            "lower_limb_part": (*_SIDES[6:], *pelvis),
        }
    elif count == 5:
        parts = {
            "left_arm_part": ("left_elbow", "left_wrist"),
            "right_arm_part": ("right_elbow", "right_wrist"),
            "legs_part": (*knees, *ankles),
            "head_shoulder_part": (*head, *shoulders),
            "hips_part": (*pelvis, *hips),
        }
    elif count == 8:
        pairs = {
            "upper_arm": ("shoulder", "elbow"),
            "lower_arm": ("elbow", "wrist"),
            "lower_leg": ("knee", "ankle"),
        }
        parts = {
            f"{side}_{limb}_part": tuple(f"{side}_{joint}" for joint in joints)
            for limb, joints in pairs.items()
            for side in ("left", "right")
        }
        parts["head_shoulder_part"] = (*head, *shoulders)
        parts["upper_legs_part"] = (hips[0], *pelvis, hips[1], *knees)
    else:
        raise PosefabricError(f"parts_num is {count}, expected 1, 3, 5 or 8, or give parts")
    return {part: [names.index(k) for k in keypoints] for part, keypoints in parts.items()}
