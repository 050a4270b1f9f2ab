"""Turns a released checkpoint and its YAML into a finished search run."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posefabric.config import Config, config_from_tree, with_overrides
from posefabric.models.build import build_supernet
from posefabric.models.posenfs import Specification, load_posenfs
from posefabric.models.posenfs_backbones import RESNET_BLOCKS, ResNet
from posefabric.models.posenfs_fabric import PosenfsNetwork, PosenfsPart
from posefabric.models.posenfs_parts import KEYPOINTS
from posefabric.models.posenfs_yaml import ReleasedConfig, read_released_config
from posefabric.models.state_files import read_state
from posefabric.models.supernet import Supernet
from posefabric.models.weights import save_weights
from posefabric.run import RunFolder
from posefabric.structures import PosefabricError

# What the checkpoint decides; another value would not fit it.
FIXED = ("model.", "data.skeleton", "data.channel_order", "search.loss", "search.relaxation")
LARGEST_DIFFERENCE = 1e-9


def import_posenfs(
    checkpoint: Path, config: Path, out: Path, *, overrides: Sequence[str] = ()
) -> tuple[RunFolder, dict[str, Any]]:
    """Write a run of kind ``search`` that computes what the checkpoint computes.

    The network is our faithful mixture with the checkpoint's weights, alpha and beta, its
    keypoints in our skeleton's order. Before anything is written it is compared with
    :func:`load_posenfs` on seeded noise, in float64. The run keeps float32.

    Args:
        checkpoint: a ``torch.save`` file; no pickled code is run.
        config: the released code's YAML.
        overrides: of posefabric's options, such as ``data.root=DIR``.

    Returns the run and the record kept in its ``import.json``. Raises PosefabricError when
    either file is not understood, the two do not belong together, or an override would change
    the network.
    """
    changed = [text for text in overrides if text.startswith(FIXED)]
    if changed:
        raise PosefabricError(
            f"{', '.join(changed)}: comes from the checkpoint and its YAML; leave it out"
        )
    released = read_released_config(config)
    state = read_state(checkpoint, option="checkpoint")
    try:
        source = load_posenfs(released.spec, state).double().eval()
    except PosefabricError as error:
        raise PosefabricError(f"{checkpoint} with {config}: {error}") from error
    options = _options(released, source, name=checkpoint.name.split(".")[0])
    settings = with_overrides(config_from_tree(options, origin=str(config)), overrides)
    network = build_supernet(settings, pretrained=False).double().eval()
    copy_released(source, network)
    used = source.released_tensors()
    record = {
        "checkpoint": str(checkpoint),
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "config": str(config),
        "specification": released.spec,
        "tensors": len(used),
        "unused_tensors": sum(
            name not in used and not name.endswith("num_batches_tracked") for name in state
        ),
        "difference": _difference(source, network, released.spec["dataset"], settings),
        "notes": released.notes,
    }
    network = network.float()
    run = RunFolder.create(out, config=settings, kind="search")
    save_weights(run.weights_path, network)
    run.write_text(run.architecture_path.name, network.architecture().to_json())
    run.write_json("import.json", record)
    run.set_state("finished", imported=str(checkpoint))
    return run, record


def _options(released: ReleasedConfig, source: PosenfsNetwork, *, name: str) -> dict[str, Any]:
    """The whole configuration: the YAML's options and the shape of its cells."""
    cells = Specification.model_validate(released.spec).cell_config
    shape = cells.shape()
    options: dict[str, Any] = {**copy.deepcopy(released.options), "name": name}
    if isinstance(source.backbone, ResNet):
        # The YAML may leave the number of layers out; the checkpoint has it.
        options["model"]["backbone"] = _resnet_name(source.backbone)
    options["model"] |= {
        "channel_factor": shape.channel_factor,
        "depth": shape.depth,
        "first_layer": shape.first_layer,
        "hidden_nodes": shape.hidden_nodes,
        "operations": list(shape.operations),
        "head": cells.head_kind,
        "vector_dim": cells.vector_dim,
        "shared_alpha": all(part.alphas.ndim == 2 for part in released_parts_of(source)),
    }
    return options


def _resnet_name(backbone: ResNet) -> str:
    levels = len(backbone.channels)
    for layers, blocks in RESNET_BLOCKS.items():
        if backbone.blocks[:levels] == blocks[:levels]:
            return f"posenfs_resnet{layers}"
    raise PosefabricError(
        f"the checkpoint's ResNet has {list(backbone.blocks)} blocks, expected those of ResNet-"
        f"{', '.join(map(str, RESNET_BLOCKS))}"
    )


def released_parts_of(network: PosenfsNetwork) -> list[PosenfsPart]:
    parts = list(network.parts)
    return [part for part in parts if isinstance(part, PosenfsPart)]


@torch.no_grad()
def copy_released(source: PosenfsNetwork, target: Supernet) -> None:
    """Copy every weight, statistic, alpha and beta into the mixture of the same shape.

    Rows of alpha that belong to an unused second input node stay behind.
    """
    target.backbone.body.load_state_dict(source.backbone.state_dict())
    for part in released_parts_of(source):
        name = part.graph.name
        edges = len(target.shape.edges)
        target.alphas[name].copy_(part.alphas[..., :edges, :])
        target.betas[name].copy_(part.betas)
        for piece in ("fabric", "head"):
            module = target.get_submodule(f"parts.{name}.{piece}")
            module.load_state_dict(part.get_submodule(piece).state_dict())
        for scale in part.scales:
            own = target.get_submodule(f"parts.{name}.reduce.{scale}")
            if isinstance(own, nn.Sequential) != (str(scale) in part.reduce):
                raise PosefabricError(
                    f"reduce.{name}.{scale}: the checkpoint and the widths of this backbone and "
                    f"fabric differ in whether a 1x1 convolution adapts this level"
                )
            if isinstance(own, nn.Sequential):
                own[0].load_state_dict(part.reduce[str(scale)].state_dict())


@torch.no_grad()
def _difference(source: PosenfsNetwork, target: Supernet, dataset: str, settings: Config) -> float:
    """The largest difference of heatmaps over the largest value, keypoints matched by name."""
    width, height = (min(side, 128) for side in settings.data.input_wh)
    noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    order = [KEYPOINTS[dataset].index(name) for name in target.graph.keypoint_names]
    expected = source(noise.double())[:, order]
    found = target(noise.double())
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        raise PosefabricError(
            f"the imported network differs from the checkpoint by {difference:.1e} of the largest "
            f"value, expected at most {LARGEST_DIFFERENCE:.0e}; the run was not written"
        )
    return difference
