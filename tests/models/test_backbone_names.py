"""Weights under every naming, against the features of the network they were saved from."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import make_supernet, shake
from torch import Tensor, nn

from posefabric.derive.fold import fold
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.evaluate.reference import relative_difference
from posefabric.models import backbones
from posefabric.models.backbone_names import find_tensors, mobilenet_v2_modules
from posefabric.models.backbones import OWN_BACKBONES, build_backbone, make_backbone
from posefabric.models.compact import build_compact
from posefabric.models.posenfs_backbones import MobileNetV2
from posefabric.models.timm_import import import_timm
from posefabric.structures import PosefabricError

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def torchvision_model(name: str) -> Any:
    import_timm()  # which makes torchvision importable beside a torch for CPUs
    return getattr(importlib.import_module("torchvision.models"), name)(weights=None)


def shaken(network: nn.Module) -> Any:
    shake(network, 1)
    return network.eval()


@torch.no_grad()
def watched(network: nn.Module, names: list[str]) -> list[Tensor]:
    """What the named modules put out on the images, lists joined."""
    found: dict[str, Any] = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: found.__setitem__(name, output)
        )
    network(IMAGES)
    outputs = [found[name] for name in names]
    return [x for y in outputs for x in (y if isinstance(y, list) else [y])]


def saved(tmp_path: Path, network: nn.Module) -> str:
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth.tar")
    return str(tmp_path / "weights.pth.tar")


@torch.no_grad()
def check(name: str, weights: str, expected: list[Tensor]) -> None:
    backbone = build_backbone(name, weights=weights).eval()
    levels = backbone(IMAGES)
    assert len(levels) == len(expected) == 4
    assert backbone.channels == tuple(x.shape[1] for x in levels)
    for stride, mine, theirs in zip((4, 8, 16, 32), levels, expected, strict=True):
        assert mine.shape[2:] == (64 // stride, 96 // stride)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


RESNET_LEVELS = [f"layer{level}" for level in (1, 2, 3, 4)]


def test_a_resnet_of_torchvision(tmp_path: Path) -> None:
    source = shaken(torchvision_model("resnet50"))
    weights = saved(tmp_path, source)
    expected = watched(source, RESNET_LEVELS)
    check("resnet50", weights, expected)
    check("posenfs_resnet50", weights, expected)


def test_a_resnet_of_timm(tmp_path: Path) -> None:
    source = shaken(import_timm().create_model("resnet50", pretrained=False))
    check("posenfs_resnet50", saved(tmp_path, source), watched(source, RESNET_LEVELS))


@pytest.mark.parametrize("name", ["posenfs_mobilenet_v2", "mobilenetv2_100"])
def test_a_mobilenet_of_torchvision(tmp_path: Path, name: str) -> None:
    source = shaken(torchvision_model("mobilenet_v2"))
    blocks = [3, 6, 13, 16 if name.startswith("posenfs") else 17]
    expected = watched(source, [f"features.{block}" for block in blocks])
    check(name, saved(tmp_path, source), expected)


def test_a_mobilenet_of_timm(tmp_path: Path) -> None:
    source = shaken(import_timm().create_model("mobilenetv2_100", pretrained=False))
    blocks = ["blocks.1.1", "blocks.2.2", "blocks.4.2", "blocks.5.2"]
    check("posenfs_mobilenet_v2", saved(tmp_path, source), watched(source, blocks))


def test_a_mobilenet_under_the_released_codes_names(tmp_path: Path) -> None:
    source = shaken(MobileNetV2(levels=4))
    with torch.no_grad():
        check("posenfs_mobilenet_v2", saved(tmp_path, source), source(IMAGES))
    # timm's fourth level reads a block that this file lacks.
    with pytest.raises(PosefabricError, match=r"15 of .* are missing") as error:
        build_backbone("mobilenetv2_100", weights=saved(tmp_path, source))
    assert "released code's names; the first is features.17.conv.0.weight" in str(error.value)


def test_an_hrnet_of_its_family(tmp_path: Path) -> None:
    """timm's HRNet has the family's names; the fourth level is its third transition's."""
    source = shaken(import_timm().create_model("hrnet_w32", pretrained=False))
    check("hrnet_w32_stage3", saved(tmp_path, source), watched(source, ["stage3", "transition3.3"]))
    backbone = make_backbone("hrnet_w32_stage3")
    assert backbone.channels == (32, 64, 128, 256)
    # PAPER section 4: 8.1M.
    assert sum(p.numel() for p in backbone.parameters()) == 8_128_320


@pytest.mark.parametrize("name", ["posenfs_resnet50", "posenfs_mobilenet_v2", "hrnet_w32_stage3"])
def test_a_mixture_on_an_own_backbone_prunes_and_folds(name: str) -> None:
    mixture = make_supernet(backbone=name, first_layer=4, parts={"all": (0, 1, 2, 3)})
    graph = prune(mixture.architecture())
    compact = build_compact(graph)
    assert type(compact.backbone) is type(mixture.backbone)
    transfer_weights(mixture, compact)
    folded = fold(compact.eval())
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mixture(images)
        for network in (compact, folded):
            assert relative_difference(network(images), expected) < 1e-4
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not left, "every norm went into a convolution"


def test_other_weights_are_refused_by_naming() -> None:
    wanted = list(make_backbone("posenfs_mobilenet_v2").body.state_dict())
    wanted = [name for name in wanted if "num_batches" not in name]
    with pytest.raises(PosefabricError) as error:
        find_tensors(wanted, {"a.b": torch.zeros(1)}, own="the released code's", origin="x.pth")
    message = str(error.value)
    for naming in ("released code's", "timm's", "torchvision's"):
        assert naming in message
    assert "the first missing is features.0.0.weight" in message and "has a.b" in message
    state = torchvision_model("mobilenet_v2").state_dict()
    del state["features.5.conv.2.weight"]
    with pytest.raises(PosefabricError, match=r"1 of .* torchvision's names; the first is .*5\.c"):
        find_tensors(wanted, state, own="the released code's", origin="x.pth")


def test_the_namings_are_as_long_as_one_another() -> None:
    modules = mobilenet_v2_modules()
    assert len({len(names) for names in modules.values()}) == 1
    assert all(len(set(names)) == len(names) for names in modules.values())


@pytest.mark.parametrize("name", OWN_BACKBONES)
def test_the_hub_is_asked_for_timms_model(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    timm = import_timm()
    asked: list[str] = []

    def hub(model: str, *, pretrained: bool) -> None:
        asked.append(model)
        raise OSError("no hub here")

    monkeypatch.setattr(backbones, "_answers", lambda endpoint: True)
    monkeypatch.setattr(timm, "create_model", hub)
    with pytest.raises(PosefabricError, match=r"weights of .* could not be downloaded .*none"):
        build_backbone(name, weights="hub", levels=2)
    assert timm.is_model(asked[0]) and timm.get_pretrained_cfg(asked[0]).mean[0] == 0.485


@pytest.mark.parametrize("name", ["posenfs_resnet50", "posenfs_mobilenet_v2", "hrnet_w32_stage3"])
def test_a_frozen_stem_is_what_lies_before_stride_4(name: str) -> None:
    backbone = make_backbone(name, levels=2)
    backbone.freeze_to_stride_4()
    frozen = {n.split(".")[1] for n, p in backbone.named_parameters() if not p.requires_grad}
    learning = {n.split(".")[1] for n, p in backbone.named_parameters() if p.requires_grad}
    if name == "hrnet_w32_stage3":
        assert frozen == {"conv1", "bn1", "conv2", "bn2", "layer1"}
        assert not frozen & learning
    elif name == "posenfs_resnet50":
        assert (frozen, learning) == ({"conv1", "bn1", "layer1"}, {"layer2"})
    else:
        blocks = {n.split(".")[2] for n, p in backbone.named_parameters() if not p.requires_grad}
        assert blocks == {"0", "1", "2", "3"}
    backbone.train()
    resting = {n for n, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    resting = {n for n in resting if not backbone.get_submodule(n).training}
    assert resting == {
        n.rpartition(".")[0]
        for n, p in backbone.named_parameters()
        if not p.requires_grad and n.endswith("bias")
    }
