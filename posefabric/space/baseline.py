"""A baseline's description on disk, beside the fabric's graph: JSON in, JSON out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from posefabric.space.architecture import (
    Architecture,
    Backbone,
    Graph,
    Head,
    _Frozen,
    read_graph_text,
)

BaselineName = Literal["branchnet", "simple_baseline", "hrnet"]


class Branch(_Frozen):
    """One output of a baseline and the keypoints it predicts."""

    name: str
    keypoints: tuple[int, ...]


class Baseline(Graph):
    """A network that is not searched: what it is, wide and deep, and what it predicts.

    ``width``: channels of a Branchnet branch, of SimpleBaseline's deconvolutions, or of HRNet's
    finest resolution. ``blocks``: residual blocks of a Branchnet branch, 0 for the others.
    """

    network: BaselineName
    skeleton: str
    keypoint_names: tuple[str, ...]
    input_wh: tuple[int, int]
    channel_order: Literal["rgb", "bgr"] = "rgb"
    backbone: Backbone
    width: int
    blocks: int = 0
    head: Head = Field(default_factory=Head)
    parts: tuple[Branch, ...]


def load_graph(path: Path | str) -> Architecture | Baseline:
    """The graph in a file, of a fabric or of a baseline.

    Raises PosefabricError that names the file and the first wrong field.
    """
    text = read_graph_text(Path(path))
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None  # told by the reader
    kind = Baseline if isinstance(tree, dict) and "network" in tree else Architecture
    return kind.from_json(text, origin=str(path))
