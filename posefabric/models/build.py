"""Networks from configurations and from run folders."""

from __future__ import annotations

import torch

from posefabric.config import Config, check_trainable
from posefabric.data.pipeline import make_codec
from posefabric.models.backbones import build_backbone
from posefabric.models.baselines import BASELINES, LEVELS, BaselineNetwork
from posefabric.models.compact import build_compact
from posefabric.models.fabric_backbone import (
    FABRIC_BACKBONES,
    build_fabric_backbone,
    fabric_backbone_shape,
)
from posefabric.models.hrnet import build_hrnet
from posefabric.models.network import PoseNetwork
from posefabric.models.pyramid import PyramidBackbone
from posefabric.models.supernet import Supernet
from posefabric.models.weights import load_weights
from posefabric.run import RunFolder
from posefabric.skeletons import load_skeleton
from posefabric.space.architecture import Backbone, Head
from posefabric.space.baseline import Baseline, Branch, load_graph
from posefabric.space.fabric import FabricShape
from posefabric.space.parts import choose_parts
from posefabric.structures import PosefabricError

# Strategies that are a way of relaxing choices; others follow search.relaxation.
OWN_RELAXATION = {"gumbel": "gumbel", "gates": "gates"}


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
    """The head for the loss of the network's first training."""
    first = config.search if config.model.network == "fabric" else config.finetune
    cross_entropy = first.loss == "cross_entropy"
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
    check_trainable(config, "search")
    skeleton = load_skeleton(config.data.skeleton)
    torch.manual_seed(config.seed)
    shape = make_shape(config)
    weights = config.model.weights if pretrained else "none"
    name, levels = config.model.backbone, shape.pyramid_levels
    backbone: PyramidBackbone
    own_shape = None
    if name in FABRIC_BACKBONES:
        _check_fabric_backbone(config)
        own_shape = fabric_backbone_shape(
            name, operations=shape.operations, faithful=shape.faithful, levels=levels
        )
        backbone = build_fabric_backbone(name, own_shape)
    else:
        backbone = build_backbone(name, weights=weights, levels=levels)
    network = Supernet(
        shape=shape,
        parts=choose_parts(skeleton, config.model.parts, seed=config.seed),
        backbone=backbone,
        skeleton=config.data.skeleton,
        keypoint_names=skeleton.keypoints,
        input_wh=config.data.input_wh,
        head=make_head(config),
        relaxation=OWN_RELAXATION.get(config.search.strategy, config.search.relaxation),
        shared_alpha=config.model.shared_alpha,
        backbone_shape=own_shape,
        channel_order=config.data.channel_order,
    )
    if config.model.frozen_stem:
        backbone.freeze_to_stride_4()
    return network


def _check_fabric_backbone(config: Config) -> None:
    model = config.model
    if model.weights != "none":
        raise PosefabricError(
            f"model.weights={model.weights}: a fabric backbone ({model.backbone}) has no ImageNet "
            f"weights, it learns from the start; set model.weights=none"
        )
    if model.frozen_stem:
        raise PosefabricError(
            f"model.frozen_stem=true: the stem of {model.backbone} has learned nothing yet; set "
            f"model.frozen_stem=false"
        )
    if model.network != "fabric":
        raise PosefabricError(
            f"model.backbone={model.backbone}: is searched, which model.network={model.network} "
            f"is not; choose a backbone of fixed architecture"
        )


def build_baseline(config: Config, *, pretrained: bool = True) -> BaselineNetwork:
    """The baseline ``model.network`` of a configuration; weights follow ``config.seed``.

    Raises PosefabricError for a fabric, and for a backbone or weights that do not fit.
    """
    check_trainable(config, "train")
    model = config.model
    assert model.network != "fabric"
    if model.backbone in FABRIC_BACKBONES and model.network != "hrnet":
        _check_fabric_backbone(config)
    skeleton = load_skeleton(config.data.skeleton)
    torch.manual_seed(config.seed)
    backbone = _baseline_backbone(
        model.network, model.backbone, weights=model.weights if pretrained else "none"
    )
    parts = {"all": tuple(range(skeleton.num_keypoints))}
    if model.network == "branchnet":
        parts = choose_parts(skeleton, model.parts, seed=config.seed)
    widths = {
        "branchnet": model.branch_width,
        "simple_baseline": model.deconv_width,
        "hrnet": backbone.channels[0],
    }
    graph = Baseline(
        network=model.network,
        skeleton=config.data.skeleton,
        keypoint_names=skeleton.keypoints,
        input_wh=config.data.input_wh,
        channel_order=config.data.channel_order,
        backbone=Backbone(name=backbone.name, channels=backbone.channels),
        width=widths[model.network],
        blocks=model.branch_blocks if model.network == "branchnet" else 0,
        head=make_head(config),
        parts=tuple(Branch(name=name, keypoints=keypoints) for name, keypoints in parts.items()),
    )
    network = BASELINES[model.network](graph=graph, backbone=backbone)
    if model.frozen_stem:
        backbone.freeze_to_stride_4()
    return network


def _baseline_backbone(network: str, name: str, *, weights: str) -> PyramidBackbone:
    if network == "hrnet":
        return build_hrnet(name, weights=weights)
    return build_backbone(name, weights=weights, levels=LEVELS[network])


def load_network(run: RunFolder) -> PoseNetwork:
    """The trained network of a finished run: a mixture for a search, else a compact one or a
    baseline, as its architecture.json says.
    """
    if not run.weights_path.is_file():
        raise PosefabricError(
            f"{run.path}: has no {run.weights_path.name} (state: {run.state}); let it finish with "
            f"--resume first"
        )
    network: PoseNetwork
    if run.kind == "search":
        network = build_supernet(run.config, pretrained=False)
    else:
        graph = load_graph(run.architecture_path)
        if isinstance(graph, Baseline):
            backbone = _baseline_backbone(graph.network, graph.backbone.name, weights="none")
            network = BASELINES[graph.network](graph=graph, backbone=backbone)
        else:
            network = build_compact(graph)
    load_weights(run.weights_path, network)
    return network.eval()
