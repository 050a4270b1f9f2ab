"""Synthetic persons: pictures of articulated figures with exact keypoints and visibility.

Everything about picture i follows from (seed, i). What decides positions and visibility is drawn
from one stream and what decides looks from another, so annotations need no colours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from posefabric.data.canvas import FOREIGN, Canvas
from posefabric.data.figure import Body, keypoint_positions
from posefabric.data.human import HUMAN
from posefabric.data.quadruped import QUADRUPED
from posefabric.data.scene import Layout, draw_layout, joint_visibility, paint_layout
from posefabric.data.scenery import develop, draw_background
from posefabric.skeletons import Skeleton
from posefabric.structures import DataError, Person, PersonDataset

BODIES = (HUMAN, QUADRUPED)


@dataclass(frozen=True)
class SyntheticPictures:
    """Draws the pictures of one data set; call it with a person of that data set."""

    seed: int
    body: Body
    names: tuple[str, ...]
    picture_wh: tuple[int, int]
    turn: float = 180.0

    def __call__(self, person: Person) -> np.ndarray:
        """(H, W, 3) uint8 RGB; raises DataError for a person of another data set."""
        if not person.file.startswith(f"synthetic/{self.seed}/"):
            raise DataError(
                f"{person.file}: expected a person made with seed {self.seed}; read each person "
                "through the data set that holds it"
            )
        return self.picture(person.image_id - 1)

    def layout(self, index: int) -> Layout:
        """Pose, camera and what stands in front of the person in picture ``index``."""
        rng = np.random.default_rng((self.seed, index, 0))
        return draw_layout(self.body, self.names, self.picture_wh, rng, turn=self.turn)

    def picture(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of picture ``index``."""
        layout = self.layout(index)
        rng = np.random.default_rng((self.seed, index, 1))
        canvas = Canvas(self.picture_wh, draw_background(self.picture_wh, rng))
        paint_layout(canvas, layout, rng)
        assert canvas.picture is not None
        return develop(canvas.picture, rng)

    def person(self, index: int) -> Person:
        """The annotation of picture ``index``, from owners and depths alone."""
        layout = self.layout(index)
        canvas = Canvas(self.picture_wh, None)
        paint_layout(canvas, layout, None)
        places = keypoint_positions(layout.pose, layout.view, self.names)
        visibility = joint_visibility(canvas, layout.person, self.names, places)
        keypoints = np.where(visibility[:, None] > 0, places[:, :2], 0).astype(np.float32)
        owned = (canvas.owner > 0) & (canvas.owner != FOREIGN)
        return Person(
            image_id=index + 1,
            annotation_id=index + 1,
            file=f"synthetic/{self.seed}/{index:06d}",
            box_xywh=_keypoint_box(keypoints[visibility > 0], self.picture_wh),
            keypoints=keypoints,
            visibility=visibility,
            area=float(max(np.count_nonzero(owned), 1)),
        )


def synthetic_people(
    *,
    count: int,
    seed: int,
    skeleton: Skeleton,
    picture_wh: tuple[int, int] = (192, 192),
    turn: float = 180.0,
) -> PersonDataset:
    """Pictures of one annotated synthetic creature each, drawn anew whenever they are read.

    A skeleton whose keypoints a human body has gives humans, one that needs a four-legged body
    gives animals. Boxes are the keypoints' extent plus 10 % and 2 px on every side, cut at the
    picture; areas are the figure's visible pixels. The same arguments give the same data set.
    ``turn`` below 180 keeps figures upright and at most so many degrees from facing the viewer.

    Raises DataError when ``count`` or a side of ``picture_wh`` is out of range, or when no body
    has one of the skeleton's keypoints (the message names it).
    """
    if count < 1 or seed < 0:
        raise DataError(f"synthetic_people: expected count >= 1, seed >= 0, got {count}, {seed}")
    if not 0 <= turn <= 180:
        raise DataError(f"synthetic_people: expected turn in 0 .. 180 degrees, got {turn}")
    if min(picture_wh) < 32:
        raise DataError(f"synthetic_people: picture_wh: each side is at least 32, got {picture_wh}")
    body, names = find_body(skeleton)
    pictures = SyntheticPictures(seed, body, names, picture_wh, turn)
    return PersonDataset(
        name=f"synthetic {body.name} (seed {seed}, {count} pictures)",
        skeleton=skeleton,
        persons=[pictures.person(index) for index in range(count)],
        read_image=pictures,
        box_source="ground truth (synthetic)",
    )


def find_body(skeleton: Skeleton) -> tuple[Body, tuple[str, ...]]:
    """The body that has all keypoints of a skeleton, and their names there."""
    names = tuple(_plain_name(name) for name in skeleton.keypoints)
    missing = {body.name: [n for n in names if n not in body.keypoints] for body in BODIES}
    for body in BODIES:
        if not missing[body.name]:
            return body, names
    nearest = min(BODIES, key=lambda body: len(missing[body.name]))
    keypoint = skeleton.keypoints[names.index(missing[nearest.name][0])]
    raise DataError(
        f"skeleton {skeleton.name}: no synthetic body has the keypoint {keypoint!r}; the "
        f"{nearest.name} has {', '.join(nearest.keypoints)}; use one of these names, or real data"
    )


def write_coco(
    dataset: PersonDataset, folder: Path | str, split: str, *, extension: str = "jpg"
) -> Path:
    """Write a data set in COCO's layout and return the path of its annotations.

    ``folder/annotations/{split}.json`` with one category, ``folder/{split}/*.{extension}``
    ("jpg", quality 95, or the lossless "png"). Raises DataError for another extension or when a
    picture cannot be written.
    """
    if extension not in ("jpg", "png"):
        raise DataError(f"write_coco: extension: expected jpg or png, got {extension!r}")
    root = Path(folder)
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: dict[int, dict] = {}
    annotations = []
    for person in dataset.persons:
        if person.image_id not in images:
            picture = dataset.read_image(person)
            name = f"{person.image_id:012d}.{extension}"
            options = [cv2.IMWRITE_JPEG_QUALITY, 95] if extension == "jpg" else []
            done, data = cv2.imencode(f".{extension}", picture[..., ::-1], options)
            if not done:
                raise DataError(f"{root / split / name}: the picture could not be encoded")
            (root / split / name).write_bytes(data.tobytes())
            height, width = picture.shape[:2]
            images[person.image_id] = {
                "id": person.image_id,
                "file_name": name,
                "width": width,
                "height": height,
            }
        annotations.append(_coco_annotation(person))
    skeleton = dataset.skeleton
    category = {
        "id": 1,
        "name": "person",
        "supercategory": "person",
        "keypoints": list(skeleton.keypoints),
        "skeleton": [[a + 1, b + 1] for a, b in skeleton.limbs],
    }
    tree = {
        "info": {"description": dataset.name, "version": "1.0"},
        "licenses": [],
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [category],
    }
    path = root / "annotations" / f"{split}.json"
    # The annotations come last and at once: a folder that has them has all its pictures.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(tree), encoding="utf-8")
    partial.replace(path)
    return path


def _coco_annotation(person: Person) -> dict:
    rows = np.concatenate([person.keypoints, person.visibility[:, None]], 1)
    flat = [int(v) if n % 3 == 2 else float(v) for n, v in enumerate(rows.reshape(-1))]
    return {
        "id": person.annotation_id,
        "image_id": person.image_id,
        "category_id": 1,
        "iscrowd": int(person.is_crowd),
        "bbox": [float(v) for v in person.box_xywh],
        "area": person.area,
        "num_keypoints": int(np.count_nonzero(person.visibility)),
        "keypoints": flat,
    }


def _keypoint_box(keypoints: np.ndarray, picture_wh: tuple[int, int]) -> np.ndarray:
    low, high = keypoints.min(0), keypoints.max(0)
    grow = 0.1 * (high - low) + 2.0
    low = np.maximum(low - grow, 0)
    high = np.minimum(high + grow, np.array(picture_wh, np.float32))
    return np.concatenate([low, high - low]).astype(np.float32)


def _plain_name(name: str) -> str:
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    for short, full in (("l_", "left_"), ("r_", "right_")):
        if plain.startswith(short):
            return full + plain[2:]
    return plain
