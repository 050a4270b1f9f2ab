"""One synthetic scene: who stands where, before any colour, and how it becomes pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posefabric.data.canvas import FOREIGN, Canvas, Light
from posefabric.data.figure import (
    Body,
    Pose,
    Solids,
    View,
    camera_rotation,
    draw_pose,
    fit_view,
    keypoint_positions,
    solids,
)
from posefabric.data.scenery import draw_coats, draw_cover, draw_light, paint_cover

_LEAST_JOINTS = 0.5  # share of the keypoints that lies in the picture, whatever the crop


@dataclass(frozen=True)
class Layout:
    """Where everything is in one picture, before any colour.

    ``bystanders``: figures behind (False) or in front (True) of the person; ``covers``: masks
    (H, W) uint8 in front of everything.
    """

    pose: Pose
    view: View
    yaw: float
    person: Solids
    bystanders: tuple[tuple[Pose, View, bool], ...]
    covers: tuple[np.ndarray, ...]


def draw_layout(
    body: Body,
    names: tuple[str, ...],
    picture_wh: tuple[int, int],
    rng: np.random.Generator,
    *,
    turn: float = 180.0,
) -> Layout:
    """One scene; with ``turn`` below 180 figures stand upright, turned by at most so many
    degrees from facing the viewer, which makes left and right much easier to tell.
    """
    pose = draw_pose(body, rng)
    view, yaw = _draw_camera(rng, turn)
    size = min(picture_wh)
    cropped = rng.random() < 0.22
    for attempt in range(6):
        extent = size * (rng.uniform(1.0, 1.5) if cropped else rng.uniform(0.5, 0.94))
        slack = (np.array(picture_wh) - extent) / 2
        # A figure larger than the picture slides along its overhang, a smaller one in its room.
        centre = np.array(picture_wh) / 2 + rng.uniform(-1, 1, 2) * np.abs(slack)
        middle = (float(centre[0]), float(centre[1]))
        candidate = fit_view(pose, view, extent_px=extent, centre=middle)
        places = keypoint_positions(pose, candidate, names)[:, :2].round()
        inside = ((places >= 0) & (places < np.array(picture_wh))).all(1)
        if inside.mean() >= _LEAST_JOINTS and inside.sum() >= min(4, len(names)):
            break
        cropped = cropped and attempt < 4
    person = solids(pose, candidate)
    bystanders = []
    if rng.random() < 0.22:
        for _ in range(1 if rng.random() < 0.75 else 2):
            bystanders.append(_draw_bystander(body, candidate, person, picture_wh, rng))
    covers = []
    if rng.random() < 0.35:
        for _ in range(int(rng.integers(1, 3))):
            covers.append(draw_cover(picture_wh, person.extent_xyxy(), rng))
    return Layout(pose, candidate, yaw, person, tuple(bystanders), tuple(covers))


def _draw_camera(rng: np.random.Generator, turn: float) -> tuple[View, float]:
    yaw = rng.normal(0, 35) if rng.random() < 0.35 else rng.uniform(-180, 180)
    pitch = rng.normal(5, 12) if rng.random() < 0.85 else rng.uniform(-40, 60)
    kind = rng.random()
    roll = rng.normal(0, 8) if kind < 0.75 else rng.uniform(-180, 180)
    if 0.75 <= kind < 0.85:
        roll = rng.choice((-90.0, 90.0)) + rng.normal(0, 15)
    if turn < 180:
        yaw, roll = rng.uniform(-turn, turn), rng.normal(0, 8)
    distance = rng.uniform(3.0, 9.0)
    return View(camera_rotation(float(yaw), float(pitch), float(roll)), distance=distance), yaw


def _draw_bystander(
    body: Body, view: View, person: Solids, picture_wh: tuple[int, int], rng: np.random.Generator
) -> tuple[Pose, View, bool]:
    """Another figure whose middle lies beside the person, mostly behind."""
    pose = draw_pose(body, rng)
    camera, _ = _draw_camera(rng, 180.0)
    front = bool(rng.random() < 0.2)
    box = person.extent_xyxy()
    extent = float(max(box[2:] - box[:2])) * rng.uniform(0.5, 1.2)
    side = 1.0 if rng.random() < 0.5 else -1.0
    away = (0.5 * float(box[2] - box[0]) + extent * 0.3) * (
        1.15 if front else rng.uniform(0.7, 1.3)
    )
    x = float(box[0] + box[2]) / 2 + side * away
    y = float(box[1] + box[3]) / 2 + rng.normal(0, 0.08) * picture_wh[1]
    return pose, fit_view(pose, camera, extent_px=extent, centre=(x, y)), front


def paint_layout(canvas: Canvas, layout: Layout, rng: np.random.Generator | None) -> None:
    """Everything from back to front; without ``rng`` only owners and nearness."""
    behind = [(p, v) for p, v, front in layout.bystanders if not front]
    before = [(p, v) for p, v, front in layout.bystanders if front]
    if rng is not None:
        for pose, view in behind:
            _paint_figure(canvas, pose, view, rng)
            canvas.forget()
    _paint_figure(canvas, layout.pose, layout.view, rng, figure=layout.person)
    for pose, view in before:
        canvas.nearness[:] = -np.inf
        _paint_figure(canvas, pose, view, rng, foreign=True)
    for mask in layout.covers:
        canvas.cover(mask, np.zeros(3) if rng is None else paint_cover(mask.shape, rng))


def _paint_figure(
    canvas: Canvas,
    pose: Pose,
    view: View,
    rng: np.random.Generator | None,
    *,
    figure: Solids | None = None,
    foreign: bool = False,
) -> None:
    figure = solids(pose, view) if figure is None else figure
    if rng is None:
        canvas.paint(figure, view.scale, None, Light(), foreign=foreign)
        return
    coats = draw_coats(pose.body, figure.parts, rng)
    canvas.paint(figure, view.scale, coats, draw_light(rng), foreign=foreign)


def joint_visibility(
    canvas: Canvas, figure: Solids, names: tuple[str, ...], places: np.ndarray
) -> np.ndarray:
    """(K,) uint8: 2 where the picture shows a part that shows the keypoint, 0 outside, else 1.

    ``places`` (K, 3): x, y, nearness. The shown surface must also lie close to the keypoint: the
    far hip of a figure seen from its side is hidden although the trunk that shows it is seen.
    """
    height, width = canvas.owner.shape
    visibility = np.zeros(len(names), np.uint8)
    for number, name in enumerate(names):
        x, y, near = places[number].tolist()
        column, row = round(x), round(y)
        if not (0 <= column < width and 0 <= row < height):
            continue
        owner = int(canvas.owner[row, column])
        visibility[number] = 1
        if owner == 0 or owner == FOREIGN or name not in figure.parts[owner - 1].shows:
            continue
        depth = float(canvas.nearness[row, column]) - near
        if depth <= 1.3 * float(figure.radii[owner - 1].max()) + 1.0:
            visibility[number] = 2
    return visibility
