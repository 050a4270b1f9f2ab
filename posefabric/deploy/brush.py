"""Colours, antialiased strokes and text: what a drawing of a pose is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

if TYPE_CHECKING:
    from posefabric.skeletons import Skeleton

Colour = tuple[int, int, int]
Side = Literal["left", "right", "middle"]

DARK: Colour = (18, 20, 26)
WHITE: Colour = (255, 255, 255)
SHEET: Colour = (28, 30, 36)
TEXT: Colour = (226, 228, 232)

_RAMPS: dict[Side, tuple[Colour, ...]] = {
    "left": ((255, 62, 88), (255, 136, 20), (255, 214, 60)),
    "right": ((92, 104, 255), (0, 170, 255), (20, 225, 190)),
    "middle": ((245, 245, 245), (196, 198, 206)),
}
_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates


def keypoint_sides(skeleton: Skeleton) -> tuple[Side, ...]:
    """Left, right or middle for each of the K keypoints, from the (left, right) flip pairs."""
    sides: list[Side] = ["middle"] * len(skeleton.keypoints)
    for left, right in skeleton.flip_pairs:
        sides[left], sides[right] = "left", "right"
    return tuple(sides)


def limb_colours(skeleton: Skeleton) -> list[Colour]:
    """RGB of each limb: warm on the left, cool on the right, neutral between the sides.

    Along one side the colour runs through a ramp, so that neighbouring limbs differ.
    """
    return _along_ramps(_limb_sides(skeleton))


def keypoint_colours(skeleton: Skeleton) -> list[Colour]:
    """RGB of each keypoint: that of a limb of its side that ends there, else from the ramp."""
    sides = keypoint_sides(skeleton)
    colours = _along_ramps(sides)
    limbs = zip(skeleton.limbs, _limb_sides(skeleton), limb_colours(skeleton), strict=True)
    for limb, side, colour in limbs:
        for keypoint in limb:
            if sides[keypoint] == side:
                colours[keypoint] = colour
    return colours


def stroke(
    canvas: np.ndarray, start: np.ndarray, end: np.ndarray, colour: Colour, width: int
) -> None:
    """One antialiased line with round ends, sub-pixel coordinates."""
    cv2.line(canvas, _fixed(start), _fixed(end), colour, max(1, width), cv2.LINE_AA, _SHIFT)


def dashes(
    canvas: np.ndarray, start: np.ndarray, end: np.ndarray, colour: Colour, width: int, dash: float
) -> None:
    """A dashed antialiased line; ``dash`` is the length of a dash and of a gap, pixels."""
    length = float(np.linalg.norm(end - start))
    count = min(max(int(length / (2 * dash)), 1), 400)
    for number in range(count):
        first = start + (end - start) * (number / count)
        last = start + (end - start) * ((number + 0.55) / count)
        stroke(canvas, first, last, colour, width)


def dot(canvas: np.ndarray, centre: np.ndarray, radius: float, colour: Colour, width: int) -> None:
    """An antialiased disc (``width`` -1) or ring."""
    x, y = _fixed(centre)
    r = max(1, round(radius * (1 << _SHIFT)))
    cv2.circle(canvas, (x, y), r, colour, width, cv2.LINE_AA, _SHIFT)


def rectangle(canvas: np.ndarray, box_xywh: np.ndarray, colour: Colour, width: int) -> None:
    x, y, w, h = (float(value) for value in box_xywh)
    corners = (np.array([x, y]), np.array([x + w, y + h]))
    low, high = (_fixed(corner) for corner in corners)
    cv2.rectangle(canvas, low, high, colour, max(1, width), cv2.LINE_AA, _SHIFT)


def text_strip(text: str, width: int, height: int) -> np.ndarray:
    """One line of text in a (height, width, 3) strip, cut with dots where it is too long.

    OpenCV's fonts are ASCII only; other characters become "?".
    """
    factor = 2
    font, weight = cv2.FONT_HERSHEY_SIMPLEX, 2
    scale = height * factor / 52
    text = text.encode("ascii", "replace").decode()
    room = width * factor - height // 2

    def wide(line: str) -> int:
        return cv2.getTextSize(line, font, scale, weight)[0][0]

    if wide(text) > room:
        while text and wide(text + "...") > room:
            text = text[:-1]
        text += "..."
    strip = np.full((height * factor, width * factor, 3), SHEET, dtype=np.uint8)
    origin = (height // 4, round(height * factor * 0.68))
    cv2.putText(strip, text, origin, font, scale, TEXT, weight, cv2.LINE_AA)
    return cv2.resize(strip, (width, height), interpolation=cv2.INTER_AREA)


def _along_ramps(sides: Sequence[Side]) -> list[Colour]:
    colours: list[Colour] = []
    for position, side in enumerate(sides):
        share = sides[:position].count(side) / max(sides.count(side) - 1, 1)
        ramp = np.array(_RAMPS[side], dtype=np.float64)
        at = share * (len(ramp) - 1)
        low = min(int(at), len(ramp) - 2)
        mixed = ramp[low] + (ramp[low + 1] - ramp[low]) * (at - low)
        colours.append((round(mixed[0]), round(mixed[1]), round(mixed[2])))
    return colours


def _limb_sides(skeleton: Skeleton) -> list[Side]:
    sides = keypoint_sides(skeleton)
    limb_sides: list[Side] = []
    for start, end in skeleton.limbs:
        named: list[Side] = [side for side in (sides[start], sides[end]) if side != "middle"]
        limb_sides.append(named[0] if len(set(named)) == 1 else "middle")
    return limb_sides


def _fixed(point: np.ndarray) -> tuple[int, int]:
    one = 1 << _SHIFT
    return round(float(point[0]) * one), round(float(point[1]) * one)
