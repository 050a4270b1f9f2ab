"""What surrounds and clothes the synthetic figures: materials, backgrounds, covers, the lens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import cv2
import numpy as np

from posefabric.data.canvas import Coat, Light, Material
from posefabric.data.figure import Body, Part

_SKIN = np.array([[255, 224, 196], [236, 188, 150], [198, 140, 100], [141, 85, 54], [82, 50, 36]])
_HAIR = np.array([[20, 16, 14], [70, 45, 28], [120, 75, 40], [205, 165, 95], [150, 150, 150]])
_TILE = 32
_PATTERNS = ("plain", "rows", "columns", "checks", "dots", "noise")
_UP_TO = (0.42, 0.59, 0.70, 0.79, 0.88)  # cumulative shares of all patterns but the last


def draw_colour(rng: np.random.Generator) -> np.ndarray:
    """(3,) float32 in 0..255: grey, muted or vivid."""
    level = rng.uniform(20, 245)
    spread = (0.0, 40.0, 140.0)[int(rng.integers(3))]
    return np.clip(level + spread * rng.uniform(-1, 1, 3), 8, 250).astype(np.float32)


def draw_tile(rng: np.random.Generator) -> np.ndarray | None:
    """A periodic pattern (S, S, 3) float32 of factors around a second colour, or None: plain."""
    kind = _PATTERNS[int(np.searchsorted(_UP_TO, rng.random(), side="right"))]
    if kind == "plain":
        return None
    tile = np.ones((_TILE, _TILE, 3), np.float32)
    other = rng.uniform(0.15, 1.9, 3) if rng.random() < 0.5 else np.full(3, rng.uniform(0.2, 1.7))
    step = (4, 8, 16)[int(rng.integers(3))]
    band = np.arange(_TILE) % step < step * rng.uniform(0.25, 0.7)
    if kind == "rows":
        tile[band] = other
    elif kind == "columns":
        tile[:, band] = other
    elif kind == "checks":
        tile[band[:, None] ^ band[None]] = other
    elif kind == "dots":
        offset = np.arange(_TILE) % step - step / 2 + 0.5
        tile[offset[:, None] ** 2 + offset[None] ** 2 < (0.36 * step) ** 2] = other
    else:
        cells = rng.uniform(0.5, 1.5, (_TILE // step * 2,) * 2).astype(np.float32)
        tile *= np.kron(cells, np.ones((step // 2, step // 2), np.float32))[..., None]
    return tile


def draw_material(kind: str, rng: np.random.Generator) -> Material:
    """A material of a kind named by ``Body.materials``; raises KeyError for an unknown kind."""
    if kind == "cloth":
        tile = draw_tile(rng)
        return Material(draw_colour(rng), tile, rng.uniform(2.0, 5.0))
    if kind == "fur":
        colour = _blend(_HAIR, rng) if rng.random() < 0.7 else draw_colour(rng)
        tile = draw_tile(rng) if rng.random() < 0.5 else None
        return Material(colour, tile, rng.uniform(1.0, 3.0))
    return Material({"plain": draw_colour, "skin": _skin, "lips": _lips, "eye": _eye, "hair": _hair}
                    [kind](rng))  # fmt: skip


def _blend(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    place = rng.uniform(0, len(table) - 1)
    low = int(place)
    colour = table[low] + (place - low) * (table[low + 1] - table[low])
    return np.clip(colour * rng.uniform(0.9, 1.1, 3), 5, 255).astype(np.float32)


def _skin(rng: np.random.Generator) -> np.ndarray:
    return _blend(_SKIN, rng)


def _hair(rng: np.random.Generator) -> np.ndarray:
    return _blend(_HAIR, rng) if rng.random() < 0.9 else draw_colour(rng)


def _lips(rng: np.random.Generator) -> np.ndarray:
    return np.array([rng.uniform(90, 200), 50, 55], np.float32)


def _eye(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(5, 60, 3).astype(np.float32)


def draw_coats(body: Body, parts: tuple[Part, ...], rng: np.random.Generator) -> list[Coat]:
    """What every part of one individual wears.

    One outfit in seven has sides of different materials; which side has which is random, so a
    colour never tells left from right.
    """
    worn = {name: draw_material(kind, rng) for name, kind in body.materials.items()}
    limits = {role: rng.uniform(*cover.limit) for role, cover in body.covers.items()}
    odd = {}
    if rng.random() < 0.15:
        kinds: Mapping[str, str] = body.materials
        odd = {n: draw_material(k, rng) for n, k in kinds.items() if k in ("cloth", "plain")}
    odd_side = "left_" if rng.random() < 0.5 else "right_"
    coats = []
    for part in parts:
        wardrobe = worn | odd if part.name.startswith(odd_side) else worn
        cover = body.covers[part.role]
        start, end = part.span
        limit = (limits[part.role] - start) / (end - start)
        coats.append(Coat(wardrobe[cover.inside], wardrobe[cover.outside], limit))
    return coats


def draw_light(rng: np.random.Generator) -> Light:
    direction = rng.normal((0, 0.5, 1.2))
    x, y, z = (direction / np.linalg.norm(direction)).tolist()
    ambient = rng.uniform(0.4, 0.75)
    return Light((x, y, max(z, 0.0)), ambient, rng.uniform(0.9, 1.15) - ambient)


def draw_background(picture_wh: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32: a gradient, coarse blobs or blocks, under lines, shapes and bars."""
    width, height = picture_wh
    cells = int(rng.choice((2, 3, 5, 9, 16)))
    coarse = np.stack([draw_colour(rng) for _ in range(4)])
    coarse += rng.uniform(0, 0.9) * (coarse.mean(0) - coarse)
    grid = coarse[rng.integers(0, 4, (cells, cells))] if cells > 3 else coarse[
        np.arange(cells * cells).reshape(cells, cells) % 4
    ]  # fmt: skip
    mode = cv2.INTER_NEAREST if rng.random() < 0.2 else cv2.INTER_LINEAR
    picture = cv2.resize(np.ascontiguousarray(grid), (width, height), interpolation=mode)
    if rng.random() < 0.5:
        grain = _noise_window(height, width, rng)
        if rng.random() < 0.6:
            step = int(rng.integers(2, 9))
            small = np.ascontiguousarray(grain[: height // step + 1, : width // step + 1])
            grain = cv2.resize(small, (width, height))
        picture += rng.uniform(4, 30) * grain
    size = float(max(width, height))
    for _ in range(int(rng.integers(0, 26))):
        _draw_clutter(picture, size, rng)
    return picture


def _draw_clutter(picture: np.ndarray, size: float, rng: np.random.Generator) -> None:
    height, width = picture.shape[:2]
    kind = rng.random()
    # Bars in skin tones and cloth colours look like limbs until the whole body is seen.
    colour = (_skin(rng) if rng.random() < 0.3 else draw_colour(rng)).tolist()
    x, y = int(rng.uniform(0, width)), int(rng.uniform(0, height))
    reach = size * rng.uniform(0.08, 0.5)
    angle = rng.uniform(0, 2 * np.pi)
    end = (int(x + reach * np.cos(angle)), int(y + reach * np.sin(angle)))
    if kind < 0.25:
        cv2.line(picture, (x, y), end, colour, int(rng.integers(1, 4)), cv2.LINE_AA)
    elif kind < 0.55:
        thick = max(1, int(size * rng.uniform(0.02, 0.08)))
        cv2.line(picture, (x, y), end, colour, thick, cv2.LINE_AA)
    elif kind < 0.8:
        fan = angle + np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        radii = reach * rng.uniform(0.2, 0.7, len(fan))
        shape = np.stack([x + radii * np.cos(fan), y + radii * np.sin(fan)], 1).astype(np.int32)
        cv2.fillPoly(picture, [shape], colour, cv2.LINE_AA)
    else:
        axes = (max(1, int(reach * 0.4)), max(1, int(reach * rng.uniform(0.1, 0.4))))
        cv2.ellipse(picture, (x, y), axes, np.degrees(angle), 0, 360, colour, -1, cv2.LINE_AA)


def draw_cover(
    picture_wh: tuple[int, int], box_xyxy: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(H, W) uint8 mask of a bar, ellipse or polygon somewhere over a figure's box."""
    width, height = picture_wh
    mask = np.zeros((height, width), np.uint8)
    size = float(np.max(box_xyxy[2:] - box_xyxy[:2]))
    x, y = rng.uniform(box_xyxy[:2], box_xyxy[2:]).tolist()
    angle = rng.uniform(0, np.pi)
    reach = size * rng.uniform(0.08, 0.25)
    kind = rng.random()
    if kind < 0.4:
        reach *= 2.5
        dx, dy = reach * np.cos(angle), reach * np.sin(angle)
        thick = max(2, int(size * rng.uniform(0.03, 0.1)))
        ends = (int(x - dx), int(y - dy)), (int(x + dx), int(y + dy))
        cv2.line(mask, *ends, 255, thick, cv2.LINE_AA)
    elif kind < 0.7:
        axes = (max(2, int(reach)), max(2, int(reach * rng.uniform(0.4, 1.0))))
        cv2.ellipse(mask, (int(x), int(y)), axes, np.degrees(angle), 0, 360, 255, -1, cv2.LINE_AA)
    else:
        fan = angle + np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        radii = reach * rng.uniform(0.7, 1.3, len(fan))
        shape = np.stack([x + radii * np.cos(fan), y + radii * np.sin(fan)], 1).astype(np.int32)
        cv2.fillPoly(mask, [shape], 255, cv2.LINE_AA)
    return mask


def paint_cover(shape_hw: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(3,) or (H, W, 3) float32: the look of one cover."""
    colour = draw_colour(rng)
    tile = draw_tile(rng)
    if tile is None:
        return colour
    height, width = shape_hw
    whole = np.tile(np.minimum(colour * tile, 255), (height // _TILE + 1, width // _TILE + 1, 1))
    return whole[:height, :width]


def develop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lens and sensor: blur, uneven light, exposure, grain -> (H, W, 3) uint8.

    Some blur is always there, because a sharp outline would tell painted from photographed.
    """
    height, width = picture.shape[:2]
    blur = rng.uniform(0.35, 0.6) if rng.random() < 0.7 else rng.uniform(0.6, 1.4)
    picture = cv2.GaussianBlur(picture, (0, 0), blur)
    if rng.random() < 0.4:
        corners = rng.uniform(0.6, 1.3, (2, 2)).astype(np.float32)
        picture *= cv2.resize(corners, (width, height))[..., None]
    gain = rng.uniform(0.75, 1.2) * rng.uniform(0.93, 1.07, 3)
    picture *= gain.astype(np.float32)
    picture += np.float32(rng.uniform(-20, 20))
    if rng.random() < 0.6:
        picture += np.float32(rng.uniform(1, 12)) * _noise_window(height, width, rng)
    return cv2.convertScaleAbs(np.maximum(picture, 0))


@lru_cache(maxsize=4)
def _noise(side: int) -> np.ndarray:
    # Drawn once with a fixed seed: a window of it costs far less than fresh normal numbers.
    return np.random.default_rng(0).standard_normal((side, side, 3), np.float32)


def _noise_window(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    side = 1 << int(np.ceil(np.log2(max(height, width) + 64)))
    x, y = rng.integers(0, side - width + 1), rng.integers(0, side - height + 1)
    return _noise(side)[y : y + height, x : x + width]
