"""Which keypoints each fabric predicts, and how parts that share keypoints are summed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from posefabric.skeletons import Skeleton
from posefabric.structures import PosefabricError


def choose_parts(
    skeleton: Skeleton, parts: int | str | Mapping[str, Sequence[str]], *, seed: int = 0
) -> dict[str, tuple[int, ...]]:
    """Part name to keypoint indices: a grouping of the skeleton's file (PAPER section 2).

    ``"random:P"`` deals the keypoints by ``seed`` into P parts of nearly equal size, each
    keypoint into one: the paper's control (section 5). ``"random"`` is ``"random:3"``. A mapping
    is the grouping itself, each part's keypoints by name; their order is that of the part's maps.
    Raises PosefabricError for a grouping the skeleton does not have.
    """
    if isinstance(parts, Mapping):
        return {name: _own_part(skeleton, name, names) for name, names in parts.items()}
    if isinstance(parts, str) and parts.startswith("learned"):
        raise PosefabricError(
            f"model.parts={parts}: is learned from training persons before a network is built; "
            f"`posefabric search` and `train` do, or give the parts that `posefabric data parts` "
            f"prints"
        )
    if isinstance(parts, str):
        return _random_parts(skeleton, parts, seed)
    if parts not in skeleton.groupings:
        known = ", ".join(str(p) for p in sorted(skeleton.groupings))
        raise PosefabricError(
            f"model.parts={parts}: skeleton {skeleton.name} has groupings for P = {known}; "
            f"choose one or add it to the skeleton's file"
        )
    return {name: tuple(keypoints) for name, keypoints in skeleton.groupings[parts].items()}


def _random_parts(skeleton: Skeleton, parts: str, seed: int) -> dict[str, tuple[int, ...]]:
    match = re.fullmatch(r"random(?::(\d+))?", parts)
    count = int(match[1] or 3) if match else 0
    if not 1 <= count <= skeleton.num_keypoints:
        raise PosefabricError(
            f"model.parts={parts}: expected a number of parts, or random:P with P from 1 to the "
            f"{skeleton.num_keypoints} keypoints of skeleton {skeleton.name}"
        )
    order = np.random.default_rng(seed).permutation(skeleton.num_keypoints)
    groups = np.array_split(order, count)
    return {f"random_{i}": tuple(sorted(int(k) for k in group)) for i, group in enumerate(groups)}


def _own_part(skeleton: Skeleton, name: str, keypoints: Sequence[str]) -> tuple[int, ...]:
    unknown = [k for k in keypoints if k not in skeleton.keypoints]
    if unknown or not keypoints or len(set(keypoints)) != len(keypoints):
        raise PosefabricError(
            f"model.parts: part {name} has {', '.join(keypoints) or 'no keypoints'}; expected "
            f"different ones of {skeleton.name}: {', '.join(skeleton.keypoints)}"
        )
    if not name or "." in name or hasattr(torch.nn.ModuleDict, name):
        raise PosefabricError(f"model.parts: no part can be called {name!r}; choose another name")
    return tuple(skeleton.keypoints.index(k) for k in keypoints)


class SumOfParts(torch.nn.Module):
    """Joins the parts' maps in keypoint order; a keypoint in several parts is their sum."""

    def __init__(self, parts: Sequence[Sequence[int]], num_keypoints: int) -> None:
        super().__init__()
        beyond = [k for part in parts for k in part if not 0 <= k < num_keypoints]
        if beyond:
            raise PosefabricError(
                f"parts predict keypoints {beyond}, there are 0 .. {num_keypoints - 1}; "
                f"correct the parts"
            )
        rows: list[list[int]] = [[] for _ in range(num_keypoints)]
        for row, keypoint in enumerate(k for part in parts for k in part):
            rows[keypoint].append(row)
        missing = [k for k, found in enumerate(rows) if not found]
        if missing:
            raise PosefabricError(f"no part predicts keypoints {missing}; add them to a part")
        total = sum(len(part) for part in parts)
        self.depth = max(len(found) for found in rows)
        # Row ``total`` is a map of zeros, for keypoints in fewer parts than the most shared one.
        table = [
            [found[i] if i < len(found) else total for found in rows] for i in range(self.depth)
        ]
        self.register_buffer("table", torch.tensor(table), persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Parts' (B, K_p, h, w) to (B, K, h, w)."""
        table = self.get_buffer("table")
        joined = torch.cat(list(maps), dim=1)
        if self.depth == 1:
            return joined.index_select(1, table[0])
        joined = torch.cat([joined, torch.zeros_like(joined[:, :1])], dim=1)
        result = joined.index_select(1, table[0])
        for i in range(1, self.depth):
            result = result + joined.index_select(1, table[i])
        return result
