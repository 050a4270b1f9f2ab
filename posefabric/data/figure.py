"""Articulated figures: a creature as tables, posed and projected into a picture.

Body frame: x to the creature's left, y up, z forward; lengths in body heights. World frame
after the camera's rotation: x to the picture's right, y up, z towards the viewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

Vector = tuple[float, float, float]
Range = tuple[float, float]
Turn = tuple[Range, Range, Range]


@dataclass(frozen=True)
class Joint:
    """A node of the kinematic tree: ``offset`` from ``parent`` in the rest pose.

    ``stretch`` is the relative spread of the bone's length over individuals.
    """

    name: str
    parent: str | None
    offset: Vector
    stretch: float = 0.0


@dataclass(frozen=True)
class Part:
    """A solid between two joints: spheres of radius ``ra`` to ``rb`` swept from a to b.

    Attributes:
        a, b: (joint, offset in the joint's frame) of the two ends.
        width: half width to the left and right at both ends; (0, 0) is a round limb, more a slab.
        role: the key of the part's cover, that is of its materials.
        span: the cover's coordinate at a and b; what lies below the cover's limit is "inside".
        shows: keypoints that count as seen where this part is what the picture shows.
        option: the part is there only in figures that drew this option.
        grows: whether the individual's stoutness changes the part.
    """

    name: str
    a: tuple[str, Vector]
    b: tuple[str, Vector]
    radius: tuple[float, float]
    role: str
    width: tuple[float, float] = (0.0, 0.0)
    span: tuple[float, float] = (0.0, 1.0)
    shows: tuple[str, ...] = ()
    option: str = ""
    grows: bool = True


@dataclass(frozen=True)
class Cover:
    """Material names below and above a limit that each individual draws from a range."""

    inside: str
    outside: str
    limit: Range


@dataclass(frozen=True)
class Move:
    """One way to hold some joints: degrees of (flex, abduct, twist), drawn uniformly.

    Flex turns about the left-right axis and brings a hanging limb forward; abduct moves it away
    from the middle; twist turns it outward about its own axis. ``both_x`` stands for left_x and
    right_x, drawn independently; a move that names sides is mirrored half of the time.
    """

    name: str
    weight: float
    turns: Mapping[str, Turn]


@dataclass(frozen=True)
class Body:
    """A creature. ``moves`` holds groups; a pose takes one move of every group."""

    name: str
    joints: tuple[Joint, ...]
    middles: Mapping[str, tuple[str, str]]
    parts: tuple[Part, ...]
    covers: Mapping[str, Cover]
    materials: Mapping[str, str]
    options: Mapping[str, float]
    moves: tuple[tuple[Move, ...], ...]
    keypoints: Mapping[str, str]
    build: Mapping[str, Range]


@dataclass(frozen=True)
class Pose:
    """Joint positions (3,) and frames (3, 3, columns left, up, forward) of one individual."""

    body: Body
    points: dict[str, np.ndarray]
    frames: dict[str, np.ndarray]
    stoutness: float
    thickness: dict[str, float]
    options: frozenset[str]


@dataclass(frozen=True)
class View:
    """A weak-perspective camera: rotation (3, 3) of the body, pixels a height, picture centre."""

    rotation: np.ndarray
    scale: float = 1.0
    centre: tuple[float, float] = (0.0, 0.0)
    distance: float = 6.0

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, 3) body points -> (N, 3) x, y, nearness in pixels, and (N,) pixels a height."""
        turned = points @ self.rotation.T
        scale = self.scale / np.maximum(1.0 - turned[:, 2] / self.distance, 0.2)
        picture = np.empty_like(turned)
        picture[:, 0] = self.centre[0] + scale * turned[:, 0]
        picture[:, 1] = self.centre[1] - scale * turned[:, 1]
        picture[:, 2] = self.scale * turned[:, 2]
        return picture, scale


@dataclass(frozen=True)
class Solids:
    """A projected figure; row n is one part, lengths in pixels.

    ``ends`` (N, 2, 3): x, y, nearness; ``halves`` (N, 2, 3): the half-width vectors;
    ``radii`` (N, 2); ``lengths`` (N,): the bone without foreshortening.
    """

    parts: tuple[Part, ...]
    ends: np.ndarray
    halves: np.ndarray
    radii: np.ndarray
    lengths: np.ndarray

    def extent_xyxy(self) -> np.ndarray:
        reach = self.radii[..., None] + np.abs(self.halves[..., :2])
        flat = self.ends[..., :2]
        return np.concatenate([(flat - reach).min((0, 1)), (flat + reach).max((0, 1))])


def rotation(flex: float, abduct: float, twist: float) -> np.ndarray:
    """Degrees -> (3, 3): twist about y, then flex about x, then abduct about z."""
    cx, cz, cy = (float(np.cos(np.radians(v))) for v in (flex, abduct, twist))
    sx, sz, sy = (float(np.sin(np.radians(v))) for v in (-flex, abduct, twist))
    return np.array(
        [
            [cz * cy - sz * sx * sy, -sz * cx, cz * sy + sz * sx * cy],
            [sz * cy + cz * sx * sy, cz * cx, sz * sy - cz * sx * cy],
            [-cx * sy, sx, cx * cy],
        ]
    )


def camera_rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Degrees -> (3, 3). Yaw 0 faces the viewer, 90 looks to the picture's right; a positive
    pitch looks from above; a positive roll turns the picture anticlockwise."""
    return rotation(0, roll, 0) @ rotation(-pitch, 0, 0) @ rotation(0, 0, yaw)


def draw_turns(body: Body, rng: np.random.Generator) -> dict[str, Vector]:
    """Draw one move of each group -> joint name to degrees of (flex, abduct, twist)."""
    turns: dict[str, Vector] = {}
    for group in body.moves:
        weights = np.cumsum([move.weight for move in group])
        move = group[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
        mirrored = rng.random() < 0.5
        for pattern, ranges in move.turns.items():
            for name in both_sides(pattern):
                low, high = np.array(ranges).T
                drawn = low + (high - low) * rng.random(3)
                turns[other_side(name) if mirrored else name] = tuple(drawn.tolist())
    return turns


def draw_pose(body: Body, rng: np.random.Generator) -> Pose:
    """A random individual of a body in a random pose."""
    build = {name: rng.uniform(*limits) for name, limits in body.build.items()}
    spread = {joint.name: rng.standard_normal() * joint.stretch for joint in body.joints}
    thickness = {part.name: rng.uniform(0.9, 1.12) for part in body.parts}
    options = frozenset(name for name, share in body.options.items() if rng.random() < share)
    return pose_figure(
        body,
        draw_turns(body, rng),
        stoutness=build.get("stoutness", 1.0),
        head=build.get("head", 1.0),
        spread=spread,
        thickness=thickness,
        options=options,
    )


def pose_figure(
    body: Body,
    turns: Mapping[str, Vector],
    *,
    stoutness: float = 1.0,
    head: float = 1.0,
    spread: Mapping[str, float] | None = None,
    thickness: Mapping[str, float] | None = None,
    options: frozenset[str] = frozenset(),
) -> Pose:
    """Forward kinematics: joint turns in degrees -> positions and frames.

    ``spread`` and ``thickness`` are read for the left side and hold for both, ``head`` scales
    what hangs on the joint named ``head_base``, and so do the parts there.
    """
    spread = spread or {}
    points: dict[str, np.ndarray] = {}
    frames: dict[str, np.ndarray] = {}
    for joint in body.joints:
        offset = np.array(joint.offset) * (1.0 + spread.get(_left(joint.name), 0.0))
        if joint.parent is None:
            frame, points[joint.name] = np.eye(3), offset
        else:
            frame = frames[joint.parent]
            points[joint.name] = points[joint.parent] + frame @ offset
        if joint.name in turns:
            flex, abduct, twist = turns[joint.name]
            side = -1.0 if joint.name.startswith("right_") else 1.0
            frame = frame @ rotation(flex, side * abduct, side * twist)
        # The head's size rides on its frame, so that all that hangs on it grows alike.
        frames[joint.name] = frame * head if joint.name == "head_base" else frame
    for name, (first, second) in body.middles.items():
        points[name] = (points[first] + points[second]) / 2
        frames[name] = frames[first]
    sizes = {p.name: (thickness or {}).get(_left(p.name), 1.0) for p in body.parts}
    return Pose(body, points, frames, stoutness, sizes, options)


def solids(pose: Pose, view: View) -> Solids:
    """Project the parts of a posed figure."""
    parts = tuple(p for p in pose.body.parts if not p.option or p.option in pose.options)
    joints = [joint for part in parts for joint, _ in (part.a, part.b)]
    frames = np.stack([pose.frames[joint] for joint in joints])
    offsets = np.array([offset for part in parts for _, offset in (part.a, part.b)])
    girth = np.array([pose.stoutness * pose.thickness[p.name] if p.grows else 1 for p in parts])
    girth = np.repeat(girth, 2)
    lefts = frames[:, :, 0]
    corners = np.stack([pose.points[joint] for joint in joints])
    corners += (frames @ offsets[..., None])[..., 0]
    edges = corners + lefts * (girth * np.array([p.width for p in parts]).ravel())[:, None]
    # A frame's columns are longer than 1 where an individual's head is large.
    radii = np.array([p.radius for p in parts]).ravel() * girth * np.linalg.norm(lefts, axis=1)
    count = len(joints)
    flat, scale = view.project(np.concatenate([corners, edges]))
    lengths = np.linalg.norm(corners[1::2] - corners[::2], axis=1) * view.scale
    return Solids(
        parts,
        flat[:count].reshape(-1, 2, 3),
        (flat[count:] - flat[:count]).reshape(-1, 2, 3),
        (radii * scale[:count]).reshape(-1, 2),
        lengths,
    )


def keypoint_positions(pose: Pose, view: View, names: tuple[str, ...]) -> np.ndarray:
    """Body keypoint names -> (K, 3) x, y, nearness in pixels."""
    return view.project(np.stack([pose.points[pose.body.keypoints[n]] for n in names]))[0]


def fit_view(pose: Pose, view: View, *, extent_px: float, centre: tuple[float, float]) -> View:
    """The view in which the figure's longer side measures ``extent_px`` about ``centre``."""
    box = solids(pose, replace(view, scale=1.0, centre=(0.0, 0.0))).extent_xyxy()
    scale = extent_px / float(max(box[2] - box[0], box[3] - box[1], 1e-6))
    middle = (box[:2] + box[2:]) / 2 * scale
    shifted = (centre[0] - float(middle[0]), centre[1] - float(middle[1]))
    return replace(view, scale=scale, centre=shifted)


def both_sides(name: str) -> tuple[str, ...]:
    """``both_knee`` -> left_knee, right_knee; any other name stands for itself."""
    if name.startswith("both_"):
        return "left_" + name[5:], "right_" + name[5:]
    return (name,)


def other_side(name: str) -> str:
    """left_x <-> right_x; any other name stands for itself."""
    if name.startswith("left_"):
        return "right_" + name[5:]
    return "left_" + name[6:] if name.startswith("right_") else name


def mirrored_joints(*joints: Joint) -> tuple[Joint, ...]:
    """Every ``left_`` joint and its mirror image, in order, the others as they are."""
    out: list[Joint] = []
    for joint in joints:
        out.append(joint)
        if joint.name.startswith("left_") and joint.parent is not None:
            x, y, z = joint.offset
            name, parent = other_side(joint.name), other_side(joint.parent)
            out.append(replace(joint, name=name, parent=parent, offset=(-x, y, z)))
    return tuple(out)


def mirrored_parts(*parts: Part) -> tuple[Part, ...]:
    """Every ``left_`` part and its mirror image, in order, the others as they are."""
    out: list[Part] = []
    for part in parts:
        out.append(part)
        if part.name.startswith("left_"):
            ends = [(other_side(joint), (-x, y, z)) for joint, (x, y, z) in (part.a, part.b)]
            shows = tuple(other_side(name) for name in part.shows)
            out.append(replace(part, name=other_side(part.name), a=ends[0], b=ends[1], shows=shows))
    return tuple(out)


def _left(name: str) -> str:
    return other_side(name) if name.startswith("right_") else name
