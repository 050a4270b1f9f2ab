"""The options of networks and of what is done with them: types, defaults, bounds, descriptions."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
)

from posefabric.budget import Budget
from posefabric.section import Section, checked_input_wh


class ModelConfig(Section):
    """The supernet: one backbone and one fabric for each part (PAPER: cell-based neural fabric).

    Or a baseline, which `posefabric train` trains with the options of ``finetune``.
    """

    network: Literal["fabric", "branchnet", "simple_baseline", "hrnet"] = Field(
        default="fabric", description="what is searched, or a baseline that is only trained"
    )
    backbone: str = "tf_efficientnet_lite0"
    weights: str = Field(
        default="embedded", description="embedded, hub, none, or a local weights file"
    )
    parts: int | str | dict[str, tuple[str, ...]] = Field(
        default=3,
        description="P, a grouping of the skeleton file; `random:P`, a random partition by `seed` "
        "(`random`: 3 parts); `learned:K` or `learned`, from the training persons; or part to "
        "keypoint names",
    )
    channel_factor: int = Field(default=8, ge=1, description="C: a node has 4 C 2**scale channels")
    depth: int = Field(default=6, ge=1)
    first_layer: int = Field(default=3, ge=0)
    hidden_nodes: int = Field(default=1, ge=1, le=4)
    operations: tuple[str, ...] = ("zero", "skip", "sep_conv_3x3", "dil_conv_3x3")
    shared_alpha: bool = True
    faithful: bool = False
    path: Literal["fast", "plain", "compiled"] = Field(
        default="fast",
        description="how a training step is computed: on the package's CPU kernels, module by "
        "module, or its cells by torch.compile; equal up to rounding",
    )
    frozen_stem: bool = Field(
        default=False, description="freeze the backbone up to stride 4: a third less time a step"
    )
    head: Literal["heatmap", "vector", "vector3d"] = "heatmap"
    vector_dim: int = Field(default=8, ge=1)
    branch_width: int = Field(default=400, ge=4, description="channels of a Branchnet branch")
    branch_blocks: int = Field(default=8, ge=0, description="residual blocks of a branch")
    deconv_width: int = Field(
        default=256, ge=1, description="channels of SimpleBaseline's deconvolutions"
    )

    @field_validator("parts")
    @classmethod
    def _grouping_or_random(cls, value: Any) -> Any:
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if isinstance(value, str) and not re.fullmatch(r"(random|learned)(:[1-9]\d*)?", value):
            raise ValueError(
                "expected a number of parts, random or learned, or one with a number of parts such "
                "as random:5 or learned:4"
            )
        return value


class OptimConfig(Section):
    """One training phase."""

    epochs: float = Field(
        default=3.0, gt=0, description="passes over the training persons; may be a fraction"
    )
    batch_size: int = Field(default=32, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    backbone_factor: float = Field(
        default=1.0, ge=0, description="learning rate of the backbone, relative"
    )
    head_factor: float | None = Field(
        default=None,
        gt=0,
        description="and of the heads' last convolutions; none: 10 for a heatmap's logits, else 1",
    )
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["one_cycle", "steps", "constant"] = "one_cycle"
    milestones: tuple[float, ...] = Field(
        default=(0.45, 0.6, 0.75), description="fractions, for steps"
    )
    decay: float = Field(default=0.25, gt=0, le=1, description="factor at a milestone")
    warmup: float = Field(
        default=0.15, ge=0, lt=1, description="rising share of a one-cycle or a constant schedule"
    )
    clip_norm: float = Field(default=5.0, gt=0)
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the averaged weights; 0: none"
    )
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="auto: bf16 where the device computes in it, else fp32; fp16 needs a GPU",
    )
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    evaluate_every: float = Field(
        default=0.0, ge=0, description="epochs between validations; 0: at the end"
    )
    max_bad_steps: int = Field(
        default=10, ge=0, description="skipped non-finite steps before stopping"
    )
    small_input_wh: tuple[int, int] | None = Field(
        default=None,
        description="progressive resizing: the input of the first steps, at most data.input_wh; "
        "none: data.input_wh throughout",
    )
    small_input_until: float = Field(
        default=0.6, ge=0, le=1, description="share of the steps with small_input_wh"
    )

    @field_validator("small_input_wh")
    @classmethod
    def _multiple_of_32(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        return value if value is None else checked_input_wh(value)


class SearchConfig(OptimConfig):
    """The supernet's training, in which alpha and beta are learned."""

    strategy: Literal[
        "uniform",
        "random",
        "synchronous",
        "first_order",
        "second_order",
        "gumbel",
        "gates",
        "beta_decay",
        "partial_channels",
        "perturbation",
        "shrinking",
    ] = "shrinking"
    relaxation: Literal["softmax", "sparsemax"] = Field(
        default="softmax", description="not of gumbel and gates, which have their own"
    )
    beta_decay_weight: float = Field(
        default=25.0, ge=0, description="beta_decay: final weight of the logits' log-sum-exp"
    )
    partial_share: float = Field(
        default=0.25, gt=0, le=1, description="partial_channels: of a cell's channels, a step"
    )
    partial_until: float = Field(
        default=0.5, ge=0, le=1, description="partial_channels: share of the search that is partial"
    )
    operations_left: int | None = Field(
        default=None,
        ge=1,
        description="perturbation, shrinking: operations an edge ends with; none: 1, or what the "
        "budget of a shrinking search leaves",
    )
    sources_left: int | None = Field(
        default=None,
        ge=1,
        le=3,
        description="perturbation, shrinking: sources a cell ends with; none: 2, or what the "
        "budget of a shrinking search leaves",
    )
    worth: Literal["loss", "probability"] = Field(
        default="loss",
        description="shrinking: an option is worth what the loss rises by without it, or its "
        "probability",
    )
    worth_persons: int = Field(
        default=64,
        ge=1,
        description="shrinking, worth=loss: persons that it is measured on, up to whole batches",
    )
    rounds: int = Field(
        default=3, ge=1, description="shrinking, worth=loss: how often options are closed"
    )
    decided_by: float = Field(
        default=0.8,
        gt=0,
        le=0.95,
        description="perturbation, shrinking: share of the search at which all is decided; the "
        "rest trains what is left",
    )
    temperature_end: float = Field(
        default=1.0, gt=0, le=1, description="logits are divided by it at the end"
    )
    architecture_learning_rate: float = Field(default=1e-2, gt=0)
    architecture_start: float = Field(
        default=0.0, ge=0, lt=1, description="share of the search before alpha and beta move"
    )
    architecture_weight_decay: float = Field(
        default=1e-3, ge=0, description="first and second order: L2, within their Adam"
    )
    architecture_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="first and second order: share of the training persons that alpha and beta "
        "learn from, the weights from the others",
    )
    unrolled_rate: float | None = Field(
        default=None, ge=0, description="second order: xi; none: the weights' present rates"
    )
    sparsity: float = Field(default=0.0, ge=0, description="final weight of undecided operations")
    source_sparsity: float = Field(
        default=0.0, ge=0, description="final weight of undecided sources"
    )
    sparsity_start: float = Field(
        default=0.3, ge=0, lt=1, description="share of the search before it rises"
    )
    budget: str | None = Field(
        default=None,
        description="of the compact network, such as macs=0.3G, params=2M or latency=8ms; the "
        "search is pressed towards it, derivation ends inside it",
    )
    latency_table: str | None = Field(
        default=None,
        description="a file of `posefabric latency`; none: a latency budget measures its own first",
    )
    latency_runtime: Literal["onnxruntime", "torch"] = Field(
        default="onnxruntime", description="what latency means: this runtime, one picture, the CPU"
    )
    latency_threads: int = Field(default=1, ge=1, description="and so many threads")
    budget_weight: float = Field(
        default=5.0, ge=0, description="final weight of the expected cost's share above budget"
    )

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        return value if value is None else str(Budget.parse(value))


class DeriveConfig(Section):
    """From a mixture to a compact network."""

    threshold: float = Field(
        default=0.0, ge=0, lt=1, description="drop choices below this; 0: lossless"
    )
    operations_kept: int | None = Field(
        default=None, ge=1, description="most candidates an edge keeps"
    )
    sources_kept: int | None = Field(
        default=None, ge=1, le=3, description="most sources a cell keeps"
    )
    budget: str | None = Field(
        default=None, description="macs=0.3G, params=2M or latency=8ms; none: search.budget"
    )
    inherit: bool = Field(
        default=True,
        description="start from the mixture's weights; false: from new ones, on the backbone's "
        "of before the search",
    )
    gap_persons: int = Field(
        default=100,
        ge=0,
        description="validation persons that each step's loss of accuracy is measured on; 0: none",
    )
    finetune: bool = False

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        return value if value is None else str(Budget.parse(value))


class EvaluationConfig(Section):
    """How predictions are made final and measured."""

    flip_test: bool = Field(default=True, description="average with the mirrored input")
    rescore_threshold: float | None = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="a person's score is its box's times the mean of the keypoint scores above "
        "it; none: the box's alone",
    )
    nms_threshold: float | None = Field(
        default=0.9, gt=0, le=1, description="OKS above which the worse person goes; none: no NMS"
    )
    nms_area: Literal["crop", "box"] | None = Field(
        default=None, description="OKS-NMS by the padded crop's area or the box's; none: by preset"
    )
    pck_threshold: float | None = Field(
        default=None, gt=0, description="of PCK; none: 0.2 torsos, or 0.05 of the box's side"
    )
    pckh_threshold: float = Field(
        default=0.5, gt=0, description="of MPII's PCKh, in head sizes (0.6 head-box diagonals)"
    )
    legacy_pckh: bool = Field(
        default=True, description="also what much code calls PCKh@0.1, which is 0.11, by its name"
    )
