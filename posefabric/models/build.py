"""Networks from configurations and from run folders."""

from __future__ import annotations

import torch

from posefabric.config import Config
from posefabric.data.pipeline import make_codec
from posefabric.models.backbones import build_backbone
from posefabric.models.compact import CompactNetwork, build_compact
from posefabric.models.supernet import Supernet
from posefabric.models.weights import load_weights
from posefabric.run import RunFolder
from posefabric.skeletons import load_skeleton
from posefabric.space.architecture import Architecture, Head
from posefabric.space.fabric import FabricShape
from posefabric.space.parts import choose_parts
from posefabric.structures import PosefabricError


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU. Raises PosefabricError for an absent device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PosefabricError(f"device={name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PosefabricError(f"device={name}: this torch sees no GPU; use device=cpu")
    return device


def make_shape(config: Config) -> FabricShape:
    model = config.model
    return FabricShape(
        depth=model.depth,
        first_layer=model.first_layer,
        channel_factor=model.channel_factor,
        hidden_nodes=model.hidden_nodes,
        operations=model.operations,
        faithful=model.faithful,
    )


def make_head(config: Config) -> Head:
    cross_entropy = config.search.loss == "cross_entropy"
    return Head(
        kind=config.model.head,
        dim=config.model.vector_dim,
        scores="softmax" if cross_entropy else "identity",
        peak=make_codec(config.data).target_peak if cross_entropy else 1.0,
    )


def build_supernet(config: Config, *, pretrained: bool = True) -> Supernet:
    """The mixture of a configuration; weights follow ``config.seed``.

    ``pretrained=False`` leaves the backbone's weights random, for those about to be loaded.
    """
    skeleton = load_skeleton(config.data.skeleton)
    torch.manual_seed(config.seed)
    shape = make_shape(config)
    backbone = build_backbone(
        config.model.backbone,
        weights=config.model.weights if pretrained else "none",
        levels=shape.pyramid_levels,
    )
    network = Supernet(
        shape=shape,
        parts=choose_parts(skeleton, config.model.parts, seed=config.seed),
        backbone=backbone,
        skeleton=config.data.skeleton,
        keypoint_names=skeleton.keypoints,
        input_wh=config.data.input_wh,
        head=make_head(config),
        relaxation=config.search.relaxation,
        shared_alpha=config.model.shared_alpha,
        channel_order=config.data.channel_order,
    )
    if config.model.frozen_stem:
        backbone.freeze_to_stride_4()
    return network


def load_network(run: RunFolder) -> Supernet | CompactNetwork:
    """The trained network of a finished run: a mixture for a search, else a compact one."""
    if not run.weights_path.is_file():
        raise PosefabricError(
            f"{run.path}: has no {run.weights_path.name} (state: {run.state}); let it finish with "
            f"--resume first"
        )
    network: Supernet | CompactNetwork
    if run.kind == "search":
        network = build_supernet(run.config, pretrained=False)
    else:
        network = build_compact(Architecture.load(run.architecture_path))
    load_weights(run.weights_path, network)
    return network.eval()
