"""The frozen, serialisable graph of a network: JSON in, JSON out.

A mixture is the graph with every candidate kept, a compact network the graph with few.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posefabric.structures import PosefabricError

FORMAT_VERSION = 1
# Channels of the two convolutions before a fabric backbone.
STEM_WIDTH = 64

GraphType = TypeVar("GraphType", bound="Graph")

SourceKind = Literal["same", "finer", "coarser"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Choice(_Frozen):
    """One candidate operation of an edge, with the weight it is mixed by."""

    operation: str
    weight: float


class Edge(_Frozen):
    """The mixed operation from node ``start`` to node ``end`` (node 0 is the cell's input)."""

    start: int
    end: int
    choices: tuple[Choice, ...]


class Source(_Frozen):
    """One input of a cell: the cell (or pyramid level) of layer - 1 at scale ``scale``.

    ``kind`` says how it is brought to this cell's scale: ``same`` as it is, ``finer`` by a
    strided 3x3 convolution, ``coarser`` by a 1x1 convolution and bilinear x2 upsampling.
    ``slot`` (0 same, 1 finer, 2 coarser) is the place in beta; with border copies it can
    differ from ``kind``.
    """

    kind: SourceKind
    scale: int
    weight: float
    slot: int


class Cell(_Frozen):
    """A cell at layer ``layer`` and scale ``scale`` (stride 4 * 2**scale), ``width`` channels."""

    layer: int
    scale: int
    width: int
    sources: tuple[Source, ...]
    edges: tuple[Edge, ...]


class Part(_Frozen):
    """One part's fabric: the keypoints it predicts and its cells, in order of computation."""

    name: str
    keypoints: tuple[int, ...]
    cells: tuple[Cell, ...]


class Head(_Frozen):
    """How a part's representation becomes heatmaps.

    ``kind`` heatmap: one map a keypoint; vector: ``dim`` values a pixel, scored by length;
    vector3d: the same, by a convolution over a volume of ``dim`` slices.
    ``scores``: softmax (trained by cross-entropy) or identity (trained by mean squared error).
    ``peak``: the highest value of the normalised target Gaussian; a keypoint's score is its
    probability divided by this.
    """

    kind: Literal["heatmap", "vector", "vector3d"] = "heatmap"
    dim: int = 8
    scores: Literal["softmax", "identity"] = "softmax"
    peak: float = 1.0


class Backbone(_Frozen):
    """A feature pyramid: the channels at strides 4, 8, 16, 32, as far as any part uses them.

    ``fabric``: the cells of a fabric backbone, which is searched like a part but predicts no
    keypoints; its last layer is the pyramid.
    """

    name: str
    channels: tuple[int, ...]
    fabric: Part | None = None


class Graph(_Frozen):
    """A network's description on disk; the subclasses say of what."""

    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        tree = self.model_dump(mode="json")
        if tree["backbone"]["fabric"] is None:
            del tree["backbone"]["fabric"]
        return json.dumps(tree, indent=1) + "\n"

    @classmethod
    def from_json(cls: type[GraphType], text: str, *, origin: str = "architecture") -> GraphType:
        """Read a graph back; PosefabricError names ``origin`` and the first wrong field."""
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise PosefabricError(f"{origin}: not an architecture: no JSON: {error}") from error
        # Before the fields, which another version may have renamed.
        version = tree.get("format_version", FORMAT_VERSION) if isinstance(tree, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise PosefabricError(
                f"{origin}: format version {version}, this posefabric reads {FORMAT_VERSION}; "
                f"export it again with the version that wrote it"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(piece) for piece in first["loc"])
            raise PosefabricError(
                f"{origin}: not an architecture: {where}: {first['msg']}"
            ) from error

    @classmethod
    def load(cls: type[GraphType], path: Path | str) -> GraphType:
        return cls.from_json(read_graph_text(Path(path)), origin=str(path))

    def digest(self) -> str:
        """Sixteen hexadecimal digits that name this graph, weights included."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


class Architecture(Graph):
    """The whole network as an explicit graph.

    ``channel_order`` is that of the images it was trained on.
    """

    skeleton: str
    keypoint_names: tuple[str, ...]
    input_wh: tuple[int, int]
    channel_order: Literal["rgb", "bgr"] = "rgb"
    backbone: Backbone
    first_layer: int
    faithful: bool = False
    head: Head = Field(default_factory=Head)
    parts: tuple[Part, ...]

    @property
    def fabrics(self) -> tuple[Part, ...]:
        """Everything that has cells: a fabric backbone, if it is one, then the parts."""
        own = self.backbone.fabric
        return self.parts if own is None else (own, *self.parts)

    def with_fabrics(self, fabrics: Mapping[str, Part]) -> Architecture:
        """A copy whose fabrics are those of that name."""
        backbone, own = self.backbone, self.backbone.fabric
        if own is not None:
            backbone = backbone.model_copy(update={"fabric": fabrics[own.name]})
        parts = tuple(fabrics[part.name] for part in self.parts)
        return self.model_copy(update={"backbone": backbone, "parts": parts})

    def diff(self, other: Architecture) -> list[str]:
        """What another graph has lost (-), won (+) or changed (~), one line each."""
        mine, theirs = _flatten(self), _flatten(other)
        lines = [f"- {key}" for key in mine if key not in theirs]
        lines += [f"+ {key}" for key in theirs if key not in mine]
        lines += [
            f"~ {key}: {mine[key]} -> {theirs[key]}"
            for key in mine
            if key in theirs and mine[key] != theirs[key]
        ]
        return lines


def read_graph_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PosefabricError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise PosefabricError(f"{path}: not an architecture: no UTF-8 text") from error


def _flatten(architecture: Architecture) -> dict[str, str]:
    backbone, head = architecture.backbone, architecture.head
    flat = {
        "skeleton": f"{architecture.skeleton} {', '.join(architecture.keypoint_names)}",
        "input_wh": str(architecture.input_wh),
        "channel_order": architecture.channel_order,
        "backbone": f"{backbone.name} {backbone.channels}",
        "first_layer": str(architecture.first_layer),
        "faithful": str(architecture.faithful),
        "head": f"{head.kind}, dim {head.dim}, {head.scores}, peak {head.peak:.4f}",
    }
    for part in architecture.fabrics:
        flat[f"{part.name}: keypoints"] = str(part.keypoints)
        for cell in part.cells:
            place = f"{part.name} layer {cell.layer} scale {cell.scale}"
            flat[place] = f"{cell.width} channels"
            for source in cell.sources:
                key = f"{place} from {source.kind} (slot {source.slot})"
                flat[key] = f"{source.weight:.4f}"
            for edge in cell.edges:
                for choice in edge.choices:
                    key = f"{place} edge {edge.start}-{edge.end} {choice.operation}"
                    flat[key] = f"{choice.weight:.4f}"
    return flat
