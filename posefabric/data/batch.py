"""From uint8 crops to a network's batch: one warp, the targets, the normalised images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from posefabric.config import AugmentConfig
from posefabric.data.augment import augment_transforms, draw, erase_rectangle, jitter_colour
from posefabric.data.codec import Codec
from posefabric.data.crop import CropGeometry
from posefabric.structures import CropBatch, PoseBatch, PosefabricError

if TYPE_CHECKING:
    from posefabric.skeletons import Skeleton


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the channels in 0..1; they follow the backbone's weights.

    ``channel_order`` is the order the network takes the channels in, its constants in the same
    order; ``bgr`` reads what the paper's released code trained (CONVENTIONS, normalisation).
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise PosefabricError(
                f"normalisation: expected three means and three positive standard deviations, "
                f"got {self.mean} and {self.std}"
            )

    def apply(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std of RGB images (B, 3, H, W) in 0..255."""
        if self.channel_order == "bgr":
            images = torch.cat([images[:, 2:3], images[:, 1:2], images[:, 0:1]], dim=1)
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        scale = 1 / (255 * std)
        return images * scale.view(1, 3, 1, 1) - (mean / std).view(1, 3, 1, 1)


def prepare_batch(
    batch: CropBatch,
    *,
    geometry: CropGeometry,
    codec: Codec,
    normalisation: Normalisation,
    skeleton: Skeleton,
    augment: AugmentConfig | None,
    generator: torch.Generator | None,
    device: torch.device | str,
    rows: slice | None = None,
    whole: int | None = None,
) -> PoseBatch:
    """Augment, encode and normalise a batch on the device.

    Without ``augment`` the images are the middle of the crops, to the last bit. Otherwise crop
    and augmentation become one linear warp, and everything random comes from ``generator``,
    which moves on by the same amount for every batch of the same size. The warp also shrinks
    to the codec's input where that is smaller than the geometry's.

    ``rows`` says which these persons are of a batch of ``whole`` that several processes share;
    each is then augmented as in the whole batch.

    Raises PosefabricError when the crops are not of ``geometry``, when ``augment`` comes
    without a generator, or when codec and geometry do not belong together.
    """
    _check(batch, geometry, codec, augment, generator)
    plain = _square(torch.from_numpy(geometry.crop_to_input).double())
    image_to_input = plain @ _square(batch.image_to_crop.cpu().double())
    keypoints = _transform(image_to_input, batch.keypoints.cpu().double())
    visibility = batch.visibility.cpu()
    crops = batch.crops.to(device, non_blocking=True)
    if augment is None or generator is None:
        border_x, border_y = geometry.border_wh
        width, height = geometry.input_wh
        middle = crops[:, border_y : border_y + height, border_x : border_x + width]
        images = middle.permute(0, 3, 1, 2).float()
    else:
        draws = draw(len(crops) if whole is None else whole, generator)
        draws = draws if rows is None else draws.of(rows)
        extra, flip = augment_transforms(
            draws, keypoints, visibility, config=augment, geometry=geometry, skeleton=skeleton
        )
        extra = _resize(geometry, codec.input_wh).double() @ _square(extra)
        image_to_input = extra @ image_to_input
        keypoints = _transform(extra, keypoints)
        order = torch.from_numpy(skeleton.flip_index)
        keypoints = torch.where(flip[:, None, None], keypoints[:, order], keypoints)
        visibility = torch.where(flip[:, None], visibility[:, order], visibility)
        images = warp_crops(crops, (extra @ plain)[:, :2], codec.input_wh)
        images = jitter_colour(images, draws, augment.colour)
        images = erase_rectangle(images, draws, augment.erase)
    heatmaps, weights = codec.encode(keypoints.float().to(device), visibility.to(device))
    images = normalisation.apply(images).contiguous(memory_format=torch.channels_last)
    return PoseBatch(
        images=images,
        heatmaps=heatmaps,
        weights=weights,
        input_to_image=torch.linalg.inv(image_to_input)[:, :2].float().to(device),
        index=batch.index.to(device),
    )


def warp_crops(crops: Tensor, crop_to_input: Tensor, input_wh: tuple[int, int]) -> Tensor:
    """Warp crops (B, Hc, Wc, 3) uint8 to float32 images (B, 3, H, W) in 0..255.

    ``crop_to_input`` (B, 2, 3), on the CPU, maps crop pixels to input pixels; a pixel's centre
    has whole coordinates, as in OpenCV. Linear interpolation, black border.
    """
    rows, columns = crops.shape[1:3]
    width, height = input_wh
    device = crops.device
    # With aligned corners -1 and 1 are the centres of the first and the last pixel.
    span = torch.tensor([columns - 1, rows - 1], dtype=torch.float64)
    back = torch.linalg.inv(_square(crop_to_input.double()))[:, :2] * (2 / span)[:, None]
    back[:, :, 2] -= 1
    back = back.float().to(device)
    x = torch.arange(width, dtype=torch.float32, device=device)
    y = torch.arange(height, dtype=torch.float32, device=device)
    across = x[:, None] * back[:, None, :, 0] + back[:, None, :, 2]
    down = y[:, None] * back[:, None, :, 1]
    grid = across[:, None] + down[:, :, None]
    pixels = crops.permute(0, 3, 1, 2).float()
    return functional.grid_sample(
        pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=True
    )


def _resize(geometry: CropGeometry, input_wh: tuple[int, int]) -> Tensor:
    """(3, 3): pixels of the geometry's input to those of an input of another size."""
    lost = geometry.rules.warp == "unbiased"
    spans = zip(input_wh, geometry.input_wh, strict=True)
    return torch.diag(torch.tensor([*((ours - lost) / (whole - lost) for ours, whole in spans), 1]))


def _square(matrix: Tensor) -> Tensor:
    """Affine (..., 2, 3) as (..., 3, 3)."""
    last = matrix.new_tensor([0.0, 0.0, 1.0]).expand(*matrix.shape[:-2], 1, 3)
    return torch.cat([matrix, last], dim=-2)


def _transform(matrix: Tensor, points: Tensor) -> Tensor:
    """Apply (..., 3, 3) to points (..., N, 2)."""
    return points @ matrix[..., :2, :2].transpose(-1, -2) + matrix[..., None, :2, 2]


def _check(
    batch: CropBatch,
    geometry: CropGeometry,
    codec: Codec,
    augment: AugmentConfig | None,
    generator: torch.Generator | None,
) -> None:
    width, height = geometry.crop_wh
    if tuple(batch.crops.shape[1:]) != (height, width, 3):
        raise PosefabricError(
            f"crops of shape {tuple(batch.crops.shape)}: expected (B, {height}, {width}, 3); load "
            "them with the geometry that prepares them (the same input_wh and margin)"
        )
    theirs, ours = geometry.rules, codec.rules
    smaller = all(a <= b for a, b in zip(codec.input_wh, geometry.input_wh, strict=True))
    fits = smaller if augment is not None else codec.input_wh == geometry.input_wh
    if not fits or codec.preset != geometry.preset or theirs != ours:
        raise PosefabricError(
            f"codec ({codec.preset}, {codec.input_wh}) and geometry ({geometry.preset}, "
            f"{geometry.input_wh}) differ; make both from the same input_wh, preset and conventions"
        )
    if augment is not None and generator is None:
        raise PosefabricError(
            "augment without a generator: pass a seeded torch.Generator, or augment=None"
        )
