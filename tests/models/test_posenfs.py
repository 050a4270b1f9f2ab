"""Released checkpoints: the reference values, other configurations by hand, wrong states."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from posenfs_by_hand import fabric_by_hand, fabric_shapes
from released import PARTS, backbone_shapes, make_state, specification
from torch import Tensor

from posefabric.evaluate.reference import compare_reference, relative_difference
from posefabric.models.posenfs import OPERATION_NAMES, load_posenfs
from posefabric.structures import PosefabricError

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
    """Heatmaps within 1e-6, the loss and every gradient of alpha and beta within 1e-8."""
    rows = compare_reference(shared / f"reference/posenfs/{name}.json")
    assert {"heatmaps_train", "heatmaps_eval", "loss"} < {row.quantity for row in rows}
    assert all(row.passed for row in rows), rows


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
        assert relative_difference(found.detach(), expected.detach()) < 1e-11
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
