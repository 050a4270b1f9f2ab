"""The numpy decoder is the torch decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posefabric.data.codec import Codec
from posefabric.data.conventions import choose_conventions
from posefabric.data.crop import PRESETS
from posefabric.deploy.numpy_codec import NumpyCodec


def both(preset: str, **rules) -> tuple[Codec, NumpyCodec]:
    chosen = choose_conventions(preset, **rules) if rules else None  # type: ignore[arg-type]
    codec = Codec(preset, (96, 128), (24, 32), 2.0, chosen)  # type: ignore[arg-type]
    return codec, NumpyCodec(codec.preset, codec.stride, chosen)


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


OTHERS = (
    dict(decode="udp-dark", target="subpixel"),
    dict(decode="dark", decode_offset=0.25),
    dict(smooth=1.0),
    dict(smooth=1.5, decode="dark"),
    dict(missing_coordinate=-3.0),
)


@pytest.mark.parametrize(
    ("preset", "rules"), [*((p, {}) for p in PRESETS), *(("hrnet", rules) for rules in OTHERS)]
)
def test_it_decodes_as_torch_does(preset: str, rules: dict) -> None:
    codec, ours = both(preset, **rules)
    maps = maps_of_many_kinds(codec)
    if "smooth" in rules:
        # No hill as high to its left as to its right: rounding would say which is higher.
        maps = maps * torch.linspace(0.9, 1.1, maps.shape[-1]) * torch.linspace(0.8, 1, 32)[:, None]
    expected, expected_scores = codec.decode(maps)
    found, scores = ours.decode(maps.numpy())
    if rules:
        assert not np.allclose(found, both(preset)[1].decode(maps.numpy())[0], atol=0.01)
    assert found.dtype == scores.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    np.testing.assert_array_equal(scores, expected_scores.numpy())


@pytest.mark.parametrize(
    ("preset", "rules"), [*((p, {}) for p in PRESETS), ("hrnet", dict(flip_shift=False))]
)
def test_it_flips_back_as_torch_does(preset: str, rules: dict) -> None:
    codec, ours = both(preset, **rules)
    maps = torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(1))
    order = np.array([2, 1, 0, 3])
    expected = codec.flip_back(maps, order).numpy()
    np.testing.assert_array_equal(ours.flip_back(maps.numpy(), order), expected)
