"""Heatmaps and back: every row of the conventions, against OpenCV, SciPy and plain loops."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from posefabric.data.codec import Codec, default_sigma
from posefabric.data.crop import PRESETS
from posefabric.structures import PosefabricError

INPUT, MAP = (96, 128), (24, 32)


def make(preset: str, sigma: float = 1.5) -> Codec:
    return Codec(preset, INPUT, MAP, sigma)  # pyright: ignore[reportArgumentType]


def points(count: int, low: float) -> torch.Tensor:
    rng = np.random.default_rng(3)
    span = np.array(INPUT) - 2 * low
    return torch.tensor(low + rng.random((1, count, 2)) * span, dtype=torch.float32)


@pytest.mark.parametrize("preset", ["hrnet", "udp"])
@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_encode_equals_plain_loops(preset, sigma) -> None:
    codec = make(preset, sigma)
    keypoints = points(30, low=-6)
    heatmaps, weights = codec.encode(keypoints, torch.full((1, 30), 2))
    if preset == "udp":
        stride = (95 / 23, 127 / 31)
    else:
        stride = (4.0, 4.0)
    for k, (x, y) in enumerate(keypoints[0].tolist()):
        u, v = x / stride[0], y / stride[1]
        column, row = int(np.floor(u + 0.5)), int(np.floor(v + 0.5))
        if preset != "udp":
            u, v = column, row
        expected = np.zeros((32, 24))
        if 0 <= column < 24 and 0 <= row < 32:
            assert weights[0, k] == 1
            for i in range(32):
                for j in range(24):
                    if abs(i - row) <= 3 * sigma and abs(j - column) <= 3 * sigma:
                        expected[i, j] = np.exp(-((j - u) ** 2 + (i - v) ** 2) / (2 * sigma**2))
        else:
            assert weights[0, k] == 0
        np.testing.assert_allclose(heatmaps[0, k].numpy(), expected, atol=1e-5)
    assert 0 < int(weights.sum()) < 30


@pytest.mark.parametrize(("preset", "cut", "border"), [("hrnet", 3.0, 0), ("posenfs", 4.0, 1)])
@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_biased_target_is_a_gaussian_filtered_pixel(preset, cut, border, sigma) -> None:
    """For posenfs by the usual filter: four sigmas, the border repeated, scaled to peak 1."""
    codec = make(preset, sigma)
    cells = torch.tensor([[[12, 15], [1, 1], [0, 31], [23, 0], [22, 16]]])
    heatmaps, weights = codec.encode(4.0 * cells + 1, torch.ones(1, 5))
    mode = ["constant", "nearest"][border]
    for k, (column, row) in enumerate(cells[0].tolist()):
        pixel = np.zeros((32, 24))
        pixel[row, column] = 1
        expected = ndimage.gaussian_filter(pixel, sigma, mode=mode, truncate=cut)  # type: ignore[arg-type]
        np.testing.assert_allclose(heatmaps[0, k].numpy(), expected / expected.max(), atol=1e-6)
    assert heatmaps.amax() == 1 and weights.sum() == 5


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_are_zero_without_annotation_or_outside(preset) -> None:
    inside, far = [48.0, 64.0], [1e9, -1e9]
    keypoints = torch.tensor([[inside, inside, inside, far, [np.nan, 5.0], [-2.5, 64.0]]])
    visibility = torch.tensor([[0, 1, 2, 2, 2, 2]], dtype=torch.uint8)
    heatmaps, weights = make(preset).encode(keypoints, visibility)
    assert weights.tolist() == [[0, 1, 1, 0, 0, 0]]
    assert torch.isfinite(heatmaps).all()
    assert (heatmaps.amax(dim=(2, 3)) > 0).tolist() == [[False, True, True, False, False, False]]


@pytest.mark.parametrize("preset", ["hrnet", "posenfs"])
def test_quarter_pixel_decoding_equals_plain_loops(preset) -> None:
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 30, 8, 6))).float()
    codec = Codec(preset, (24, 32), (6, 8), 1.0)
    keypoints, scores = codec.decode(maps)
    borders = 0
    for b in range(4):
        for k in range(30):
            one = maps[b, k].numpy()
            y, x = np.unravel_index(one.argmax(), one.shape)
            found = np.array([x, y], dtype=float)
            if 0 < x < 5 and 0 < y < 7:
                found[0] += 0.25 * np.sign(one[y, x + 1] - one[y, x - 1])
                found[1] += 0.25 * np.sign(one[y + 1, x] - one[y - 1, x])
            else:
                borders += 1
            expected = found * 4 + (0.5 if preset == "posenfs" else 0.0)
            np.testing.assert_allclose(keypoints[b, k].numpy(), expected, atol=1e-6)
            assert scores[b, k] == one.max()
    assert 0 < borders < 120


def test_dark_equals_a_newton_step_on_opencv_s_blur() -> None:
    codec = make("udp", 2.0)
    keypoints = points(20, low=10)
    heatmaps, _ = codec.encode(keypoints, torch.ones(1, 20))
    rng = np.random.default_rng(5)
    heatmaps = heatmaps + torch.from_numpy(0.02 * rng.random(heatmaps.shape)).float()
    found, _ = codec.decode(heatmaps)
    for k in range(20):
        one = heatmaps[0, k].numpy()
        y, x = np.unravel_index(one.argmax(), one.shape)
        log = np.log(
            cv2.GaussianBlur(one.astype(np.float64), (11, 11), 0, borderType=cv2.BORDER_CONSTANT)
        )
        gradient_y, gradient_x = np.gradient(log)
        hessian = np.array(
            [
                [log[y, x + 1] - 2 * log[y, x] + log[y, x - 1], np.gradient(gradient_x)[0][y, x]],
                [np.gradient(gradient_y)[1][y, x], log[y + 1, x] - 2 * log[y, x] + log[y - 1, x]],
            ]
        )
        step = -np.linalg.solve(hessian, [gradient_x[y, x], gradient_y[y, x]])
        expected = (np.array([x, y]) + step) * np.array([95 / 23, 127 / 31])
        np.testing.assert_allclose(found[0, k].numpy(), expected, atol=2e-3)


@pytest.mark.parametrize(("preset", "bound"), [("hrnet", 2.0), ("posenfs", 2.5), ("udp", 0.05)])
@pytest.mark.parametrize("sigma", [1.5, 2.0])
def test_decoding_undoes_encoding(preset, bound, sigma) -> None:
    codec = make(preset, sigma)
    keypoints = points(200, low=30)  # nearer to the border DARK's blur misses a tail
    for gain in (1.0, 0.01):
        heatmaps, weights = codec.encode(keypoints, torch.ones(1, 200))
        found, scores = codec.decode(heatmaps * gain)
        assert weights.all()
        assert (found - keypoints).abs().max() <= bound + 1e-4
        assert (scores <= gain).all()
        assert (scores > 0.85 * gain).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_decoding_undoes_encoding_up_to_the_border(preset) -> None:
    keypoints = torch.cat(
        [points(300, low=0.5) * 0.97, torch.tensor([[[0.0, 0.0], [93.0, 125.0]]])], dim=1
    )
    codec = make(preset, 1.5)
    found, _ = codec.decode(codec.encode(keypoints, torch.ones(1, 302))[0])
    assert (found - keypoints).abs().max() <= 2.5 + 1e-4


@pytest.mark.parametrize("preset", PRESETS)
def test_rounding_of_biased_encoding_has_its_known_centre(preset) -> None:
    """Nearest-cell rounding is centred, so the mean error is 0, or posenfs' half pixel."""
    codec = make(preset, 1.5)
    x = torch.arange(24, 72, 0.125)
    keypoints = torch.stack([x, torch.full_like(x, 64.0)], dim=-1)[None]
    found, _ = codec.decode(codec.encode(keypoints, torch.ones(1, len(x)))[0])
    bias = float((found - keypoints)[..., 0].mean())
    assert bias == pytest.approx(0.5 if preset == "posenfs" else 0.0, abs=0.07)


@pytest.mark.parametrize(("preset", "missing"), [("hrnet", 0.0), ("udp", -1.0), ("posenfs", 0.0)])
def test_maps_without_a_positive_value(preset, missing) -> None:
    maps = torch.zeros(1, 2, 32, 24)
    maps[0, 1] = -0.5
    maps[0, 1, 10, 10] = -0.25
    keypoints, scores = make(preset).decode(maps)
    assert (keypoints == missing).all()
    assert scores.tolist() == [[0.0, -0.25]]


def test_dark_survives_flat_and_ridged_maps() -> None:
    maps = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 1e-20
    maps[0, 1] = 1.0
    maps[0, 2, :, 12] = 1.0
    keypoints, _ = make("udp").decode(maps)
    assert torch.isfinite(keypoints).all()
    assert (keypoints >= 0).all()
    assert (keypoints <= torch.tensor(INPUT)).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_flip_back_aligns_the_maps_of_a_mirrored_person(preset) -> None:
    codec = make(preset, 2.0)
    order = np.array([1, 0, 2])
    keypoints = torch.tensor([[[40.0, 60.0], [60.0, 64.0], [48.0, 80.0]]])
    mirrored = torch.stack([95 - keypoints[..., 0], keypoints[..., 1]], dim=-1)[:, order]
    plain, _ = codec.encode(keypoints, torch.ones(1, 3))
    flipped, _ = codec.encode(mirrored, torch.ones(1, 3))
    back = codec.flip_back(flipped, order)
    if preset == "posenfs":  # one cell off, as the released code
        back = torch.roll(back, 1, dims=-1)
    torch.testing.assert_close(back, plain, atol=1e-4, rtol=0)


def test_flip_back_of_hrnet_repeats_the_first_column() -> None:
    maps = torch.arange(2 * 32 * 24.0).view(1, 2, 32, 24)
    back = make("hrnet").flip_back(maps, torch.tensor([1, 0]))
    expected = maps.flip(-1)[:, [1, 0]]
    torch.testing.assert_close(back[..., 0], expected[..., 0])
    torch.testing.assert_close(back[..., 1:], expected[..., :-1])
    torch.testing.assert_close(make("udp").flip_back(maps, np.array([1, 0])), expected)


@pytest.mark.parametrize("sigma", [1.25, 1.5, 2.0])
def test_target_peak_is_that_of_a_normalised_target(sigma) -> None:
    codec = make("hrnet", sigma)
    heatmaps, _ = codec.encode(torch.tensor([[[48.0, 64.0]]]), torch.ones(1, 1))
    assert codec.target_peak == pytest.approx(float((heatmaps / heatmaps.sum()).max()), rel=1e-5)


def test_default_sigma() -> None:
    found = [default_sigma(height) for height in (32, 64, 128, 192, 256, 320, 384, 512)]
    assert found == [1.125, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0]


@pytest.mark.parametrize("preset", PRESETS)
def test_decoding_exports_with_a_dynamic_batch(preset) -> None:
    class Decoder(torch.nn.Module):
        def forward(self, heatmaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return make(preset).decode(heatmaps)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Decoder(), (torch.rand(3, 2, 32, 24),), dynamic_shapes=({0: batch},)
    )
    maps = torch.rand(5, 2, 32, 24, generator=torch.Generator().manual_seed(1))
    for found, expected in zip(program.module()(maps), Decoder()(maps), strict=True):
        torch.testing.assert_close(found, expected)


def test_wrong_options_are_refused() -> None:
    for arguments in (
        ("dark", INPUT, MAP, 2.0),
        ("udp", (8, 8), (2, 2), 2.0),
        ("hrnet", INPUT, MAP, 0.0),
    ):
        with pytest.raises(PosefabricError, match="expected"):
            Codec(*arguments)  # pyright: ignore[reportArgumentType]
