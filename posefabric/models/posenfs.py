"""Reads the checkpoints of the paper's released code (PoseNFS) into our faithful fabric."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from posefabric.models.posenfs_backbones import build_posenfs_backbone
from posefabric.models.posenfs_fabric import PosenfsNetwork, PosenfsPart
from posefabric.space.architecture import Head
from posefabric.space.fabric import FabricShape
from posefabric.structures import PosefabricError

# The released code's operations, by our names.
OPERATION_NAMES = {
    "Zero": "zero",
    "skip_connect": "skip",
    "Atr_Conv_3x3": "dil_conv_3x3",
    "Atr_Conv_5x5": "dil_conv_5x5",
    "Sep_Conv_3x3": "sep_conv_3x3",
    "Sep_Conv_5x5": "sep_conv_5x5",
    "avg_pool_3x3": "avg_pool_3x3",
    "max_pool_3x3": "max_pool_3x3",
    "Basic_Conv_3x3": "basic_conv_3x3",
    "Bottle_Conv_3x3": "bottle_conv_3x3",
    "conv_3x3": "conv_3x3",
}
NUM_KEYPOINTS = {"coco": 17, "mpii": 16}
SHOWN = 8


class CellConfig(BaseModel):
    """``cell_config`` of a released configuration; what does not shape the network is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    depth: int = Field(ge=2)
    cut_layers_num: int = Field(ge=1)
    factor: int = Field(ge=1)
    operators: tuple[str, ...] = Field(min_length=1)
    hidden_states_num: int = Field(default=1, ge=1)
    input_nodes_num: int = Field(default=1, ge=1)
    size_types: tuple[int, ...] = (4, 8, 16, 32)
    vector_in_pixel: bool = False
    vector_dim: int = Field(default=8, ge=1)
    convolution_mode: Literal["2D", "3D"] = "2D"
    one_shot_search: bool | None = Field(default=None, alias="one-shot-search")

    @model_validator(mode="after")
    def _check(self) -> CellConfig:
        unknown = [name for name in self.operators if name not in OPERATION_NAMES]
        if unknown:
            raise ValueError(f"operators {unknown}: expected some of {list(OPERATION_NAMES)}")
        if len(set(self.operators)) != len(self.operators):
            raise ValueError(f"operators {list(self.operators)}: each may be there once")
        if not self.cut_layers_num < self.depth:
            raise ValueError(f"cut_layers_num: expected 1 .. depth - 1 = {self.depth - 1}")
        first = self.size_types[0] if self.size_types else 0
        if self.size_types != tuple(first * 2**s for s in range(4)) or first * self.factor % 4:
            raise ValueError(
                f"size_types {list(self.size_types)}: expected [4, 8, 16, 32], or four others "
                f"that double and give widths divisible by 4"
            )
        return self

    @property
    def head_kind(self) -> Literal["heatmap", "vector", "vector3d"]:
        if not self.vector_in_pixel:
            return "heatmap"
        return "vector3d" if self.convolution_mode == "3D" else "vector"

    def shape(self) -> FabricShape:
        return FabricShape(
            depth=self.depth,
            first_layer=self.cut_layers_num,
            channel_factor=self.size_types[0] * self.factor // 4,
            hidden_nodes=self.hidden_states_num,
            operations=tuple(OPERATION_NAMES[name] for name in self.operators),
            faithful=True,
        )


class Specification(BaseModel):
    """What a state dict does not tell of itself."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    backbone: str
    dataset: Literal["coco", "mpii"]
    parts: dict[str, tuple[int, ...]] = Field(min_length=1)
    parts_num: int | None = None
    cell_config: CellConfig

    @model_validator(mode="after")
    def _check(self) -> Specification:
        if self.parts_num not in (None, len(self.parts)):
            raise ValueError(f"parts_num is {self.parts_num}, but parts has {len(self.parts)}")
        return self


def load_posenfs(spec: Mapping[str, Any], state: Mapping[str, Any]) -> PosenfsNetwork:
    """The released model that a specification and its state dict describe, in training mode.

    Images (B, 3, H, W) in, heatmaps (B, K, H/4, W/4) out, in the released code's keypoint
    order; ``.arch_parameters()`` maps "PART.alphas" and "PART.betas" to the parameters. The
    network has the state's precision: float64 if any tensor has it, else float32. Tensors that
    the released code never uses (each part's stem, MobileNetV2's last block, batch counters)
    may be there and are left out.

    Args:
        spec: ``backbone`` (resnet, mobilenet_v2, hrnet), ``dataset`` (coco, mpii), ``parts``
            (part name to its keypoints' indices), ``cell_config`` in the released code's terms.
        state: the released code's tensor names to tensors.

    Raises PosefabricError for a specification that does not describe such a network, and for
    tensors that are missing, unexpected or of the wrong shape, naming them.
    Source: PAPER section 1 ("code") and the reference page's table of blocks.
    """
    specification = _read_specification(spec)
    tensors = _read_state(state)
    network = _build(specification, tensors)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        network = network.double()
    wanted = network.released_tensors()
    unused = [name for name in tensors if name not in wanted]
    surplus = _surplus_pattern(specification, network)
    _complain(wanted, tensors, [name for name in unused if not surplus.match(name)])
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    return network


def _read_specification(spec: Mapping[str, Any]) -> Specification:
    try:
        return Specification.model_validate(dict(spec))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(piece) for piece in first["loc"]) or "as a whole"
        raise PosefabricError(f"specification: {where}: {first['msg']}") from error


def _read_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        try:
            tensors[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PosefabricError(
                f"state: {name} is a {type(value).__name__}, expected a tensor"
            ) from error
    # Checkpoints saved from DataParallel carry its prefix.
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _build(specification: Specification, tensors: Mapping[str, Tensor]) -> PosenfsNetwork:
    cells = specification.cell_config
    shape = cells.shape()
    backbone = build_posenfs_backbone(
        specification.backbone, tensors.keys(), levels=shape.pyramid_levels
    )
    head = Head(kind=cells.head_kind, dim=cells.vector_dim, scores="identity")
    differs = backbone.channels != shape.widths[: len(backbone.channels)]
    parts = [
        PosenfsPart(
            shape.graph(name, keypoints),
            shape=shape,
            channels=backbone.channels,
            adapted=differs or any(key.startswith(f"reduce.{index}.") for key in tensors),
            head=head,
            alpha_size=_alpha_size(cells, shape, tensors.get(f"{name}.alphas")),
        )
        for index, (name, keypoints) in enumerate(specification.parts.items())
    ]
    return PosenfsNetwork(
        backbone=backbone, parts=parts, num_keypoints=NUM_KEYPOINTS[specification.dataset]
    )


def _alpha_size(cells: CellConfig, shape: FabricShape, alphas: Tensor | None) -> tuple[int, ...]:
    """Cells only where each has its own alpha; rows as the state has them, at least the edges."""
    given = () if alphas is None else tuple(alphas.shape)
    one_shot = cells.one_shot_search if cells.one_shot_search is not None else len(given) != 3
    rows = len(shape.edges)
    if cells.input_nodes_num > 1:
        unfed = sum(cells.input_nodes_num + node for node in range(cells.hidden_states_num))
        rows = max(rows, given[-2] if len(given) > 1 else unfed)
    size = (rows, len(shape.operations))
    return size if one_shot else (len(shape.places), *size)


def _surplus_pattern(specification: Specification, network: PosenfsNetwork) -> re.Pattern[str]:
    """Matches names of tensors that the released code holds and never uses."""
    parts = "|".join(re.escape(name) for name in specification.parts)
    levels = range(len(network.backbone.channels), 4)
    patterns = [rf"({parts})\.stem\."]
    patterns += [rf"backbone\.{re.escape(prefix)}" for prefix in network.backbone.unused]
    patterns += [rf"reduce\.{i}\.{s}\." for i in range(len(network.parts)) for s in levels]
    cells = specification.cell_config
    if cells.input_nodes_num > 1:
        # Edges from the second input node come last, because nothing counts that node.
        used = len(cells.shape().edges)
        total = sum(cells.input_nodes_num + node for node in range(cells.hidden_states_num))
        edges = "|".join(str(edge) for edge in range(used, total))
        patterns.append(rf"({parts})\.cell_\d+_\d+\.cell_arch\.({edges})\.")
    return re.compile("|".join(patterns))


def _complain(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], unexpected: list[str]
) -> None:
    missing = [name for name in wanted if name not in given]
    misshaped = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of the wrong shape": misshaped}
    found = [_list(kind, names) for kind, names in kinds.items() if names]
    if found:
        raise PosefabricError(
            f"state: {'; '.join(found)}; give the state dict that belongs to this specification"
        )


def _list(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} tensors {kind}: {', '.join(names[:SHOWN])}{more}"
