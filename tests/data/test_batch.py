"""Augmented batches: pixels and keypoints stay together, and only the generator decides."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from posefabric.config import AugmentConfig
from posefabric.data.augment import augment_transforms, draw, erase_rectangle, jitter_colour
from posefabric.data.batch import Normalisation, prepare_batch, warp_crops
from posefabric.data.codec import Codec
from posefabric.data.crop import PRESETS, CropGeometry, crop_person, transform_points
from posefabric.structures import CropBatch, PosefabricError

RAW = Normalisation(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
STILL = AugmentConfig(scale=0, rotation=0, rotation_probability=0, flip=0, colour=0)
# Ten keypoints: five pairs, the first three pairs the upper body.
SKELETON: Any = SimpleNamespace(
    flip_index=np.array([1, 0, 3, 2, 5, 4, 7, 6, 9, 8]), upper_body=(0, 1, 2, 3, 4, 5)
)


def blob_image(point: np.ndarray, size: int = 200, sigma: float = 2.5) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    bell = np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * sigma**2))
    return np.repeat((240 * bell).round().astype(np.uint8)[..., None], 3, axis=2)


def make_batch(geometry: CropGeometry, count: int = 6, size: int = 200) -> CropBatch:
    """One blob a person, on keypoint ``row % 10``; the other keypoints are scattered."""
    rng = np.random.default_rng(11)
    keypoints = rng.uniform(70, 130, (count, 10, 2)).astype(np.float32)
    crops, matrices = [], []
    for row in range(count):
        image = blob_image(keypoints[row, row % 10], size)
        crop, matrix = crop_person(image, np.array([60.0, 55.0, 80.0, 90.0]), geometry)
        crops.append(crop)
        matrices.append(matrix)
    return CropBatch(
        crops=torch.from_numpy(np.stack(crops)),
        image_to_crop=torch.from_numpy(np.stack(matrices)),
        keypoints=torch.from_numpy(keypoints),
        visibility=torch.full((count, 10), 2, dtype=torch.uint8),
        index=torch.arange(count) + 100,
        unreadable=torch.zeros(count, dtype=torch.bool),
    )


def prepare(batch: CropBatch, geometry: CropGeometry, **options: Any):
    width, height = geometry.input_wh
    arguments: dict[str, Any] = {
        "geometry": geometry,
        "codec": Codec(geometry.preset, geometry.input_wh, (width // 4, height // 4), 1.5),
        "normalisation": RAW,
        "skeleton": SKELETON,
        "augment": None,
        "generator": None,
        "device": "cpu",
    }
    return prepare_batch(batch, **{**arguments, **options})


def centroid(image: torch.Tensor) -> np.ndarray:
    weight = image.mean(dim=0).double().numpy()
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("margin", [1.0, 1.5])
def test_without_augmentation_the_images_are_the_crops(preset, margin) -> None:
    geometry = CropGeometry((96, 128), preset, margin=margin)
    batch = make_batch(geometry)
    batch.crops = torch.randint(0, 256, batch.crops.shape, dtype=torch.uint8)
    found = prepare(batch, geometry)
    left, top = geometry.border_wh
    middle = batch.crops[:, top : top + 128, left : left + 96].permute(0, 3, 1, 2).float()
    assert torch.equal(found.images, middle)
    assert found.images.is_contiguous(memory_format=torch.channels_last)
    assert found.heatmaps.shape == (6, 10, 32, 24)
    assert found.index.tolist() == list(range(100, 106))
    box = np.array([60.0, 55.0, 80.0, 90.0])
    forth = geometry.image_to_input(box)
    points = np.array([[70.0, 80.0], [120.0, 90.0]])
    back = transform_points(found.input_to_image[0].numpy(), transform_points(forth, points))
    np.testing.assert_allclose(back, points, atol=1e-3)


def test_normalisation_follows_its_formula() -> None:
    geometry = CropGeometry((64, 64), "hrnet")
    batch = make_batch(geometry)
    normalisation = Normalisation()
    found = prepare(batch, geometry, normalisation=normalisation).images
    pixels = batch.crops.numpy().transpose(0, 3, 1, 2) / 255.0
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (normalisation.mean, normalisation.std))
    np.testing.assert_allclose(found.numpy(), (pixels - mean) / std, atol=1e-5)
    pixels = 255 * torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    bgr = Normalisation(channel_order="bgr")
    # The constants stay in their places: red's are applied to blue.
    assert torch.equal(bgr.apply(pixels), normalisation.apply(pixels.flip(1)))
    with pytest.raises(PosefabricError, match="normalisation"):
        Normalisation(std=(1.0, 0.0, 1.0))


@pytest.mark.parametrize("preset", PRESETS)
def test_blobs_stay_on_their_keypoints_under_every_augmentation(preset) -> None:
    geometry = CropGeometry((96, 128), preset, margin=1.5)
    batch = make_batch(geometry, count=30)
    # Without colour: contrast would light the ground and draw the centroid away.
    options = {"rotation_probability": 0.8, "half_body": 0.5, "translate": 0.1, "colour": 0.0}
    augment = AugmentConfig(scale=0.3, rotation=45, flip=0.5, **options)
    generator = torch.Generator().manual_seed(4)
    found = prepare(batch, geometry, augment=augment, generator=generator)
    back = found.input_to_image.numpy()
    mirrored = np.linalg.det(back[:, :, :2]) < 0
    assert 5 < mirrored.sum() < 25
    checked = 0
    for row in range(30):
        key = row % 10
        place = np.linalg.inv(np.vstack([back[row], [0, 0, 1]]).astype(np.float64))[:2]
        goal = transform_points(place, batch.keypoints[row, key].numpy()[None].astype(np.float64))[
            0
        ]
        if (goal < 16).any() or (goal > np.array([79, 111])).any():
            continue
        checked += 1
        np.testing.assert_allclose(centroid(found.images[row]), goal, atol=0.2)
        # The heatmap of the keypoint (its partner when mirrored) peaks there.
        channel = SKELETON.flip_index[key] if mirrored[row] else key
        stride = np.array([95 / 23, 127 / 31]) if preset == "udp" else 4.0
        peak = np.unravel_index(int(found.heatmaps[row, channel].argmax()), (32, 24))[::-1]
        assert np.abs(np.array(peak) - goal / stride).max() <= 0.5 + 1e-3
        assert found.weights[row, channel] == 1
    assert checked > 15


def test_warp_agrees_with_opencv() -> None:
    rng = np.random.default_rng(2)
    noise = rng.integers(0, 256, (4, 90, 120, 3), dtype=np.uint8)
    crops = np.stack([cv2.GaussianBlur(one, (0, 0), 2.5) for one in noise])
    matrices = np.tile(np.eye(2, 3), (4, 1, 1)) + rng.normal(0, 0.15, (4, 2, 3))
    matrices[:, :, 2] += rng.uniform(-20, 20, (4, 2))
    found = warp_crops(torch.from_numpy(crops), torch.from_numpy(matrices), (80, 64))
    for one, crop, matrix in zip(found, crops, matrices, strict=True):
        # OpenCV rounds sample places of uint8 pictures to 1/32 pixel.
        expected = cv2.warpAffine(crop, matrix, (80, 64)).transpose(2, 0, 1)
        difference = np.abs(one.numpy() - expected)
        assert difference.mean() < 0.5
        assert np.quantile(difference, 0.99) < 3
        assert (expected == 0).any()


@pytest.mark.parametrize("preset", PRESETS)
def test_flip_mirrors_pixels_and_swaps_sides(preset) -> None:
    geometry = CropGeometry((96, 128), preset)
    batch = make_batch(geometry)
    batch.visibility[:, 0] = 0
    augment = STILL.model_copy(update={"flip": 1.0})
    plain = prepare(batch, geometry)
    found = prepare(batch, geometry, augment=augment, generator=torch.Generator())
    torch.testing.assert_close(found.images, plain.images.flip(-1), atol=2e-2, rtol=0)
    torch.testing.assert_close(found.weights[:, SKELETON.flip_index], plain.weights)
    assert not found.weights[:, 1].any()
    if preset == "udp":  # only unbiased cells mirror onto cells
        mirrored = plain.heatmaps.flip(-1)[:, SKELETON.flip_index]
        torch.testing.assert_close(found.heatmaps, mirrored, atol=1e-4, rtol=0)


def test_flip_without_pairs_still_mirrors() -> None:
    geometry = CropGeometry((96, 128), "udp")
    batch = make_batch(geometry)
    lone: Any = SimpleNamespace(flip_index=np.arange(10), upper_body=())
    options = {"augment": STILL.model_copy(update={"flip": 1.0}), "skeleton": lone}
    found = prepare(batch, geometry, generator=torch.Generator(), **options)
    plain = prepare(batch, geometry)
    torch.testing.assert_close(found.images, plain.images.flip(-1), atol=2e-2, rtol=0)
    torch.testing.assert_close(found.heatmaps, plain.heatmaps.flip(-1), atol=1e-4, rtol=0)


def test_augmentation_of_nothing_is_the_plain_batch() -> None:
    geometry = CropGeometry((96, 128), "hrnet", margin=1.5)
    batch = make_batch(geometry)
    found = prepare(batch, geometry, augment=STILL, generator=torch.Generator())
    plain = prepare(batch, geometry)
    torch.testing.assert_close(found.images, plain.images, atol=2e-2, rtol=0)
    torch.testing.assert_close(found.heatmaps, plain.heatmaps)
    torch.testing.assert_close(found.input_to_image, plain.input_to_image)


def test_only_the_generator_decides_and_it_moves_alike() -> None:
    geometry = CropGeometry((64, 64), "hrnet", margin=1.5)
    batch = make_batch(geometry)
    generators = [torch.Generator().manual_seed(9) for _ in range(3)]
    torch.manual_seed(1)
    first = prepare(batch, geometry, augment=AugmentConfig(), generator=generators[0])
    torch.manual_seed(2)
    second = prepare(batch, geometry, augment=AugmentConfig(), generator=generators[1])
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.heatmaps, second.heatmaps)
    unseen = replace(batch, visibility=torch.zeros_like(batch.visibility))
    options = AugmentConfig(half_body=1, translate=0.2)
    prepare(unseen, geometry, augment=options, generator=generators[2])
    assert torch.equal(generators[0].get_state(), generators[2].get_state())
    later = prepare(batch, geometry, augment=AugmentConfig(), generator=generators[0])
    assert not torch.equal(first.images, later.images)


def test_zoom_and_rotation_keep_to_their_ranges() -> None:
    geometry = CropGeometry((64, 64), "hrnet")
    draws = draw(4000, torch.Generator().manual_seed(0))
    config = AugmentConfig(scale=0.3, rotation=30, rotation_probability=0.6, flip=0.5)
    zeros = torch.zeros(4000, 10, 2)
    matrix, flip = augment_transforms(
        draws, zeros, zeros[..., 0], config=config, geometry=geometry, skeleton=SKELETON
    )
    region = matrix[:, :, :2].det().abs().rsqrt().numpy()
    assert region.min() == pytest.approx(0.7)
    assert region.max() == pytest.approx(1.3)
    upright = torch.where(flip[:, None], -matrix[:, 0, :2], matrix[:, 0, :2])
    degrees = torch.rad2deg(torch.atan2(-upright[:, 1], upright[:, 0])).abs().numpy()
    assert degrees.max() == pytest.approx(60)
    assert (degrees > 1e-6).mean() == pytest.approx(0.6, abs=0.03)
    assert flip.double().mean() == pytest.approx(0.5, abs=0.03)
    # The region's centre stays, but for the mirror about the middle pixel.
    centre = (matrix @ torch.tensor([32.0, 32.0, 1.0]).double()).numpy()
    np.testing.assert_allclose(centre[:, 0], np.where(flip, 31, 32))
    np.testing.assert_allclose(centre[:, 1], 32)


def test_half_body_brings_one_half_to_the_middle() -> None:
    geometry = CropGeometry((96, 128), "udp")
    keypoints = torch.rand(40, 10, 2, generator=torch.Generator().manual_seed(3)) * 60 + 20
    visibility = torch.full((40, 10), 2)
    visibility[0, 7:] = 0  # 7 keypoints: too few
    visibility[1, [6, 7]] = 0  # two lower ones are left: always the upper body
    draws = draw(40, torch.Generator().manual_seed(0))
    config = STILL.model_copy(update={"half_body": 1.0})
    matrix, _ = augment_transforms(
        draws, keypoints, visibility, config=config, geometry=geometry, skeleton=SKELETON
    )
    np.testing.assert_array_equal(matrix[0], np.eye(2, 3))
    moved = transform_points(matrix.numpy(), keypoints.double().numpy())
    halves = []
    for one in moved[1:]:
        means = np.stack([one[:6].mean(axis=0), one[6:].mean(axis=0)])
        gaps = np.abs(means - [47.5, 63.5]).max(axis=1)
        halves.append(int(gaps.argmin()))
        assert gaps.min() < 1e-6
        half = one[:6] if halves[-1] == 0 else one[6:]
        extent = half.max(axis=0) - half.min(axis=0)
        assert (extent / [96, 128]).max() == pytest.approx(1 / 1.5)
    assert halves[0] == 0
    assert 5 < sum(halves) < 35


def test_half_body_ignores_keypoints_without_annotation() -> None:
    geometry = CropGeometry((96, 128), "hrnet")
    keypoints = torch.rand(8, 10, 2, generator=torch.Generator().manual_seed(3)) * 60 + 20
    visibility = torch.full((8, 10), 1)
    visibility[:, [0, 6]] = 0
    lost = keypoints.clone()
    lost[:, [0, 6]] = torch.nan
    config = STILL.model_copy(update={"half_body": 1.0})
    draws = draw(8, torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"config": config, "geometry": geometry, "skeleton": SKELETON}
    first, _ = augment_transforms(draws, keypoints, visibility, **options)
    second, _ = augment_transforms(draws, lost, visibility, **options)
    assert torch.equal(first, second)


def test_colour_jitter_follows_its_formula_and_range() -> None:
    pixels = torch.rand(5, 3, 8, 9, generator=torch.Generator().manual_seed(0)) * 255
    draws = draw(5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(jitter_colour(pixels.clone(), draws, 0.0), pixels, atol=1e-3, rtol=0)
    found = jitter_colour(pixels.clone(), draws, 0.4).numpy()
    for b in range(5):
        brightness, contrast, *gains = (1 + 0.4 * draws.colour[b].numpy()).tolist()
        bright = np.stack(
            [pixels[b, c].numpy() * brightness * (gains[c] + 1) / 2 for c in range(3)]
        )
        expected = (bright - bright.mean()) * contrast + bright.mean()
        np.testing.assert_allclose(found[b], expected.clip(0, 255), atol=1e-2)
    strong = jitter_colour(pixels.clone(), draws, 1.0)
    assert strong.min() >= 0
    assert strong.max() <= 255


def test_erasing_covers_one_rectangle_of_the_drawn_images() -> None:
    """Its area and aspect lie in the method's ranges where it does not reach over the border."""
    pixels = torch.rand(400, 3, 40, 30, generator=torch.Generator().manual_seed(0)) * 255
    draws = draw(400, torch.Generator().manual_seed(1))
    assert torch.equal(erase_rectangle(pixels, draws, 0.0), pixels)
    found = erase_rectangle(pixels, draws, 0.5)
    changed = (found != pixels).any(dim=1)
    covered = changed.flatten(1).any(dim=1)
    assert torch.equal(covered, draws.erase[:, 0] < 0.5)
    whole = 0
    for image, plain, mask in zip(found[covered], pixels[covered], changed[covered], strict=True):
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        top, left = int(rows[0]), int(columns[0])
        height, width = int(rows[-1]) - top + 1, int(columns[-1]) - left + 1
        mean = plain.mean(dim=(-2, -1))[:, None, None].expand(3, height, width)
        inside = image[:, top : top + height, left : left + width]
        torch.testing.assert_close(inside, mean, atol=1e-3, rtol=0)
        if top and left and top + height < 40 and left + width < 30:
            whole += 1
            # Half a pixel on each side lies between the rectangle and the pixels it covers.
            assert (height - 1) * (width - 1) <= 0.2 * 1200
            assert (height + 1) * (width + 1) >= 0.02 * 1200
            assert (height - 1) / (width + 1) <= 1 / 0.3
            assert (height + 1) / (width - 1) >= 0.3
    assert whole > 60


def test_erasing_leaves_keypoints_and_the_other_draws_alone() -> None:
    geometry = CropGeometry((96, 128), "hrnet", margin=1.5)
    batch = make_batch(geometry)
    plain, erased = (
        prepare(
            batch,
            geometry,
            augment=AugmentConfig(erase=share),
            generator=torch.Generator().manual_seed(5),
        )
        for share in (0.0, 1.0)
    )
    assert torch.equal(plain.heatmaps, erased.heatmaps)
    assert torch.equal(plain.weights, erased.weights)
    same = (plain.images == erased.images).all(dim=1).flatten(1).double().mean(dim=1)
    assert (same < 1).all()
    assert (same > 0.75).all()


def test_everything_ends_on_the_device() -> None:
    """The meta device refuses to mix with the CPU as an accelerator would."""
    geometry = CropGeometry((96, 128), "udp", margin=1.5)
    batch = make_batch(geometry)
    options = {
        "augment": AugmentConfig(half_body=0.5, erase=0.5),
        "generator": torch.Generator(),
    }
    found = prepare(batch, geometry, device="meta", **options)
    for name in ("images", "heatmaps", "weights", "input_to_image", "index"):
        assert getattr(found, name).device.type == "meta"
    assert found.images.shape == (6, 3, 128, 96)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    geometry = CropGeometry((96, 128), "hrnet", margin=1.5)
    batch = make_batch(geometry)
    with pytest.raises(PosefabricError, match="same input_wh and margin"):
        prepare(batch, CropGeometry((96, 128), "hrnet"))
    with pytest.raises(PosefabricError, match="codec"):
        prepare(batch, geometry, codec=Codec("udp", (96, 128), (24, 32), 1.5))
    with pytest.raises(PosefabricError, match="generator"):
        prepare(batch, geometry, augment=AugmentConfig())
