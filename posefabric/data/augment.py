"""Random transforms of a batch, drawn from one generator: geometry, colour and erasing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from posefabric.config import AugmentConfig
from posefabric.data.crop import CropGeometry

if TYPE_CHECKING:
    from posefabric.skeletons import Skeleton

HALF_BODY_MIN_KEYPOINTS = 8
HALF_BODY_PADDING = 1.5
# A crop holds no more detail than this, however close together half a body's keypoints are.
HALF_BODY_MIN_SHARE = 0.25
# Of the input's area, and height to width.
ERASED_SHARE = (0.02, 0.2)
ERASED_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch of B persons, always as many, whatever the options and data.

    Attributes:
        normal: (B, 2) zoom and rotation.
        uniform: (B, 6) rotate, flip, half body, which half, shift x and y.
        colour: (B, 5) brightness, contrast and the three channels' gains, in -1..1.
        erase: (B, 5) erase, area, aspect, centre x and y.
    """

    normal: Tensor
    uniform: Tensor
    colour: Tensor
    erase: Tensor

    def of(self, rows: slice) -> Draws:
        return Draws(self.normal[rows], self.uniform[rows], self.colour[rows], self.erase[rows])


def draw(count: int, generator: torch.Generator) -> Draws:
    """Draw for ``count`` persons; the numbers are float32 on the CPU."""
    device = generator.device
    normal = torch.randn(count, 2, generator=generator, device=device)
    uniform = torch.rand(count, 6, generator=generator, device=device)
    colour = torch.rand(count, 5, generator=generator, device=device) * 2 - 1
    # Last, so that the others are what they were before there was erasing.
    erase = torch.rand(count, 5, generator=generator, device=device)
    return Draws(normal.cpu(), uniform.cpu(), colour.cpu(), erase.cpu())


def augment_transforms(
    draws: Draws,
    keypoints: Tensor,
    visibility: Tensor,
    *,
    config: AugmentConfig,
    geometry: CropGeometry,
    skeleton: Skeleton,
) -> tuple[Tensor, Tensor]:
    """Transforms (B, 2, 3) float64 from plain input pixels to augmented ones, and flips (B,).

    Takes keypoints (B, K, 2) in plain input pixels and visibility (B, K). As in the HRNet
    protocol the region seen is scaled by clip(1 + scale z, 1 - scale, 1 + scale) and turned by
    clip(rotation z, +-2 rotation) degrees about its centre; a half body's region replaces the
    box's; a flip maps x to W - 1 - x, last.
    """
    width, height = geometry.input_wh
    target = torch.from_numpy(geometry.input_centre)
    normal, uniform = draws.normal.double(), draws.uniform.double()
    size = (1 + config.scale * normal[:, 0]).clamp(1 - config.scale, 1 + config.scale)
    degrees = (normal[:, 1] * config.rotation).clamp(-2 * config.rotation, 2 * config.rotation)
    degrees = torch.where(uniform[:, 0] < config.rotation_probability, degrees, 0.0)
    flip = uniform[:, 1] < config.flip
    centre, share = _half_body_regions(
        uniform[:, 2:4], keypoints.double(), visibility, config.half_body, geometry, skeleton
    )
    box = torch.tensor([width, height], dtype=torch.float64) / geometry.rules.box_padding
    goal = target + (uniform[:, 4:6] * 2 - 1) * config.translate * box
    factor = 1 / (size * share)
    angle = torch.deg2rad(degrees)
    cosine, sine = factor * torch.cos(angle), factor * torch.sin(angle)
    linear = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    offset = goal - (linear @ centre[..., None])[..., 0]
    matrix = torch.cat([linear, offset[..., None]], dim=-1)
    mirror = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None]
    shift = torch.tensor([[0.0, 0.0, width - 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    return torch.where(flip[:, None, None], matrix * mirror + shift, matrix), flip


def _half_body_regions(
    uniform: Tensor,
    keypoints: Tensor,
    visibility: Tensor,
    probability: float,
    geometry: CropGeometry,
    skeleton: Skeleton,
) -> tuple[Tensor, Tensor]:
    """Centre (B, 2) in plain input pixels and size (B,) as a share of the input.

    The whole input but for persons with enough keypoints who are drawn: for them the mean of
    the upper or lower body's keypoints and 1.5 times their extent, widened to the input.
    """
    count = len(keypoints)
    whole = torch.from_numpy(geometry.input_centre).expand(count, 2)
    everything = torch.ones(count, dtype=torch.float64)
    if probability == 0 or not skeleton.upper_body:
        return whole, everything
    seen = visibility > 0
    is_upper = torch.zeros(keypoints.shape[1], dtype=torch.bool)
    is_upper[list(skeleton.upper_body)] = True
    upper, lower = seen & is_upper, seen & ~is_upper
    enough_upper, enough_lower = upper.sum(1) > 2, lower.sum(1) > 2
    # The drawn half, or the other one when the drawn half has too few keypoints.
    take_upper = torch.where(uniform[:, 1] < 0.5, enough_upper, ~enough_lower)
    chosen = torch.where(take_upper[:, None], upper, lower)[..., None]
    number = chosen.sum(1)
    mean = torch.where(chosen, keypoints, 0.0).sum(1) / number.clamp_min(1)
    highest = torch.where(chosen, keypoints, -np.inf).amax(1)
    lowest = torch.where(chosen, keypoints, np.inf).amin(1)
    extent = (highest - lowest) / torch.tensor(geometry.input_wh, dtype=torch.float64)
    share = (HALF_BODY_PADDING * extent.amax(1)).clamp_min(HALF_BODY_MIN_SHARE)
    drawn = (uniform[:, 0] < probability) & (seen.sum(1) >= HALF_BODY_MIN_KEYPOINTS)
    drawn = drawn & (number[:, 0] >= 2)
    return torch.where(drawn[:, None], mean, whole), torch.where(drawn, share, everything)


def jitter_colour(images: Tensor, draws: Draws, strength: float) -> Tensor:
    """Change brightness, contrast and channel gain of images (B, 3, H, W) in 0..255.

    Each factor lies in 1 +- strength (a channel's gain in half of that range); contrast turns
    about the image's own mean. Works in place and clips to 0..255.
    """
    factors = 1 + strength * draws.colour.to(images.device)
    gain = factors[:, :1] * (1 + (factors[:, 2:5] - 1) / 2)
    contrast = factors[:, 1:2]
    mean = (images.mean(dim=(-2, -1)) * gain).mean(dim=1, keepdim=True)
    images.mul_((gain * contrast)[..., None, None]).add_((mean * (1 - contrast))[..., None, None])
    return images.clamp_(0, 255)


def erase_rectangle(images: Tensor, draws: Draws, probability: float) -> Tensor:
    """Cover a rectangle of images (B, 3, H, W) with the image's mean colour, some of them.

    Random erasing (Zhong et al., AAAI 2020): area uniform in ``ERASED_SHARE`` of the image's,
    aspect log-uniform in ``ERASED_ASPECT``, centre anywhere, so that it may reach over the border.
    Keypoints below it stay annotated.
    """
    if probability == 0:
        return images
    rows, columns = images.shape[-2:]
    drawn = draws.erase.double()
    (least, most), (wide, tall) = ERASED_SHARE, np.log(ERASED_ASPECT)
    area = (least + (most - least) * drawn[:, 1]) * rows * columns
    aspect = torch.exp(wide + (tall - wide) * drawn[:, 2])
    x, y = drawn[:, 3] * columns - 0.5, drawn[:, 4] * rows - 0.5
    across = _within(columns, x, (area / aspect).sqrt())
    down = _within(rows, y, (area * aspect).sqrt()) & (drawn[:, :1] < probability)
    covered = (down[:, None, :, None] & across[:, None, None, :]).to(images.device)
    return torch.where(covered, images.mean(dim=(-2, -1), keepdim=True), images)


def _within(count: int, centre: Tensor, length: Tensor) -> Tensor:
    """(B, count): whether a pixel's centre lies in its row's interval."""
    pixels = torch.arange(count, dtype=centre.dtype)
    return (pixels - centre[:, None]).abs() < length[:, None] / 2
