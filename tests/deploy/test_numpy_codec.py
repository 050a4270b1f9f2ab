"""The numpy decoder is the torch decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posefabric.data.codec import Codec
from posefabric.data.crop import PRESETS
from posefabric.deploy.numpy_codec import NumpyCodec


def both(preset: str) -> tuple[Codec, NumpyCodec]:
    codec = Codec(preset, (96, 128), (24, 32), 2.0)  # type: ignore[arg-type]
    return codec, NumpyCodec(preset=codec.preset, stride=codec.stride)


def maps_of_many_kinds(codec: Codec) -> torch.Tensor:
    """Gaussians near and on the border, with noise and faint, pure noise, nothing, below zero."""
    generator = torch.Generator().manual_seed(3)
    keypoints = torch.rand(6, 7, 2, generator=generator) * torch.tensor([95.0, 127.0])
    maps, _ = codec.encode(keypoints, torch.ones(6, 7))
    maps[1] += 0.05 * torch.rand(maps[1].shape, generator=generator)
    maps[2] *= 1e-3
    maps[3] = torch.randn(maps[3].shape, generator=generator)
    maps[4, :3] = 0.0
    maps[5, :3] = -torch.rand(maps[5, :3].shape, generator=generator)
    return maps


@pytest.mark.parametrize("preset", PRESETS)
def test_it_decodes_as_torch_does(preset: str) -> None:
    codec, ours = both(preset)
    maps = maps_of_many_kinds(codec)
    expected, expected_scores = codec.decode(maps)
    found, scores = ours.decode(maps.numpy())
    assert found.dtype == scores.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    np.testing.assert_array_equal(scores, expected_scores.numpy())


@pytest.mark.parametrize("preset", PRESETS)
def test_it_flips_back_as_torch_does(preset: str) -> None:
    codec, ours = both(preset)
    maps = torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(1))
    order = np.array([2, 1, 0, 3])
    expected = codec.flip_back(maps, order).numpy()
    np.testing.assert_array_equal(ours.flip_back(maps.numpy(), order), expected)
