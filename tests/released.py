"""Specifications and states of released PoseNFS networks, small ones, for tests."""

from __future__ import annotations

import functools
from typing import Any

from posenfs_by_hand import Shapes, fabric_shapes
from torch import Tensor

from posefabric.evaluate.reference import fill_by_name
from posefabric.models.posenfs_backbones import build_posenfs_backbone

PARTS: dict[str, dict[int, dict[str, list[int]]]] = {
    "coco": {
        1: {"whole_body": list(range(17))},
        3: {"arms": [5, 6, 7, 8, 9, 10], "head": [0, 1, 2, 3, 4], "legs": [*range(11, 17)]},
        5: {
            "left_arm": [7, 9],
            "right_arm": [8, 10],
            "legs": [13, 14, 15, 16],
            "head_shoulder": [0, 1, 2, 3, 4, 5, 6],
            "hips": [11, 12],
        },
        8: {
            "left_upper_arm": [5, 7],
            "right_upper_arm": [6, 8],
            "left_lower_arm": [7, 9],
            "right_lower_arm": [8, 10],
            "left_lower_leg": [13, 15],
            "right_lower_leg": [14, 16],
            "head_shoulder": [0, 1, 2, 3, 4, 5, 6],
            "upper_legs": [11, 12, 13, 14],
        },
    },
    "mpii": {
        1: {"whole_body": list(range(16))},
        3: {"arms": [3, 4, 5, 6, 7, 8], "head": [0, 1, 2], "legs": [9, 10, 11, 12, 13, 14, 15]},
        8: {
            "left_upper_arm": [3, 5],
            "right_upper_arm": [4, 6],
            "left_lower_arm": [5, 7],
            "right_lower_arm": [6, 8],
            "left_lower_leg": [11, 13],
            "right_lower_leg": [12, 14],
            "head_shoulder": [0, 1, 2, 3, 4],
            "upper_legs": [9, 15, 10, 11, 12],
        },
    },
}


def specification(
    *, backbone: str = "mobilenet_v2", dataset: str = "coco", parts: int = 1, **cells: Any
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "one-shot-search": True,
        "vector_in_pixel": False,
        "vector_dim": 8,
        "convolution_mode": "2D",
        "search_alpha": True,
        "search_beta": True,
        "operators": ["Zero", "skip_connect", "Atr_Conv_3x3", "Sep_Conv_3x3"],
        "depth": 6,
        "cut_layers_num": 3,
        "size_types": [4, 8, 16, 32],
        "hidden_states_num": 1,
        "factor": 2,
        "input_nodes_num": 1,
    }
    config |= {key.replace("one_shot", "one-shot-search"): value for key, value in cells.items()}
    return {
        "backbone": backbone,
        "dataset": dataset,
        "parts_num": parts,
        "parts": PARTS[dataset][parts],
        "cell_config": config,
    }


@functools.cache
def backbone_shapes(name: str) -> tuple[tuple[int, ...], Shapes]:
    backbone = build_posenfs_backbone(name, (), levels=4)
    shapes = {
        f"backbone.{key}": tuple(tensor.shape)
        for key, tensor in backbone.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    return backbone.channels, shapes


def make_state(spec: dict[str, Any]) -> dict[str, Tensor]:
    channels, shapes = backbone_shapes(spec["backbone"])
    return fill_by_name({**shapes, **fabric_shapes(spec, channels)})
