"""The configurations that are measured, and the peers beside them at the same input size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posefabric.config import Config, load_config

# A step in the midst of a search: weights are random, alpha and beta learn, penalties count.
_ALWAYS = (
    "model.weights=none",
    "model.faithful=false",
    "data.workers=0",
    "search.strategy=synchronous",
    "search.epochs=1e9",
    "search.precision=auto",
    "search.checkpoint_every=1000000000",
    "search.evaluate_every=0",
    "search.architecture_start=0",
    "search.sparsity_start=0",
    "finetune.epochs=1e9",
    "finetune.precision=auto",
    "finetune.checkpoint_every=1000000000",
    "finetune.evaluate_every=0",
)
PEERS = {
    "simple_baseline_r50": ("model.network=simple_baseline", "model.backbone=resnet50"),
    "hrnet_w32": ("model.network=hrnet", "model.backbone=hrnet_w32"),
    "mobilenet_v2_deconv": ("model.network=simple_baseline", "model.backbone=mobilenetv2_100"),
}


@dataclass(frozen=True)
class Subject:
    """A network and an input size.

    Attributes:
        name: appears in the names of rows; sizes are height x width, as in the paper.
        base: a shipped configuration, or none for the defaults.
        overrides: options over it.
        batch, quick_batch: images a step, in a whole bench and in a quick one.
    """

    name: str
    base: str | None
    overrides: tuple[str, ...]
    batch: int
    quick_batch: int

    def config(self, *more: str) -> Config:
        """What a user of the package gets: its default options, random weights."""
        return load_config(self.base, self.words(*more))

    def words(self, *more: str) -> tuple[str, ...]:
        """The same as overrides of the base, for a command line."""
        return (*_ALWAYS, *self.overrides, *more)

    def peer(self, name: str, *more: str) -> Config:
        """The peer of that name, at this input size, with heatmaps and the same loss."""
        return self.config("model.head=heatmap", *PEERS[name], *more)

    def images(self, *, quick: bool) -> int:
        return self.quick_batch if quick else self.batch


SUBJECTS: tuple[Subject, ...] = (
    Subject(
        name="resnet50_cnf3_256x192",
        base="paper/coco_resnet50_cnf3",
        overrides=("data.input_wh=[192,256]",),
        batch=8,
        quick_batch=2,
    ),
    Subject(
        name="lite0_p5_128x128",
        base="coco_lite0_p5",
        overrides=("data.input_wh=[128,128]",),
        batch=16,
        quick_batch=4,
    ),
)
# What is shipped: the compact network of the demo's derivation, at the size of the 60-minute run.
SHIPPED = Subject(
    name="lite0_p3_128x128",
    base="coco_lite0_p5",
    overrides=(
        "data.input_wh=[128,128]",
        "model.parts=3",
        "derive.operations_kept=1",
        "derive.sources_kept=2",
    ),
    batch=8,
    quick_batch=8,
)


def named(subjects: Sequence[Subject]) -> dict[str, Subject]:
    return {subject.name: subject for subject in subjects}
