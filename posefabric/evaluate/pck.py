"""The share of keypoints found: PCKh (MPII), PCK by torso (LSP), PCK by box (animals, hands)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from posefabric.skeletons import Skeleton

LIMB_JOINTS = tuple(
    f"{side}_{joint}"
    for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    for side in ("left", "right")
)
# The head's size is 0.6 of the diagonal of the annotated head box (MPII protocol).
_HEAD_BOX_SHARE = 0.6
# MPII's own order of joints; head is the head top, each other row is right and left.
_MPII_GROUPS = {
    "Head": (9,),
    "Shoulder": (12, 13),
    "Elbow": (11, 14),
    "Wrist": (10, 15),
    "Hip": (2, 3),
    "Knee": (1, 4),
    "Ankle": (0, 5),
}
_MPII_LEFT_OUT = (6, 7)


def mpii_pckh(
    predictions: np.ndarray,
    joints: np.ndarray,
    visible: np.ndarray,
    headboxes: np.ndarray,
    *,
    threshold: float = 0.5,
    legacy: bool = False,
) -> dict[str, float | None]:
    """PCKh of MPII in percent, a joint being found within 0.5 head sizes (0.6 x head diagonal).

    Args:
        predictions, joints: (N, 16, 2) in one pixel coordinate system, MPII's own joint order.
        visible: (N, 16), non-zero where annotated.
        headboxes: (N, 2, 2), two opposite corners in the same coordinates.
        threshold: of all but the means at 0.1, in head sizes.
        legacy: adds ``Mean@0.1 legacy``, which takes index 11 of a 0.01 grid, that is 0.11,
            as much published code does under the name PCKh@0.1.

    Returns:
        Head, Shoulder, Elbow, Wrist, Hip, Knee, Ankle (plain mean of right and left), Mean and
        Mean@0.1 (the true 0.10), both over every annotated joint but pelvis and thorax. None
        where no joint of the kind is annotated.

    Raises:
        PosefabricError: shapes differ, or a head box has no size.
    """
    if not threshold > 0:
        raise PosefabricError(f"threshold: expected a share above 0, got {threshold}")
    predictions, joints, annotated = _checked(predictions, joints, visible, num_keypoints=16)
    headboxes = np.asarray(headboxes, dtype=np.float64)
    if headboxes.shape != (len(joints), 2, 2):
        raise PosefabricError(
            f"headboxes: expected two corners a person, {(len(joints), 2, 2)}, "
            f"got {headboxes.shape}"
        )
    head_sizes = _HEAD_BOX_SHARE * np.linalg.norm(headboxes[:, 1] - headboxes[:, 0], axis=-1)
    if not np.all(head_sizes > 0):
        row = int(np.flatnonzero(~(head_sizes > 0))[0])
        raise PosefabricError(
            f"headboxes: row {row} has corners {headboxes[row].tolist()}, expected a box with a "
            "size; leave the person out"
        )
    distances = _distances(predictions, joints) / head_sizes[:, None]
    counted = annotated.copy()
    counted[:, _MPII_LEFT_OUT] = False
    found = (distances <= threshold) & annotated
    result: dict[str, float | None] = {}
    for name, columns in _MPII_GROUPS.items():
        shares = [_percent(found[:, column], annotated[:, column]) for column in columns]
        known = [share for share in shares if share is not None]
        result[name] = sum(known) / len(known) if known else None
    result["Mean"] = _percent(found & counted, counted)
    result["Mean@0.1"] = _percent((distances <= 0.1) & counted, counted)
    if legacy:
        result["Mean@0.1 legacy"] = _percent((distances <= 0.11) & counted, counted)
    return result


def pck_torso(
    predictions: np.ndarray,
    joints: np.ndarray,
    visible: np.ndarray,
    skeleton: Skeleton,
    threshold: float = 0.2,
    subset: Sequence[int] | None = None,
    *,
    parts: Mapping[str, Sequence[int]] | None = None,
    keep_hits: bool = False,
) -> dict[str, Any]:
    """PCK of LSP: a joint is found within ``threshold`` torsos (left shoulder to right hip).

    A person whose torso is not annotated (or has no length) is left out and counted.

    Args:
        predictions, joints: (N, K, 2) in image pixels; a prediction that is not finite misses.
        visible: (N, K), non-zero where annotated.
        skeleton: its ``torso`` names the two joints.
        threshold: fraction of the torso.
        subset: indices of the keypoints counted in ``PCK`` and ``joints``; none: all.
        parts: keypoint indices by part name, for ``per_part``.
        keep_hits: adds ``found`` and ``counted``, boolean arrays (N, K), not for JSON: which
            keypoints count, and which of them are found.

    Returns:
        A JSON-serialisable dict; every value is a fraction, None where nothing was annotated:
        ``PCK`` (micro mean over the annotated joints), ``limbs`` and ``limb_joints`` (the same
        over shoulders, elbows, wrists, hips, knees, ankles; None for skeletons without these
        twelve), ``persons``, ``left_out``, ``joints`` (counts), ``per_joint`` and ``per_part``
        (name to value and count), ``normaliser``, ``threshold``.

    Raises:
        PosefabricError: the skeleton has no torso, shapes differ, or an index is out of range.
    """
    if skeleton.torso is None:
        raise PosefabricError(
            f"skeleton {skeleton.name}: has no torso, which PCK by torso needs; use the box as "
            "normaliser or add `torso` to the skeleton file"
        )
    predictions, joints, annotated = _checked(
        predictions, joints, visible, num_keypoints=skeleton.num_keypoints
    )
    first, second = skeleton.torso
    lengths = np.linalg.norm(joints[:, first] - joints[:, second], axis=-1)
    usable = annotated[:, first] & annotated[:, second] & (lengths > 0)
    names = f"{skeleton.keypoints[first]} to {skeleton.keypoints[second]}"
    return _pck(
        predictions,
        joints,
        annotated,
        sizes=lengths,
        usable=usable,
        skeleton=skeleton,
        threshold=threshold,
        subset=subset,
        parts=parts,
        keep_hits=keep_hits,
        normaliser=f"torso ({names})",
    )


def pck_box(
    predictions: np.ndarray,
    joints: np.ndarray,
    visible: np.ndarray,
    boxes_xywh: np.ndarray,
    skeleton: Skeleton,
    threshold: float = 0.05,
    subset: Sequence[int] | None = None,
    *,
    parts: Mapping[str, Sequence[int]] | None = None,
    keep_hits: bool = False,
) -> dict[str, Any]:
    """PCK by the longer side of the box (N, 4): for animals, hands, anything without a torso.

    0.05 is the usual threshold for animals, 0.2 for hands. A person without annotated joints
    or with an empty box is left out and counted. Arguments, result and errors otherwise as in
    :func:`pck_torso`.
    """
    predictions, joints, annotated = _checked(
        predictions, joints, visible, num_keypoints=skeleton.num_keypoints
    )
    boxes_xywh = np.asarray(boxes_xywh, dtype=np.float64)
    if boxes_xywh.shape != (len(joints), 4):
        raise PosefabricError(
            f"boxes_xywh: expected one box a person, {(len(joints), 4)}, got {boxes_xywh.shape}"
        )
    sides = boxes_xywh[:, 2:].max(axis=-1)
    return _pck(
        predictions,
        joints,
        annotated,
        sizes=sides,
        usable=annotated.any(axis=1) & (sides > 0),
        skeleton=skeleton,
        threshold=threshold,
        subset=subset,
        parts=parts,
        keep_hits=keep_hits,
        normaliser="longer side of the box",
    )


def pck(
    predictions: np.ndarray,
    joints: np.ndarray,
    visible: np.ndarray,
    skeleton: Skeleton,
    *,
    boxes_xywh: np.ndarray | None = None,
    normaliser: Literal["auto", "torso", "box"] = "auto",
    threshold: float | None = None,
    subset: Sequence[int] | None = None,
    parts: Mapping[str, Sequence[int]] | None = None,
    keep_hits: bool = False,
) -> dict[str, Any]:
    """PCK by torso where the skeleton has one, by box elsewhere; the result says which.

    Raises PosefabricError as :func:`pck_torso` and :func:`pck_box` do, and when the box is
    the normaliser but ``boxes_xywh`` is missing.
    """
    if normaliser not in ("auto", "torso", "box"):
        raise PosefabricError(f"normaliser: expected auto, torso or box, got {normaliser!r}")
    if normaliser == "torso" or (normaliser == "auto" and skeleton.torso is not None):
        share = 0.2 if threshold is None else threshold
        return pck_torso(
            predictions, joints, visible, skeleton, share, subset, parts=parts, keep_hits=keep_hits
        )
    if boxes_xywh is None:
        raise PosefabricError(
            f"skeleton {skeleton.name}: PCK is measured by the box here, but no boxes_xywh came; "
            "pass the persons' boxes (N, 4)"
        )
    share = 0.05 if threshold is None else threshold
    return pck_box(
        predictions,
        joints,
        visible,
        boxes_xywh,
        skeleton,
        share,
        subset,
        parts=parts,
        keep_hits=keep_hits,
    )


def _pck(
    predictions: np.ndarray,
    joints: np.ndarray,
    annotated: np.ndarray,
    *,
    sizes: np.ndarray,
    usable: np.ndarray,
    skeleton: Skeleton,
    threshold: float,
    subset: Sequence[int] | None,
    parts: Mapping[str, Sequence[int]] | None,
    keep_hits: bool,
    normaliser: str,
) -> dict[str, Any]:
    if not threshold > 0:
        raise PosefabricError(f"threshold: expected a positive fraction, got {threshold}")
    groups = {"subset": range(skeleton.num_keypoints) if subset is None else subset}
    groups.update({f"part {name}": columns for name, columns in (parts or {}).items()})
    for name, columns in groups.items():
        wrong = [c for c in columns if not 0 <= c < skeleton.num_keypoints]
        if wrong:
            raise PosefabricError(
                f"{name}: keypoint {wrong[0]} is not one of the {skeleton.num_keypoints} of "
                f"skeleton {skeleton.name}"
            )
    counted = annotated & usable[:, None]
    found = (_distances(predictions, joints) <= threshold * sizes[:, None]) & counted
    everything = _share(found, counted, groups["subset"])
    limbs: dict[str, Any] = {"value": None, "count": 0}
    if set(LIMB_JOINTS) <= set(skeleton.keypoints):
        limbs = _share(found, counted, [skeleton.keypoints.index(name) for name in LIMB_JOINTS])
    result: dict[str, Any] = {
        "PCK": everything["value"],
        "limbs": limbs["value"],
        "limb_joints": limbs["count"],
        "normaliser": normaliser,
        "threshold": float(threshold),
        "persons": int(usable.sum()),
        "left_out": int((~usable).sum()),
        "joints": everything["count"],
        "per_joint": {
            name: _share(found, counted, [column]) for column, name in enumerate(skeleton.keypoints)
        },
    }
    if parts is not None:
        result["per_part"] = {
            name: _share(found, counted, columns) for name, columns in parts.items()
        }
    if keep_hits:
        result.update(found=found, counted=counted)
    return result


def _share(found: np.ndarray, counted: np.ndarray, columns: Sequence[int]) -> dict[str, Any]:
    columns = list(columns)
    count = int(counted[:, columns].sum())
    return {"value": int(found[:, columns].sum()) / count if count else None, "count": count}


def _percent(found: np.ndarray, counted: np.ndarray) -> float | None:
    count = int(counted.sum())
    return 100.0 * int(found.sum()) / count if count else None


def _distances(predictions: np.ndarray, joints: np.ndarray) -> np.ndarray:
    distances = np.linalg.norm(predictions - joints, axis=-1)
    # A network that diverged must score 0, not disappear from the mean.
    return np.where(np.isfinite(distances), distances, np.inf)


def _checked(
    predictions: np.ndarray, joints: np.ndarray, visible: np.ndarray, *, num_keypoints: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    predictions = np.asarray(predictions, dtype=np.float64)
    joints = np.asarray(joints, dtype=np.float64)
    annotated = np.asarray(visible) > 0
    expected = (len(joints), num_keypoints, 2)
    for name, value, shape in (
        ("joints", joints, expected),
        ("predictions", predictions, expected),
        ("visible", annotated, expected[:2]),
    ):
        if value.shape != shape:
            raise PosefabricError(f"{name}: expected shape {shape}, got {value.shape}")
    return predictions, joints, annotated
