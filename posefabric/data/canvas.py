"""A picture with depth: solids painted by nearness, and who owns each pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from posefabric.data.figure import Solids

BACKGROUND = 0
FOREIGN = 255
_SMALLEST_RADIUS = 0.75  # pixels; the pixel nearest to a part's middle is then always its own


@dataclass(frozen=True)
class Material:
    """A colour (3,) float32 in 0..255, and a periodic tile (S, S, 3) float32 of factors.

    ``pitch`` is the tile's repetitions a body height.
    """

    colour: np.ndarray
    tile: np.ndarray | None = None
    pitch: float = 1.0


@dataclass(frozen=True)
class Coat:
    """What a part wears: one material below a fraction of its length, another above."""

    below: Material
    above: Material
    limit: float


@dataclass(frozen=True)
class Light:
    """A directional light: unit direction (3,) towards it and the two strengths."""

    direction: tuple[float, float, float] = (0.0, 0.0, 1.0)
    ambient: float = 0.55
    diffuse: float = 0.5


class Canvas:
    """Owner and nearness of every pixel, and the picture unless only those are wanted.

    ``owner`` (H, W) uint8: 0 background, n + 1 the figure's part n, 255 anything foreign;
    ``nearness`` (H, W) float32 pixels; ``picture`` (H, W, 3) float32 RGB in 0..255, or None.
    """

    def __init__(self, picture_wh: tuple[int, int], picture: np.ndarray | None) -> None:
        width, height = picture_wh
        self.owner = np.zeros((height, width), np.uint8)
        self.nearness = np.full((height, width), -np.inf, np.float32)
        self.picture = picture

    def forget(self) -> None:
        """What is painted so far becomes background, behind everything to come."""
        self.owner[:] = BACKGROUND
        self.nearness[:] = -np.inf

    def paint(
        self, figure: Solids, scale: float, coats: list[Coat] | None, light: Light, *, foreign=False
    ) -> None:
        """Paint a figure from far to near; ``scale`` is its pixels a body height."""
        order = np.argsort(figure.ends[:, :, 2].mean(1) + figure.radii.mean(1))
        for row in order:
            self._paint_part(
                figure,
                int(row),
                FOREIGN if foreign else int(row) + 1,
                None if coats is None else coats[row],
                light,
                scale,
            )

    def cover(self, alpha: np.ndarray, colour: np.ndarray) -> None:
        """Put something in front of everything: ``alpha`` (H, W) uint8, ``colour`` (3,) or
        (H, W, 3)."""
        self.owner[alpha > 127] = FOREIGN
        if self.picture is None:
            return
        where = np.flatnonzero(alpha)
        pixels = self.picture.reshape(-1, 3)
        new = colour if colour.ndim == 1 else colour.reshape(-1, 3).take(where, 0)
        share = (alpha.take(where) * np.float32(1 / 255))[:, None]
        old = pixels.take(where, 0)
        pixels[where] = old + share * (new - old)

    def _paint_part(
        self, figure: Solids, row: int, ident: int, coat: Coat | None, light: Light, scale: float
    ) -> None:
        height, width = self.owner.shape
        (ax, ay, az), (bx, by, bz) = figure.ends[row].tolist()
        ra, rb = (max(r, _SMALLEST_RADIUS) for r in figure.radii[row].tolist())
        (px, py, pz), (qx, qy, qz) = figure.halves[row].tolist()
        grow = max(ra, rb) + 1.0
        hx, hy = grow + max(abs(px), abs(qx)), grow + max(abs(py), abs(qy))
        x0, x1 = int(max(min(ax, bx) - hx, 0)), int(min(max(ax, bx) + hx + 1, width))
        y0, y1 = int(max(min(ay, by) - hy, 0)), int(min(max(ay, by) + hy + 1, height))
        if x0 >= x1 or y0 >= y1:
            return
        xs = np.arange(x0, x1, dtype=np.float32) - ax
        ys = (np.arange(y0, y1, dtype=np.float32) - ay)[:, None]
        bone = (bx - ax, by - ay, bz - az)
        if any(figure.parts[row].width):
            half = ((px + qx) / 2, (py + qy) / 2, (pz + qz) / 2)
            wide = math.hypot(px, py, pz), math.hypot(qx, qy, qz)
            axis = _direction(half)
            across, surface = _slab(xs, ys, bone, half, wide, (ra, rb))
        else:
            axis = _direction(bone)
            across, surface = _capsule(xs, ys, bone, (ra, rb))
        along, off, radius, distance, rise, near = surface
        near += az
        solid = radius - distance
        solid += 0.5
        window = self.nearness[y0:y1, x0:x1]
        seen = np.flatnonzero((solid > 0) & (near > window))
        if not len(seen):
            return
        solid = solid.take(seen)
        rows, columns = np.divmod(seen, x1 - x0)
        flat = (rows + y0) * width + (columns + x0)
        if self.picture is not None and coat is not None:
            rise, off, radius = rise.take(seen), off.take(seen), radius.take(seen)
            lit = _lit(rise, off, radius, distance.take(seen), axis, light)
            stretch = float(figure.lengths[row]) / scale
            colour = _colour(coat, along.take(seen), across.take(seen) / scale, stretch)
            colour = colour * lit[:, None]
            pixels = self.picture.reshape(-1, 3)
            old = pixels.take(flat, 0)
            colour -= old
            colour *= np.minimum(solid, 1.0)[:, None]
            pixels[flat] = old + colour
        owned = solid > 0.5
        flat = flat[owned]
        self.nearness.reshape(-1)[flat] = near.take(seen)[owned]
        self.owner.reshape(-1)[flat] = ident


def _direction(vector: tuple[float, float, float]) -> tuple[float, float]:
    """The unit direction in the picture; any one where the vector points at the viewer."""
    size = math.hypot(vector[0], vector[1])
    return (vector[0] / size, vector[1] / size) if size > 1e-3 else (0.0, 1.0)


def _capsule(xs, ys, bone, radii):
    """A round part: pixels -> pattern coordinate across, and its frontmost surface.

    The surface is (position 0..1 on the bone, offset from the axis across the bone, radius there,
    distance to the axis, offset along the bone, nearness above a), each (h, w).
    """
    dx, dy = _direction(bone)
    ra, rb = radii
    flat = math.hypot(bone[0], bone[1])
    s = xs * dx + ys * dy
    off = ys * dx - xs * dy
    square = off * off
    t = _frontmost(s, square, flat, bone[2], ra, rb - ra)
    radius = ra + (rb - ra) * t
    rise = s - t * flat
    distance = np.sqrt(square + rise * rise)
    near = t * bone[2] + np.sqrt(np.maximum(radius * radius - distance * distance, 0))
    return off, (t, off, radius, distance, rise, near)


def _slab(xs, ys, bone, half, wides, radii):
    """As :func:`_capsule` for a part of half-width vector ``half``, along which its patterns run
    across and its offset counts as rise."""
    ux, uy, uz = bone
    vx, vy, vz = half
    ra, rb = radii
    # Pixels fall on the front face, which lies a radius before the middle plane.
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    shift = math.copysign(0.5 * (ra + rb), nz) / max(math.hypot(nx, ny, nz), 1e-6)
    fx, fy = xs - shift * nx, ys - shift * ny
    uu, uv, vv = ux * ux + uy * uy + 1.0, ux * vx + uy * vy, vx * vx + vy * vy + 1.0
    det = uu * vv - uv * uv
    t = fx * ((vv * ux - uv * vx) / det) + fy * ((vv * uy - uv * vy) / det)
    t = np.minimum(np.maximum(t, 0), 1)
    dx, dy = _direction(half)
    flat = math.hypot(vx, vy)
    whole = math.hypot(flat, vz)
    start, gain = wides[0] / whole, (wides[1] - wides[0]) / whole
    m = _frontmost_across(xs - t * ux, ys - t * uy, half, start + gain * t, ra + (rb - ra) * t)
    # For this m the part is a round one along a bone of its own.
    gx, gy, gz = ux + m * (gain * vx), uy + m * (gain * vy), uz + m * (gain * vz)
    length = np.sqrt(gx * gx + gy * gy) + np.float32(1e-3)
    ex, ey = xs - m * (start * vx), ys - m * (start * vy)
    s = (ex * gx + ey * gy) / length
    square = ((ey * gx - ex * gy) / length) ** 2
    t = _frontmost(s, square, length, gz, ra, rb - ra)
    radius = ra + (rb - ra) * t
    ex, ey = xs - t * ux, ys - t * uy
    size = start + gain * t
    m = _frontmost_across(ex, ey, half, size, radius)
    across = ex * dx + ey * dy
    off = ey * dx - ex * dy
    rise = across - m * size * flat
    distance = np.sqrt(off * off + rise * rise)
    near = t * uz + m * size * vz
    near += np.sqrt(np.maximum(radius * radius - distance * distance, 0))
    return across, (t, off, radius, distance, rise, near)


def _frontmost(s, square, flat, depth, ra, taper):
    """Where on a tapered bone the sphere sits whose surface is nearest to the viewer.

    Sphere t has its middle at (t flat, t depth) and radius ra + t taper; a pixel lies s along the
    bone and, squared, ``square`` off it. Its nearness t depth + sqrt(q(t)) with a quadratic q has
    one maximum, clipped to 0..1. A bone that points at the viewer has it at one of its ends.
    """
    bend = flat * flat - taper * taper
    if np.min(bend) < 1e-3:
        first = ra * ra - square - s * s
        last = (ra + taper) ** 2 - square - (s - flat) ** 2
        ahead = depth + np.sqrt(np.maximum(last, 0)) - np.sqrt(np.maximum(first, 0)) > 0
        return np.where((last > 0) & (ahead | (first <= 0)), np.float32(1), np.float32(0))
    slope = ra * taper + s * flat
    top = slope / bend
    rest = np.maximum(ra * ra - square - s * s + slope * top, 0)
    t = top + depth * np.sqrt(rest / (bend * (bend + depth * depth)))
    return np.minimum(np.maximum(t, 0), 1)


def _frontmost_across(ex, ey, half, size, radius):
    """The same across a slab: the part -1..1 of its half width, ``size`` times ``half``."""
    dx, dy = _direction(half)
    flat = math.hypot(half[0], half[1])
    slant = half[2] / max(math.hypot(flat, half[2]), 1e-6)
    off = ey * dx - ex * dy
    front = np.sqrt(np.maximum(radius * radius - off * off, 0))
    reach = np.maximum(size * flat, 1e-3)
    return np.minimum(np.maximum((ex * dx + ey * dy + front * slant) / reach, -1), 1)


def _lit(rise, off, radius, distance, axis, light: Light) -> np.ndarray:
    """The light's factor (n,) on a round surface; ``axis`` is the direction of ``rise``."""
    inverse = 1.0 / radius
    n_along, n_across = rise * inverse, off * inverse
    n_front = np.sqrt(np.maximum(1.0 - (distance * inverse) ** 2, 0))
    lx, ly, lz = light.direction
    l_along = lx * axis[0] - ly * axis[1]
    l_across = -lx * axis[1] - ly * axis[0]
    facing = n_along * l_along + n_across * l_across + n_front * lz
    return light.ambient + light.diffuse * np.maximum(facing, 0)


def _colour(coat: Coat, along, across, stretch: float) -> np.ndarray:
    """(3,) or (n, 3) of what is worn at these surface coordinates, in body heights."""
    if coat.limit >= 1:
        return _material(coat.below, along, across, stretch)
    if coat.limit <= 0:
        return _material(coat.above, along, across, stretch)
    below = _material(coat.below, along, across, stretch)
    above = _material(coat.above, along, across, stretch)
    return np.where((along < coat.limit)[:, None], below, above)


def _material(material: Material, along, across, stretch: float) -> np.ndarray:
    if material.tile is None:
        return material.colour
    size = len(material.tile)
    pitch = material.pitch * size
    rows = (along * (stretch * pitch)).astype(np.int64) % size
    columns = np.floor(across * pitch).astype(np.int64) % size
    return material.colour * material.tile.reshape(-1, 3).take(rows * size + columns, 0)
