"""Fills a PoseNFS state from its names, as ../shared/reference/README.md says."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def fill_by_name(state_shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Tensor names to shapes in; float64 tensors out, each the float32 value nearest its rule."""
    return {
        name: torch.from_numpy(_value(name, tuple(shape)).astype(np.float32)).double()
        for name, shape in state_shapes.items()
    }


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last in ("alphas", "betas"):
        return z
    if last in ("running_mean", "bias"):
        return 0.1 * z
    if last == "running_var":
        return 1 + 0.5 * np.tanh(z)
    if len(shape) == 1:
        return 1 + 0.1 * z
    quarter = 0.25 if ".final_layer" in name else 1.0
    return z * math.sqrt(1 / math.prod(shape[1:])) * quarter
