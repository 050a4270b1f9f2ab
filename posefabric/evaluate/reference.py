"""Compares our network with what the paper's released code computed, quantity by quantity.

A reference is NAME.json (a specification, the input's and output's sizes, the loss, and every
tensor's name and shape) and NAME.npz (heatmaps, gradients of alpha and beta). Weights, input
and target are not stored: they follow from the tensors' names and from fixed seeds.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posefabric.models.posenfs import load_posenfs
from posefabric.structures import PosefabricError

HEATMAP_LIMIT = 1e-6
GRADIENT_LIMIT = 1e-8
INPUT_SEED, TARGET_SEED, WEIGHT_SEED = 7, 8, 9


@dataclass(frozen=True)
class Difference:
    """The largest difference of one quantity over its largest value, and what is allowed."""

    quantity: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit


def find_references(folder: Path) -> list[Path]:
    """The .json files of a folder that have a .npz beside them, in order of their names.

    Raises PosefabricError when there is none.
    """
    found = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".npz").is_file()]
    if not found:
        raise PosefabricError(f"{folder}: holds no reference, expected NAME.json and NAME.npz")
    return found


def compare_reference(path: Path) -> list[Difference]:
    """Heatmaps in training and evaluation mode, the loss, every gradient, in float64.

    ``path``: NAME.json. Raises PosefabricError for a specification that cannot be built, a file
    that cannot be read, and a quantity that only one side has.
    """
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz")) as stored:
            expected = {name: stored[name] for name in stored}
        expected["loss"] = np.asarray(spec["loss_train"])
        sizes = spec["input"], spec["output"]
    except (OSError, ValueError, KeyError) as error:
        raise PosefabricError(f"{path}: not a readable reference: {error!r}") from error
    network = load_posenfs(spec, fill_by_name(dict(spec["state"])))
    found = reference_quantities(network, *sizes, arch=network.arch_parameters())
    unmatched = sorted(expected.keys() ^ found.keys())
    if unmatched:
        raise PosefabricError(f"{path}: {', '.join(unmatched)}: only one side has this quantity")
    return [
        Difference(
            name,
            relative_difference(value, expected[name]),
            HEATMAP_LIMIT if name.startswith("heatmaps") else GRADIENT_LIMIT,
        )
        for name, value in found.items()
    ]


def reference_quantities(
    network: nn.Module,
    input_size: Sequence[int],
    output_size: Sequence[int],
    *,
    arch: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """The references' procedure: ``heatmaps_train``, ``heatmaps_eval``, ``loss``, ``grad.NAME``.

    Args:
        network: float64; its batch norms' momentum becomes 1, so that evaluation uses the
            statistics of this very batch.
        input_size: (B, 3, H, W). output_size: (B, K, H/4, W/4).
        arch: name to the parameters whose gradients are wanted.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    noise = np.random.default_rng(INPUT_SEED).standard_normal(tuple(input_size))
    images = _float32_values(noise)
    outputs = network.train()(images)
    found: dict[str, Tensor] = {"heatmaps_train": outputs.detach()}
    with torch.no_grad():
        found["heatmaps_eval"] = network.eval()(images)
    target = np.random.default_rng(TARGET_SEED).standard_normal(tuple(output_size))
    weight = np.random.default_rng(WEIGHT_SEED).random(tuple(output_size[:2])) > 0.2
    # In training mode the outputs do not depend on the statistics that evaluation used.
    squares = (outputs - _float32_values(np.abs(target))).square().mean(dim=(2, 3))
    loss = (0.5 * torch.from_numpy(weight) * squares).mean()
    found["loss"] = loss.detach()
    gradients = torch.autograd.grad(loss, list(arch.values()))
    found |= {f"grad.{name}": value for name, value in zip(arch, gradients, strict=True)}
    return found


def relative_difference(found: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """The largest difference over the largest expected value; infinite for other shapes."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return math.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def fill_by_name(state_shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Tensor names to shapes in; float64 tensors out, each the float32 value nearest its rule."""
    return {
        name: _float32_values(_value(name, tuple(shape))) for name, shape in state_shapes.items()
    }


def _float32_values(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).double()


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
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
