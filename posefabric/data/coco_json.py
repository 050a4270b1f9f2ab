"""The JSON of COCO annotation files: reading it, and whether it fits a skeleton."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from posefabric.skeletons import Skeleton, load_skeleton, shipped_skeletons
from posefabric.structures import DataError

PathLike = str | os.PathLike[str]


def read_json(path: PathLike) -> Any:
    """Parsed JSON; raises DataError with the file and the position of the mistake."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such annotation file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} "
            f"(character {error.pos}): {error.msg}; is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a UTF-8 text at byte {error.start}") from error


def load_coco_tree(path: PathLike, *, annotated: bool = True) -> dict[str, Any]:
    """The parsed file, checked to have ``images`` and a non-empty list of ``annotations``.

    Without ``annotated`` the annotations may be missing or empty, as in COCO's image_info files.
    """
    tree = read_json(path)
    if isinstance(tree, list):
        raise DataError(
            f"{path}: a list, as detections and results are; expected COCO annotations: an object "
            "with images, annotations and categories"
        )
    if not annotated and isinstance(tree, dict):
        tree.setdefault("annotations", [])
    for key in ("images", "annotations"):
        found = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(found, list):
            advice = "; detected boxes can do without: data.boxes=FILE" if key != "images" else ""
            raise DataError(
                f"{path}: COCO annotations have a list `{key}`, this file has none{advice}"
            )
        if not found and (annotated or key == "images"):
            raise DataError(
                f"{path}: the list `{key}` is empty; is this the right split? (Without "
                "annotations give detected boxes: data.boxes=FILE)"
            )
        if not all(isinstance(entry, dict) for entry in found):
            raise DataError(f"{path}: every entry of `{key}` must be an object in braces")
    return tree


def person_categories(
    categories: list[dict[str, Any]] | None, skeleton: Skeleton, path: PathLike
) -> set[int] | None:
    """Ids of the categories whose keypoints are the skeleton's; None: every one.

    Raises DataError when categories name their keypoints and none has the skeleton's names in
    its order.
    """
    named = [entry for entry in categories or [] if entry.get("keypoints")]
    if not named:
        persons = {entry["id"] for entry in categories or [] if entry.get("name") == "person"}
        return persons or None
    wanted = [_plain(name) for name in skeleton.keypoints]
    fitting = {
        entry["id"]
        for entry in named
        if "id" in entry and [_plain(name) for name in entry["keypoints"]] == wanted
    }
    if fitting:
        return fitting
    entry = named[0]
    found = [_plain(name) for name in entry["keypoints"]]
    difference = (
        "the same names in another order"
        if sorted(found) == sorted(wanted)
        else (f"{len(found)} against {len(wanted)} names")
    )
    raise DataError(
        f"{path}: the keypoints of category {entry.get('name')!r} are not those of skeleton "
        f"{skeleton.name} ({difference})\n  file:     {', '.join(map(str, entry['keypoints']))}\n"
        f"  skeleton: {', '.join(skeleton.keypoints)}\n"
        f"{_advice(found)}"
    )


def keypoint_count_error(count: int, skeleton: Skeleton) -> str:
    """The text for an annotation with ``count`` numbers in ``keypoints``."""
    expected = 3 * skeleton.num_keypoints
    advice = f"choose data.skeleton=... with {count // 3} keypoints, or correct the annotation"
    if count % 3:
        advice = "a keypoint is x, y, visibility: correct the annotation"
    return (
        f"{count} numbers in keypoints, expected {expected} = 3 x {skeleton.num_keypoints} "
        f"for skeleton {skeleton.name}; {advice}"
    )


def _advice(names: list[str]) -> str:
    for shipped in shipped_skeletons():
        if [_plain(name) for name in load_skeleton(shipped).keypoints] == names:
            return f"choose data.skeleton={shipped}"
    return "choose data.skeleton=... with the file's keypoints, in the file's order"


def _plain(name: Any) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")
