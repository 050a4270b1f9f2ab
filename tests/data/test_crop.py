"""The box's way to the input, against OpenCV and hand-made numbers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import pytest

from posefabric.data.crop import (
    PRESETS,
    CropGeometry,
    compose_affine,
    crop_person,
    invert_affine,
    transform_points,
)
from posefabric.structures import DataError, PosefabricError

BOXES = [(30.0, 40.0, 50.0, 120.0), (10.5, -7.25, 200.0, 33.0), (0.0, 0.0, 96.0, 128.0)]


def region_by_hand(box: tuple[float, ...], aspect: float) -> tuple[float, float, float, float]:
    x, y, w, h = box
    if w > aspect * h:
        h = w / aspect
    else:
        w = h * aspect
    return x + box[2] / 2, y + box[3] / 2, 1.25 * w, 1.25 * h


@pytest.mark.parametrize("preset", ["hrnet", "posenfs"])
@pytest.mark.parametrize("box", BOXES)
def test_biased_presets_equal_the_affine_from_three_points(preset, box) -> None:
    width, height = 192, 256
    cx, cy, w, _ = region_by_hand(box, width / height)
    source = np.array([[cx, cy], [cx, cy - w / 2], [cx - w / 2, cy - w / 2]], dtype=np.float32)
    goal = np.array([[96, 128], [96, 128 - 96], [0, 128 - 96]], dtype=np.float32)
    expected = cv2.getAffineTransform(source, goal)
    found = CropGeometry((width, height), preset).image_to_input(np.array(box))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-4)
    assert found.dtype == np.float32


@pytest.mark.parametrize("box", BOXES)
def test_udp_maps_the_region_s_corners_to_the_corner_pixels(box) -> None:
    cx, cy, w, h = region_by_hand(box, 192 / 256)
    corners = np.array([[cx - w / 2, cy - h / 2], [cx + w / 2, cy + h / 2]])
    matrix = CropGeometry((192, 256), "udp").image_to_input(np.array(box))
    np.testing.assert_allclose(transform_points(matrix, corners), [[0, 0], [191, 255]], atol=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("margin", [1.0, 1.5, 1.37])
def test_crop_is_the_input_with_a_whole_border(preset, margin) -> None:
    geometry = CropGeometry((128, 160), preset, margin=margin)
    box = np.array(BOXES[0], dtype=np.float32)
    both = compose_affine(geometry.crop_to_input, geometry.image_to_crop(box))
    np.testing.assert_allclose(both, geometry.image_to_input(box), atol=1e-4)
    shift = geometry.crop_to_input
    np.testing.assert_array_equal(shift[:, :2], np.eye(2))
    np.testing.assert_array_equal(shift[:, 2] * 2, np.subtract((128, 160), geometry.crop_wh))
    assert np.abs(np.array(geometry.crop_wh) - np.array((128, 160)) * margin).max() <= 1
    if margin == 1:
        assert geometry.crop_wh == (128, 160)


def test_middle_of_a_training_crop_is_the_evaluation_crop() -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (200, 220, 3), dtype=np.uint8), (0, 0), 2)
    box = np.array([50.0, 40.0, 60.0, 70.0])
    plain, _ = crop_person(image, box, CropGeometry((64, 64), "hrnet"))
    wide, _ = crop_person(image, box, CropGeometry((64, 64), "hrnet", margin=1.5))
    assert wide.shape == (96, 96, 3)
    assert np.abs(wide[16:80, 16:80].astype(int) - plain).max() <= 1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_dot_lands_where_the_transform_says(preset) -> None:
    image = np.zeros((120, 160, 3), dtype=np.uint8)
    image[61, 83] = 255
    geometry = CropGeometry((96, 96), preset, margin=1.25)
    crop, matrix = crop_person(image, np.array([70.0, 50.0, 21.0, 17.0]), geometry)
    weight = crop[..., 0].astype(float)
    y, x = np.mgrid[: crop.shape[0], : crop.shape[1]]
    centroid = np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()
    np.testing.assert_allclose(
        centroid, transform_points(matrix, np.array([[83.0, 61.0]]))[0], atol=0.05
    )


def test_outside_of_the_picture_is_black() -> None:
    image = np.full((40, 40, 3), 200, dtype=np.uint8)
    crop, matrix = crop_person(
        image, np.array([20.0, 20.0, 40.0, 40.0]), CropGeometry((64, 64), "hrnet")
    )
    edge = transform_points(matrix, np.array([[39.0, 39.0]]))[0]
    assert (crop[:30, :30] == 200).sum() > 0
    assert not crop[:, int(edge[0]) + 4 :].any()
    assert not crop[int(edge[1]) + 4 :].any()


def test_affine_helpers_agree_with_matrices_and_opencv() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 5, 2, 3))
    last = np.tile([[[0.0, 0.0, 1.0]]], (5, 1, 1))
    full = [np.concatenate([m, last], axis=1) for m in (first, second)]
    np.testing.assert_allclose(invert_affine(first), np.linalg.inv(full[0])[:, :2], atol=1e-9)
    np.testing.assert_allclose(compose_affine(second, first), (full[1] @ full[0])[:, :2])
    points = rng.normal(size=(5, 7, 2))
    expected = np.stack([cv2.transform(p[None], m)[0] for p, m in zip(points, first, strict=True)])
    np.testing.assert_allclose(transform_points(first, points), expected)


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5), (0, 0, 5, -1), (np.nan, 0, 5, 5), (0, 0, np.inf, 5), (0, 0, 5)]
)
def test_a_box_without_area_is_refused(box) -> None:
    with pytest.raises(DataError, match="expected four finite numbers"):
        CropGeometry((64, 64), "hrnet").image_to_input(np.array(box, dtype=float))


def test_wrong_pictures_and_options_are_refused() -> None:
    geometry = CropGeometry((64, 64), "udp")
    box = np.array([0.0, 0.0, 5.0, 5.0])
    for image in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(DataError, match="expected"):
            crop_person(image, box, geometry)
    preset: Any = "coco"
    with pytest.raises(PosefabricError, match="preset: expected one of hrnet, udp"):
        CropGeometry((64, 64), preset)
    with pytest.raises(PosefabricError, match="margin"):
        CropGeometry((64, 64), "udp", margin=0.9)


def test_cropping_needs_no_torch() -> None:
    code = "import sys, posefabric.data.crop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
