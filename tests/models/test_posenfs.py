"""Released checkpoints: the reference values, other configurations by hand, wrong states."""

from __future__ import annotations

import copy
import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from posenfs_by_hand import Shapes, fabric_by_hand, fabric_shapes
from reference_fill import fill_by_name
from torch import Tensor

from posefabric.models.posenfs import OPERATION_NAMES, load_posenfs
from posefabric.models.posenfs_backbones import build_posenfs_backbone
from posefabric.structures import PosefabricError
from posefabric.train.loss import mean_squared_error

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


def relative(found: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# The values that the released code computed (../shared/reference/README.md).


@pytest.mark.parametrize(
    "name",
    [
        "resnet50_cnf1_coco_heatmap",
        "resnet50_cnf3_coco_vector8",
        "mobilenetv2_cnf3_coco_vector8_percell",
        "hrnet_w32_cnf5_mpii_heatmap",
    ],
)
def test_the_released_models(shared: Path, name: str) -> None:
    folder = shared / "reference/posenfs"
    spec = json.loads((folder / f"{name}.json").read_text())
    expected = np.load(folder / f"{name}.npz")
    network = load_posenfs(spec, fill_by_name(dict(spec["state"])))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    noise = np.random.default_rng(7).standard_normal(spec["input"]).astype(np.float32)
    images = torch.from_numpy(noise).double()
    outputs = network.train()(images)
    assert relative(outputs.detach(), expected["heatmaps_train"]) < 1e-6
    with torch.no_grad():
        assert relative(network.eval()(images), expected["heatmaps_eval"]) < 1e-6
    size = spec["output"]
    targets = np.abs(np.random.default_rng(8).standard_normal(size)).astype(np.float32)
    weights = np.random.default_rng(9).random(size[:2]) > 0.2
    # In training mode the outputs do not depend on the statistics that evaluation used.
    loss = mean_squared_error(
        outputs, torch.from_numpy(targets).double(), torch.from_numpy(weights)
    )
    assert loss.item() == pytest.approx(spec["loss_train"], rel=1e-8)
    loss.backward()
    found = network.arch_parameters()
    assert {f"grad.{key}" for key in found} == {k for k in expected if k.startswith("grad.")}
    for key, parameter in found.items():
        assert parameter.grad is not None
        assert relative(parameter.grad, expected[f"grad.{key}"]) < 1e-8, key


# Other configurations, against the same fabric from plain functions.


def random_options(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    dataset = rng.choice(["coco", "mpii"])
    return dict(
        dataset=dataset,
        parts=rng.choice(sorted(PARTS[dataset])),
        one_shot=rng.random() < 0.5,
        vector_in_pixel=rng.random() < 0.7,
        vector_dim=rng.choice([1, 4, 8]),
        convolution_mode=rng.choice(["2D", "3D"]),
        operators=rng.sample(sorted(OPERATION_NAMES), rng.randint(2, 4)),
        hidden_states_num=rng.randint(1, 2),
        factor=rng.choice([1, 2]),
        input_nodes_num=rng.choice([1, 2]),
    )


CONFIGURATIONS = {
    "every operation": dict(operators=list(OPERATION_NAMES), hidden_states_num=2),
    "three hidden nodes, own alpha": dict(hidden_states_num=3, one_shot=False),
    "unused input node": dict(hidden_states_num=2, input_nodes_num=2),
    "unused input node, own alpha": dict(input_nodes_num=3, one_shot=False, parts=3),
    "volume of vectors": dict(
        vector_in_pixel=True, convolution_mode="3D", dataset="mpii", parts=3, vector_dim=4
    ),
    "3D without vectors": dict(convolution_mode="3D"),
    "shared keypoints, vectors": dict(parts=8, vector_in_pixel=True),
    "shared keypoints of mpii": dict(parts=8, dataset="mpii"),
    "deeper": dict(depth=8, one_shot=False),
    "four cells first": dict(depth=7),
    "three levels": dict(depth=5),
    "two levels, one cell": dict(depth=4),
    "early cut": dict(depth=4, cut_layers_num=2),
    "cells larger than the pyramid": dict(depth=6, cut_layers_num=2),
    "one operation": dict(operators=["conv_3x3"]),
    "width equal on one level only": dict(factor=4),
    **{f"random {seed}": random_options(seed) for seed in range(6)},
}


def check_by_hand(spec: dict[str, Any], state: dict[str, Tensor]) -> None:
    network = load_posenfs(spec, state)
    channels = network.backbone.channels
    generator = torch.Generator().manual_seed(1)
    pyramid = [
        torch.randn(2, width, 16 >> s, 24 >> s, generator=generator, dtype=torch.float64)
        for s, width in enumerate(channels)
    ]
    arch = {key: state[key].clone().requires_grad_() for key in network.arch_parameters()}
    for training in (False, True):
        expected = fabric_by_hand(spec, {**state, **arch}, pyramid, training=training)
        found = network.train(training).head_forward(pyramid)
        assert found.shape == expected.shape
        assert relative(found.detach(), expected.detach()) < 1e-11
    probe = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for key, parameter in network.arch_parameters().items():
        own, other = parameter.grad, arch[key].grad
        assert own is not None and other is not None and own.shape == other.shape
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_any_configuration_by_hand(name: str) -> None:
    spec = specification(**CONFIGURATIONS[name])
    check_by_hand(spec, make_state(spec))


def test_no_reduction_where_the_widths_are_equal() -> None:
    spec = specification(backbone="hrnet", factor=8, operators=["skip_connect", "Atr_Conv_5x5"])
    state = make_state(spec)
    assert not any(name.startswith("reduce.") for name in state)
    check_by_hand(spec, state)


@pytest.mark.parametrize("backbone", ["resnet", "hrnet_w32", "mobilenetv2"])
def test_heatmaps_are_a_quarter_of_the_images(backbone: str) -> None:
    channels, shapes = backbone_shapes(backbone)
    spec = specification(backbone=backbone, depth=4)
    shapes = {**shapes, **fabric_shapes(spec, channels)}
    state = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    network = load_posenfs(spec, state).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 17, 16, 24)
    with pytest.raises(PosefabricError, match="100 x 64 pixels, expected multiples of 8"):
        network(torch.zeros(1, 3, 64, 100))


def test_the_state_decides_the_precision() -> None:
    spec = specification()
    state = make_state(spec)
    assert load_posenfs(spec, state).arch_parameters()["whole_body.alphas"].dtype == torch.float64
    halved = {name: tensor.float() for name, tensor in state.items()}
    network = load_posenfs(spec, halved)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    # The caller's tensors are copied: training the network leaves them alone.
    with torch.no_grad():
        network.arch_parameters()["whole_body.alphas"].zero_()
    assert halved["whole_body.alphas"].abs().min() > 0


def test_what_the_released_code_never_uses_may_be_there() -> None:
    spec = specification(depth=5, input_nodes_num=2)
    state = make_state(spec)
    surplus = {
        "backbone.features.17.conv.0.weight": torch.zeros(960, 160, 1, 1),
        "backbone.features.0.1.num_batches_tracked": torch.tensor(3),
        "whole_body.stem.5.weight": torch.zeros(8, 64, 1, 1),
        "whole_body.cell_3_0.cell_arch.1.ops.2.operation.0.weight": torch.zeros(8, 1, 3, 3),
    }
    plain = load_posenfs(spec, state).released_tensors()
    for prefix in ("", "module."):
        network = load_posenfs(
            spec, {prefix + name: value for name, value in {**state, **surplus}.items()}
        )
        for name, tensor in network.released_tensors().items():
            torch.testing.assert_close(tensor, plain[name], rtol=0, atol=0)


def test_numpy_states_and_a_missing_one_shot_option() -> None:
    for one_shot in (True, False):
        spec = specification(one_shot=one_shot)
        state = make_state(spec)
        del spec["cell_config"]["one-shot-search"]
        network = load_posenfs(spec, {name: value.numpy() for name, value in state.items()})
        assert network.arch_parameters()["whole_body.alphas"].ndim == (2 if one_shot else 3)


@pytest.mark.parametrize(
    "name",
    [
        "whole_body.alphas",
        "whole_body.betas",
        "whole_body.final_layer.1.bias",
        "whole_body.cell_3_1.channel_keep.weight",
        "whole_body.cell_4_0.propress_list.2.bn.running_var",
        "whole_body.cell_3_2.propress_list.1.operation.0.bias",
        "whole_body.cell_5_0.cell_arch.0.ops.3.operation.5.weight",
        "reduce.0.2.weight",
        "backbone.features.16.conv.7.running_mean",
    ],
)
def test_wrong_tensors_are_named(name: str) -> None:
    spec = specification()
    state = make_state(spec)
    value = state.pop(name)
    with pytest.raises(PosefabricError, match=rf"1 tensors missing: {name};"):
        load_posenfs(spec, state)
    state[name] = value[None].repeat_interleave(2, dim=-1)
    with pytest.raises(PosefabricError, match=rf"wrong shape: {name} is \(.*\), expected \("):
        load_posenfs(spec, state)
    state[name] = value
    state[f"{name}.extra"] = value
    with pytest.raises(PosefabricError, match=rf"1 tensors unexpected: {name}.extra;"):
        load_posenfs(spec, state)


def test_a_state_of_another_specification_is_refused() -> None:
    state = make_state(specification(hidden_states_num=2, parts=3))
    with pytest.raises(PosefabricError, match=r"missing: .* and [0-9]+ more; .* unexpected"):
        load_posenfs(specification(), state)
    with pytest.raises(PosefabricError, match=r"arms.alphas is \(3, 4\), expected \(1, 4\)"):
        load_posenfs(specification(parts=3), state)
    own = make_state(specification(one_shot=False))
    with pytest.raises(PosefabricError, match=r"whole_body.alphas is \(6, 1, 4\), expected \(1,"):
        load_posenfs(specification(), own)
    with pytest.raises(PosefabricError, match=r"whole_body\.alphas is a str, expected a tensor"):
        load_posenfs(specification(), {**own, "whole_body.alphas": "none"})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("backbone", "vgg", "backbone='vgg': expected resnet"),
        ("dataset", "lsp", "dataset: .*'coco' or 'mpii'"),
        ("parts_num", 3, "parts_num is 3, but parts has 1"),
        ("parts", {"a": [0, 1]}, "no part predicts keypoints"),
        ("parts", {"a": list(range(18))}, r"parts predict keypoints \[17\]"),
        ("cell_config.operators", ["Zero", "warp"], r"operators \['warp'\]: expected some of"),
        ("cell_config.operators", ["Zero", "Zero"], "each may be there once"),
        ("cell_config.depth", None, "cell_config.depth"),
        ("cell_config.cut_layers_num", 6, "expected 1 .. depth - 1 = 5"),
        ("cell_config.convolution_mode", "4D", "cell_config.convolution_mode"),
        ("cell_config.size_types", [4, 8, 16], "size_types"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(path: str, value: object, message: str) -> None:
    spec = copy.deepcopy(specification())
    *above, last = path.split(".")
    node = spec
    for key in above:
        node = node[key]
    node[last] = value
    if path == "parts":
        spec["parts_num"] = 1
    with pytest.raises(PosefabricError, match=message):
        load_posenfs(spec, {})
