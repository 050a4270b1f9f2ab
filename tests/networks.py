"""Networks with random weights and random statistics, for tests that compare outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from posefabric import cli
from posefabric.models.backbones import make_backbone
from posefabric.models.compact import CompactNetwork
from posefabric.models.fabric_backbone import POOLS, build_fabric_backbone
from posefabric.models.network import FabricNetwork
from posefabric.models.supernet import Supernet
from posefabric.space.architecture import Architecture, Head
from posefabric.space.fabric import BackboneShape, FabricShape
from posefabric.space.operations import OPERATIONS
from posefabric.structures import PoseBatch

PLAIN = ("zero", "skip", "sep_conv_3x3", "dil_conv_3x3")
EVERY = tuple(OPERATIONS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Seeded and normal, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def shake(network: nn.Module, seed: int) -> None:
    """Give every weight and statistic a value that a wrong copy or fold would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point() or name == "temperature":
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * torch.tanh(noise))
            elif name.startswith(("alphas", "betas")):
                tensor.copy_(noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.1 * noise)


def make_supernet(
    *,
    seed: int = 0,
    operations: tuple[str, ...] = PLAIN,
    hidden_nodes: int = 1,
    faithful: bool = False,
    relaxation: str = "softmax",
    head: str = "heatmap",
    shared_alpha: bool = True,
    parts: dict[str, tuple[int, ...]] | None = None,
    channel_factor: int = 2,
    first_layer: int = 3,
    backbone: str = "test_efficientnet",
) -> Supernet:
    """A small supernet of four keypoints, one of them shared by two parts."""
    torch.manual_seed(seed)
    shape = FabricShape(
        depth=6,
        first_layer=first_layer,
        channel_factor=channel_factor,
        hidden_nodes=hidden_nodes,
        operations=operations,
        faithful=faithful,
    )
    network = Supernet(
        shape=shape,
        parts=parts or {"upper": (0, 2), "lower": (1, 2, 3)},
        backbone=make_backbone(backbone, levels=shape.pyramid_levels),
        skeleton="four",
        keypoint_names=("a", "b", "c", "d"),
        input_wh=(64, 64),
        head=Head(kind=head, scores="softmax", peak=0.1),  # type: ignore[arg-type]
        relaxation=relaxation,
        shared_alpha=shared_alpha,
    )
    shake(network, seed)
    return network.eval()


def make_fabric_supernet(
    *,
    seed: int = 0,
    first_layer: int = 3,
    faithful: bool = False,
    relaxation: str = "softmax",
    parts: dict[str, tuple[int, ...]] | None = None,
) -> Supernet:
    """A small mixture on a small fabric backbone, with shaken weights, alpha and beta."""
    torch.manual_seed(seed)
    shape = FabricShape(6, first_layer, 2, 1, PLAIN, faithful)
    levels = shape.pyramid_levels
    own = BackboneShape(3, 0, 1, 2, (*PLAIN, *POOLS), faithful, levels=levels)
    network = Supernet(
        shape=shape,
        parts=parts or {"upper": (0, 2), "lower": (1, 2, 3)},
        backbone=build_fabric_backbone("fabric_1", own),
        skeleton="four",
        keypoint_names=("a", "b", "c", "d"),
        input_wh=(64, 64),
        head=Head(peak=0.1),
        relaxation=relaxation,
        backbone_shape=own,
    )
    shake(network, seed)
    return network.eval()


def pose_batches(
    network: FabricNetwork, count: int, *, persons: int = 2, dtype: torch.dtype = torch.float32
) -> list[PoseBatch]:
    """Different batches of noise, every keypoint annotated; the same at each call."""
    generator = torch.Generator().manual_seed(3)
    joints = len(network.graph.keypoint_names)
    return [
        PoseBatch(
            images=torch.randn(persons, 3, 64, 64, generator=generator).to(dtype),
            heatmaps=torch.rand(persons, joints, 16, 16, generator=generator).to(dtype),
            weights=torch.ones(persons, joints).to(dtype),
            input_to_image=torch.eye(2, 3).expand(persons, 2, 3),
            index=torch.arange(persons),
        )
        for _ in range(count)
    ]


def make_compact(graph: Architecture) -> CompactNetwork:
    levels = len(graph.backbone.channels)
    return CompactNetwork(graph=graph, backbone=make_backbone(graph.backbone.name, levels=levels))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the console script in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["posefabric", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    return int(stop.value.code or 0)
