"""MPII's annotation files as they are: the HRNet family's JSON and the official .mat."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from posefabric.data.coco_json import PathLike, read_json
from posefabric.structures import DataError

NUM_JOINTS = 16


@dataclass
class MpiiRect:
    """One person of a picture, in the file's own 1-based pixels.

    Attributes:
        number: 1-based; row of a JSON file, or place in the picture's ``annorect``.
        centre: (2,), or None where the file has no position.
        scale: of 200 px, or None.
        joints, visibility: (16, 2) and (16,), COCO's 0 / 1 / 2, in MPII's order.
        headbox: (2, 2) corners, NaN where there is none.
        single: one of the persons that the single-person protocol evaluates.
    """

    number: int
    centre: np.ndarray | None
    scale: float | None
    joints: np.ndarray = field(default_factory=lambda: np.zeros((NUM_JOINTS, 2)))
    visibility: np.ndarray = field(default_factory=lambda: np.zeros(NUM_JOINTS, np.uint8))
    headbox: np.ndarray = field(default_factory=lambda: np.full((2, 2), np.nan))
    single: bool = True


@dataclass
class MpiiPicture:
    """A picture's file name, and its persons; ``train`` is None where the file does not say."""

    name: str
    train: bool | None
    rects: list[MpiiRect]


def read_mpii_file(path: PathLike) -> list[MpiiPicture]:
    """The pictures of an MPII file in its order (of a JSON: of their first persons).

    A ``.mat`` is read by the published structure of ``mpii_human_pose_v1_u12_1.mat``; this was
    not tried on the original. Raises DataError naming the file and the entry.
    """
    path = Path(path)
    return _read_mat(path) if path.suffix.lower() == ".mat" else _read_list(path)


def read_headboxes(path: PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Head boxes (N, 2, 2), two corners, and joints (N, 16, 2) where the file has them, 1-based.

    A ``.npz`` with ``headboxes`` and ``joints`` in these shapes, or the HRNet family's
    ``gt_valid.mat`` with ``headboxes_src`` (2, 2, N) and ``pos_gt_src`` (16, 2, N).
    """
    path = Path(path)
    if path.suffix.lower() == ".mat":
        content = _load_mat(path)
        heads, joints = content.get("headboxes_src"), content.get("pos_gt_src")
        heads = None if heads is None else np.moveaxis(heads, -1, 0)
        joints = None if joints is None else np.moveaxis(joints, -1, 0)
    else:
        try:
            with np.load(path, allow_pickle=False) as content:
                heads = content.get("headboxes")
                joints = content.get("joints")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as .npz: {error}") from error
    count = 0 if heads is None else len(heads)
    if heads is None or heads.shape != (count, 2, 2):
        came = "none" if heads is None else str(heads.shape)
        raise DataError(
            f"{path}: expected head boxes: `headboxes` (N, 2, 2) in a .npz, or `headboxes_src` "
            f"(2, 2, N) in a .mat; got {came}"
        )
    if joints is not None and joints.shape != (count, NUM_JOINTS, 2):
        raise DataError(f"{path}: joints of shape {joints.shape} beside {count} head boxes")
    joints = None if joints is None else joints.astype(np.float64)
    return heads.astype(np.float64), joints


def _read_list(path: Path) -> list[MpiiPicture]:
    tree = read_json(path)
    if not isinstance(tree, list) or not tree or not isinstance(tree[0], dict):
        raise DataError(
            f"{path}: expected MPII as the HRNet family has it, a list of {{image, center, scale, "
            "joints, joints_vis}; for COCO annotations choose data.format=coco"
        )
    pictures: dict[str, MpiiPicture] = {}
    for number, entry in enumerate(tree, 1):
        try:
            rect = _rect_of_entry(entry, number)
            name = str(entry["image"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: person {number}: expected image, center (x, y), scale and, but for a "
                f"test set, joints (16 x 2) and joints_vis (16); {type(error).__name__}: {error}"
            ) from error
        pictures.setdefault(name, MpiiPicture(name, None, [])).rects.append(rect)
    return list(pictures.values())


def _rect_of_entry(entry: dict[str, Any], number: int) -> MpiiRect:
    centre = np.asarray(entry["center"], dtype=np.float64).reshape(2)
    rect = MpiiRect(number, centre, float(entry["scale"]))
    # The family's files mark a person without a position by a centre of -1.
    if centre[0] == -1:
        rect.centre = None
    if "joints" in entry:
        rect.joints = np.asarray(entry["joints"], dtype=np.float64).reshape(NUM_JOINTS, 2)
        seen = np.asarray(entry["joints_vis"], dtype=np.float64).reshape(NUM_JOINTS) > 0
        rect.visibility = np.where(seen, 2, 0).astype(np.uint8)
    return rect


def _read_mat(path: Path) -> list[MpiiPicture]:
    content = _load_mat(path)
    release = _first(content.get("RELEASE"))
    missing = [key for key in ("annolist", "img_train", "single_person") if not _has(release, key)]
    if missing:
        raise DataError(
            f"{path}: expected RELEASE with annolist, img_train and single_person, as in "
            f"mpii_human_pose_v1_u12_1.mat; {', '.join(missing)} missing"
        )
    entries = _items(release.annolist)
    flags, singles = _items(release.img_train), _items(release.single_person)
    if not len(entries) == len(flags) == len(singles):
        raise DataError(
            f"{path}: {len(entries)} pictures in annolist, {len(flags)} in img_train and "
            f"{len(singles)} in single_person; is the file complete?"
        )
    pictures = []
    for number, (entry, flag, chosen) in enumerate(zip(entries, flags, singles, strict=True), 1):
        single = {int(value) for value in np.ravel(chosen)}
        try:
            name = str(_first(_first(entry.image).name))
            rects = [
                _rect_of_struct(rect, place, place in single)
                for place, rect in enumerate(_items(getattr(entry, "annorect", None)), 1)
            ]
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: picture {number} of annolist: {error}") from error
        pictures.append(MpiiPicture(name, bool(flag), rects))
    return pictures


def _rect_of_struct(rect: Any, number: int, single: bool) -> MpiiRect:
    position, scale = _first(getattr(rect, "objpos", None)), _first(getattr(rect, "scale", None))
    centre = None
    if _has(position, "x") and _has(position, "y"):
        centre = np.array([_first(position.x), _first(position.y)], dtype=np.float64)
    found = MpiiRect(number, centre, None if scale is None else float(scale), single=single)
    corners = [_first(getattr(rect, key, None)) for key in ("x1", "y1", "x2", "y2")]
    if all(value is not None for value in corners):
        found.headbox = np.array(corners, dtype=np.float64).reshape(2, 2)
    points = _first(getattr(rect, "annopoints", None))
    for point in _items(getattr(points, "point", None)):
        joint = int(_first(point.id))
        if not 0 <= joint < NUM_JOINTS:
            raise ValueError(f"person {number}: joint id {joint}, expected 0 to {NUM_JOINTS - 1}")
        found.joints[joint] = _first(point.x), _first(point.y)
        # The torso and head joints carry no visibility; text and numbers both occur.
        visible = _first(getattr(point, "is_visible", None))
        found.visibility[joint] = 1 if visible is not None and float(visible) == 0 else 2
    return found


def _load_mat(path: Path) -> dict[str, Any]:
    try:
        return loadmat(str(path), struct_as_record=False, squeeze_me=False)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such annotation file") from error
    except (ValueError, NotImplementedError, OSError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a MATLAB file: {error}") from error


def _items(value: Any) -> list[Any]:
    return [] if value is None else list(np.ravel(value))


def _first(value: Any) -> Any:
    """The one value in a MATLAB array, None for an empty one."""
    if isinstance(value, np.ndarray):
        return value.flat[0] if value.size else None
    return value


def _has(value: Any, key: str) -> bool:
    inner = getattr(value, key, None)
    return inner is not None and np.size(inner) > 0
