"""Keypoints to heatmaps and back, for whole batches on any device (CONVENTIONS)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from posefabric.data.conventions import Conventions, Preset, choose_conventions
from posefabric.structures import PosefabricError

CUT = 3.0  # a Gaussian ends at this many sigmas
FILTER_CUT = 4.0  # and the usual Gaussian filter's kernel at so many, rounded to a whole cell
DARK_REACH = 5  # a kernel of 11
DARK_SIGMA = 2.0  # what OpenCV takes for a kernel of 11: 0.3 ((11 - 1) / 2 - 1) + 0.8
UDP_RANGE = (1e-3, 50.0)  # to which UDP-DARK clips the blurred map before the logarithm


def default_sigma(input_h: int) -> float:
    """Heatmap sigma in heatmap pixels for an input height in pixels.

    1.5 at 128, 2 at 256, 3 at 384 and linear between (CONVENTIONS); the outer slopes go on
    beyond, down to 1, below which a Gaussian is hardly more than one pixel.
    """
    if input_h <= 256:
        return max(1.0, 1.5 + (input_h - 128) / 256.0)
    return 2.0 + (input_h - 256) / 128.0


@dataclass(frozen=True)
class Codec:
    """Encodes keypoints as Gaussian heatmaps and decodes them again.

    Presets: ``hrnet`` (stride W_in / W_hm, Gaussian on the nearest cell, quarter pixel),
    ``udp`` (stride (W_in - 1) / (W_hm - 1), sub-pixel Gaussian, DARK), ``posenfs`` (as hrnet,
    by a Gaussian filter, and half an input pixel added when decoding).

    Attributes:
        preset: hrnet, udp or posenfs.
        input_wh, heatmap_wh: pixels.
        sigma: of the Gaussian, in heatmap pixels.
        conventions: each rule of the above by name; none: the preset's.
    """

    preset: Preset
    input_wh: tuple[int, int]
    heatmap_wh: tuple[int, int]
    sigma: float
    conventions: Conventions | None = None

    def __post_init__(self) -> None:
        choose_conventions(self.preset)
        if min(self.heatmap_wh) < 3:
            raise PosefabricError(
                f"heatmap_wh: expected sides of 3 or more, got {self.heatmap_wh}; "
                "use a larger input_wh"
            )
        if not self.sigma > 0:
            raise PosefabricError(f"sigma: expected a number above 0, got {self.sigma}")

    @property
    def rules(self) -> Conventions:
        """The conventions given, or the preset's."""
        return self.conventions or choose_conventions(self.preset)

    @property
    def stride(self) -> tuple[float, float]:
        """Input pixels a heatmap pixel, along x and y."""
        (width, height), (columns, rows) = self.input_wh, self.heatmap_wh
        if self.rules.stride == "unbiased":
            return (width - 1) / (columns - 1), (height - 1) / (rows - 1)
        return width / columns, height / rows

    @property
    def target_peak(self) -> float:
        """Highest value of an uncut, integer-centred target once it is normalised to sum 1."""
        reach = self._reach if self.rules.target == "filtered" else math.floor(CUT * self.sigma)
        side = sum(math.exp(-(d * d) / (2 * self.sigma**2)) for d in range(-reach, reach + 1))
        return 1.0 / side**2

    def encode(self, keypoints: Tensor, visibility: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of keypoints (B, K, 2) in input pixels with visibility (B, K) 0/1/2.

        Returns heatmaps (B, K, h, w) float32 with peak 1 and weights (B, K) float32. A keypoint
        that is not annotated, or whose cell lies outside the map, weighs 0 (outside:
        ``outside_weight``) and has an empty map.
        """
        rules = self.rules
        columns, rows = self.heatmap_wh
        centre = keypoints.float() / keypoints.new_tensor(self.stride, dtype=torch.float32)
        cell = torch.floor(centre + 0.5)
        inside = (cell >= 0) & (cell < cell.new_tensor([columns, rows]))
        shown = (visibility > 0) & inside.all(dim=-1)
        if rules.target != "subpixel":
            centre = cell
        bell = self._filtered if rules.target == "filtered" else self._bell
        across = bell(columns, centre[..., 0], cell[..., 0])
        down = bell(rows, centre[..., 1], cell[..., 1])
        # Zeroing one factor, by where, also drops what non-finite keypoints would leave.
        across = torch.where(shown[..., None], across, 0.0)
        down = torch.where(shown[..., None], down, 0.0)
        weights = shown.float()
        if rules.outside_weight:
            outside = (visibility > 0) & ~shown & torch.isfinite(centre).all(dim=-1)
            weights = torch.where(outside, rules.outside_weight, weights)
        return down[..., :, None] * across[..., None, :], weights

    def _bell(self, length: int, centre: Tensor, cell: Tensor) -> Tensor:
        grid = torch.arange(length, device=centre.device, dtype=centre.dtype)
        values = torch.exp(-((grid - centre[..., None]) ** 2) / (2.0 * self.sigma**2))
        return torch.where((grid - cell[..., None]).abs() <= CUT * self.sigma, values, 0.0)

    @property
    def _reach(self) -> int:
        """Cells on each side of a Gaussian filter's kernel."""
        return int(FILTER_CUT * self.sigma + 0.5)

    def _filtered(self, length: int, centre: Tensor, cell: Tensor) -> Tensor:
        """A pixel at ``cell`` through a Gaussian filter, scaled to peak 1, along one axis.

        As the released code's filter: a kernel of 4 sigmas, the border repeated outside, so that
        a pixel on the border counts once more for every cell beyond it.
        """
        del centre
        grid = torch.arange(length, device=cell.device, dtype=cell.dtype)
        distance = (grid - cell[..., None]).abs()
        reach = self._reach
        steps = torch.arange(reach + 1, device=cell.device, dtype=cell.dtype)
        kernel = torch.exp(-(steps**2) / (2.0 * self.sigma**2))
        # beyond[d]: what the kernel holds further away than d, on one side.
        beyond = torch.cat([kernel.flip(0).cumsum(0).flip(0)[1:], kernel.new_zeros(1)])
        near = distance.clamp(max=reach).nan_to_num(reach).long()
        within = (distance <= reach).to(kernel)
        border = (cell == 0) | (cell == length - 1)
        values = (kernel[near] + beyond[near] * border[..., None]) * within
        return values / values.amax(dim=-1, keepdim=True).clamp_min(1e-12)

    def decode(self, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        """Keypoints (B, K, 2) in input pixels and scores (B, K), the maxima, of (B, K, h, w).

        With ``smooth`` a keypoint is where the blurred map is highest, so that a broad hill may
        win over a narrow peak. Sub-pixel refinement is left out on the map's border, but by
        ``udp-dark``. Where the maximum is 0 or less both coordinates are 0 (udp: -1) and the score
        is kept. Can be exported: no step depends on the values.
        """
        rules = self.rules
        maps = heatmaps.float()
        columns, rows = self.heatmap_wh
        scores, index = maps.flatten(2).max(dim=-1)
        if rules.smooth:
            maps = _blur(maps, int(FILTER_CUT * rules.smooth + 0.5), rules.smooth)
            index = maps.flatten(2).argmax(dim=-1)
        x = index % columns
        y = torch.div(index, columns, rounding_mode="floor")
        if rules.decode == "udp-dark":
            step = _newton_step(_udp_logs(maps), (y + 1) * (columns + 2) + x + 1)
        else:
            interior = (x > 0) & (x < columns - 1) & (y > 0) & (y < rows - 1)
            # Cells next to the border stand in for border cells, whose step is thrown away.
            anchor = y.clamp(1, rows - 2) * columns + x.clamp(1, columns - 2)
            dark = rules.decode == "dark"
            step = _newton_step(_dark_logs(maps), anchor) if dark else _quarter(maps, anchor)
            step = torch.where(interior[..., None], step, torch.zeros_like(step))
        cells = torch.stack([x, y], dim=-1).to(maps.dtype) + step
        keypoints = cells * torch.tensor(self.stride, dtype=maps.dtype, device=maps.device)
        if rules.decode_offset:
            keypoints = keypoints + rules.decode_offset
        missing = torch.full_like(keypoints, rules.missing_coordinate)
        return torch.where((scores > 0)[..., None], keypoints, missing), scores

    def flip_back(self, heatmaps_of_flipped: Tensor, flip_index: Tensor | np.ndarray) -> Tensor:
        """Bring the heatmaps (B, K, h, w) of mirrored inputs in line with the plain ones.

        Mirrors the width, swaps left and right by ``flip_index`` (K,), and with ``flip_shift``
        (hrnet) moves the maps one pixel to the right (the first column stays), since a biased
        stride puts the mirrored cells one to the left. udp needs no shift; posenfs has none,
        though biased.
        """
        order = torch.as_tensor(flip_index, dtype=torch.int64, device=heatmaps_of_flipped.device)
        maps = heatmaps_of_flipped.flip(-1).index_select(1, order)
        if self.rules.flip_shift:
            maps = torch.cat([maps[..., :1], maps[..., :-1]], dim=-1)
        return maps


def _dark_logs(maps: Tensor) -> Tensor:
    """The logarithm of the blurred maps (B, K, h, w), each relative to its peak (DARK)."""
    peak = maps.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    return torch.log(_blur(maps / peak, DARK_REACH, DARK_SIGMA).clamp_min(1e-10))


def _udp_logs(maps: Tensor) -> Tensor:
    """The same as UDP's code has it (Huang et al., CVPR 2020), with a row more on each side.

    The blur mirrors the border, values are clipped as they are, and the border is repeated once,
    so that it is refined too.
    """
    blurred = _blur(maps, DARK_REACH, DARK_SIGMA, mirrored=True)
    logs = torch.log(blurred.clamp(*UDP_RANGE))
    return functional.pad(logs, (1, 1, 1, 1), mode="replicate")


def _newton_step(log: Tensor, anchor: Tensor) -> Tensor:
    """One Newton step (B, K, 2) on log-heatmaps (DARK: Zhang et al., CVPR 2020)."""
    around = _neighbourhood(log, anchor)
    middle = around[..., 1, 1]
    dx = (around[..., 1, 2] - around[..., 1, 0]) / 2
    dy = (around[..., 2, 1] - around[..., 0, 1]) / 2
    dxx = around[..., 1, 2] - 2 * middle + around[..., 1, 0]
    dyy = around[..., 2, 1] - 2 * middle + around[..., 0, 1]
    diagonal = around[..., 2, 2] + around[..., 0, 0]
    dxy = (diagonal - around[..., 2, 0] - around[..., 0, 2]) / 4
    determinant = dxx * dyy - dxy * dxy
    # Only a negative definite Hessian has a maximum to step to.
    sound = (dxx < 0) & (determinant > 1e-9)
    safe = torch.where(sound, determinant, torch.ones_like(determinant))
    step = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], dim=-1) / safe[..., None]
    return torch.where(sound[..., None], step.clamp(-1.0, 1.0), torch.zeros_like(step))


def _neighbourhood(maps: Tensor, anchor: Tensor) -> Tensor:
    """The 3x3 values (B, K, 3, 3), rows first, about flat indices (B, K) of maps (B, K, h, w)."""
    columns = maps.shape[-1]
    offsets = torch.tensor(
        [dy * columns + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)], device=maps.device
    )
    values = maps.flatten(2).gather(2, anchor[..., None] + offsets)
    return values.unflatten(-1, (3, 3))


def _quarter(maps: Tensor, anchor: Tensor) -> Tensor:
    """A quarter pixel towards the higher neighbour on each axis, (B, K, 2)."""
    around = _neighbourhood(maps, anchor)
    across = around[..., 1, 2] - around[..., 1, 0]
    down = around[..., 2, 1] - around[..., 0, 1]
    return 0.25 * torch.sign(torch.stack([across, down], dim=-1))


def _blur(maps: Tensor, reach: int, sigma: float, mirrored: bool = False) -> Tensor:
    """Gaussian blur of (B, K, h, w), ``reach`` cells to each side.

    Outside are zeros, or the map mirrored. Zeros, as in DARK's own code: mirroring at the border,
    OpenCV's default, adds a second peak there and moves keypoints two cells inside by a whole cell.
    """
    if mirrored:
        maps = functional.pad(maps, (reach, reach, reach, reach), mode="reflect")
    border = 0 if mirrored else reach
    grid = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-(grid**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    count, size = maps.shape[1], 2 * reach + 1
    across = kernel.view(1, 1, 1, -1).expand(count, 1, 1, size)
    down = kernel.view(1, 1, -1, 1).expand(count, 1, size, 1)
    maps = functional.conv2d(maps, across, padding=(0, border), groups=count)
    return functional.conv2d(maps, down, padding=(border, 0), groups=count)
