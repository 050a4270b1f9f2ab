"""Baselines: the published costs, their shapes and parts, and that nothing in them is idle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from posefabric.evaluate.profile import count_macs, count_parameters
from posefabric.models.backbones import TimmBackbone
from posefabric.models.baselines import BASELINES, BaselineNetwork
from posefabric.models.hrnet import HRNetBackbone
from posefabric.models.posenfs_backbones import HRNet
from posefabric.models.timm_import import import_timm
from posefabric.skeletons import load_skeleton
from posefabric.space.architecture import Architecture, Backbone, Head
from posefabric.space.baseline import Baseline, Branch, load_graph
from posefabric.structures import PosefabricError

# The figures of these papers are in units of 2**30 multiply-adds.
GIGA = 2**30


def make(
    network: str,
    backbone: Any,
    *,
    skeleton: str = "coco17",
    parts: int | None = None,
    head: str = "heatmap",
    scores: str = "softmax",
    width: int = 8,
    blocks: int = 2,
) -> BaselineNetwork:
    """A baseline on a given backbone, of 64 pixels."""
    found = load_skeleton(skeleton)
    groups = {"all": range(found.num_keypoints)} if parts is None else found.groupings[parts]
    graph = Baseline(
        network=network,  # type: ignore[arg-type]
        skeleton=skeleton,
        keypoint_names=found.keypoints,
        input_wh=(64, 64),
        backbone=Backbone(name=getattr(backbone, "name", "hrnet"), channels=backbone.channels),
        width=width,
        blocks=blocks,
        head=Head(kind=head, dim=8, scores=scores),  # type: ignore[arg-type]
        parts=tuple(Branch(name=name, keypoints=tuple(ks)) for name, ks in groups.items()),
    )
    return BASELINES[network](graph=graph, backbone=backbone)


def costs(build: Callable[[], nn.Module], input_wh: tuple[int, int]) -> tuple[float, nn.Module]:
    """MACs / 2**30, counted on a 64 x 64 picture: all of them are in proportion to the area."""
    with torch.device("meta"):
        network = build()
    network = network.to_empty(device="cpu").eval()
    if hasattr(network, "join"):
        network.join.table.zero_()  # type: ignore[union-attr]
    with torch.no_grad():
        macs = count_macs(lambda: network(torch.zeros(1, 3, 64, 64)))
    return macs * input_wh[0] * input_wh[1] / 64**2 / GIGA, network


@pytest.mark.parametrize(
    ("parts", "width", "params", "macs"), [(3, 400, 12.8e6, 23.7), (5, 296, 12.6e6, 22.8)]
)
def test_branchnet_costs_what_is_published(
    parts: int, width: int, params: float, macs: float
) -> None:
    """PAPER section 5, on HRNet-W32's stem to stage 3 with 16 keypoints at 256 x 256."""
    found, network = costs(
        lambda: make(
            "branchnet",
            HRNet(levels=4),
            skeleton="mpii16",
            parts=parts,
            width=width,
            blocks=8,
        ),
        (256, 256),
    )
    assert count_parameters(network) == pytest.approx(params, rel=0.004)
    assert found == pytest.approx(macs, rel=0.004)


def test_hrnet_costs_what_is_published() -> None:
    """Sun et al. (2019), table 1: 28.5 M and 7.1 at 256 x 192."""
    found, network = costs(lambda: make("hrnet", HRNetBackbone("hrnet_w32")), (192, 256))
    assert count_parameters(network) == pytest.approx(28.5e6, rel=0.002)
    assert found == pytest.approx(7.1, rel=0.004)


def test_simple_baseline_costs_what_is_published() -> None:
    """Sun et al. (2019), table 1: 34.0 M and 8.9 at 256 x 192.

    That count multiplies a deconvolution's weights with its output's pixels, of which each is
    reached by a quarter of them.
    """
    found, network = costs(
        lambda: make("simple_baseline", TimmBackbone("resnet50"), width=256), (192, 256)
    )
    assert count_parameters(network) == pytest.approx(34.0e6, rel=0.001)
    layers = [m for m in network.modules() if isinstance(m, nn.ConvTranspose2d)]
    pixels = [8 * 6 * 4**step for step in (1, 2, 3)]
    outputs = sum(layer.weight.numel() * count for layer, count in zip(layers, pixels, strict=True))
    assert found + outputs * 3 / 4 / GIGA == pytest.approx(8.9, rel=0.012)
    assert found == pytest.approx(5.05, rel=0.002), "what is computed"


def small_backbone(network: str) -> nn.Module:
    return HRNetBackbone("hrnet_w4") if network == "hrnet" else TimmBackbone("test_efficientnet")


@pytest.mark.parametrize("network", BASELINES)
@pytest.mark.parametrize(
    ("head", "scores"),
    [("heatmap", "softmax"), ("vector", "identity"), ("vector3d", "identity")],
)
def test_every_weight_of_a_baseline_is_used(network: str, head: str, scores: str) -> None:
    torch.manual_seed(0)
    parts = 3 if network == "branchnet" else None
    model = make(network, small_backbone(network), parts=parts, head=head, scores=scores)
    outputs = model(torch.randn(2, 3, 64, 96))
    assert outputs.shape == (2, 17, 16, 24)
    maps = model.score_maps(outputs)
    if head != "heatmap":
        assert bool((maps >= 0).all()) and bool((maps < 1).all())
    else:
        torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 17))
    (outputs * torch.randn(outputs.shape)).sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Nothing after the level at stride 32 reads the finer ones.
    assert [n for n in idle if not (network == "simple_baseline" and "backbone" in n)] == []


def test_a_branch_moves_its_own_keypoints_alone() -> None:
    torch.manual_seed(0)
    model = make("branchnet", TimmBackbone("test_efficientnet"), parts=3).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        name, keypoints = model.graph.parts[1].name, model.graph.parts[1].keypoints
        model.get_submodule(f"parts.{name}.head.final_layer.1").bias += 1  # type: ignore[operator]
        moved = (model(images) - before).abs().amax((0, 2, 3))
    assert set(moved.nonzero().flatten().tolist()) == set(keypoints)


def test_branchnet_sums_a_keypoint_of_two_parts() -> None:
    torch.manual_seed(0)
    model = make("branchnet", TimmBackbone("test_efficientnet"), parts=8).eval()
    shared = next(
        k for k in range(17) if sum(k in part.keypoints for part in model.graph.parts) == 2
    )
    maps: dict[str, Any] = {}
    for part in model.graph.parts:
        model.get_submodule(f"parts.{part.name}").register_forward_hook(
            lambda module, inputs, output, name=part.name: maps.__setitem__(name, output)
        )
    with torch.no_grad():
        joined = model(torch.randn(1, 3, 64, 64))
    expected = sum(
        maps[part.name][:, part.keypoints.index(shared)]
        for part in model.graph.parts
        if shared in part.keypoints
    )
    torch.testing.assert_close(joined[:, shared], expected)


def test_hrnet_has_the_tensors_of_its_family() -> None:
    timm = import_timm()
    with torch.device("meta"):
        ours = HRNetBackbone("hrnet_w18").body.state_dict()
        theirs = timm.create_model("hrnet_w18", pretrained=False).state_dict()
    assert all(theirs[name].shape == tensor.shape for name, tensor in ours.items())


@pytest.mark.parametrize("name", ["resnet50", "hrnet_w0", "hrnet_w32_stage3", "hrnet"])
def test_another_backbone_is_no_hrnet(name: str) -> None:
    with pytest.raises(PosefabricError, match=f"model.backbone={name}: expected hrnet_w32"):
        HRNetBackbone(name)


def test_a_description_goes_through_json(tmp_path: Path) -> None:
    graph = make("branchnet", TimmBackbone("test_efficientnet"), parts=3).architecture()
    path = tmp_path / "architecture.json"
    path.write_text(graph.to_json())
    loaded = load_graph(path)
    assert loaded == graph and loaded.digest() == graph.digest()
    assert graph.model_copy(update={"width": 9}).digest() != graph.digest()
    with pytest.raises(PosefabricError, match="not an architecture"):
        Architecture.load(path)
    path.write_text(graph.to_json().replace('"branchnet"', '"stacked_hourglass"'))
    with pytest.raises(PosefabricError, match=r"architecture\.json: not an architecture: network"):
        load_graph(path)
    path.write_text("{")
    with pytest.raises(PosefabricError, match="no JSON"):
        load_graph(path)
