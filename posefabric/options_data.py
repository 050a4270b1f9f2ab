"""The options of the data: what is read, cropped, encoded and augmented, and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from posefabric.section import Section, checked_input_wh


class DataConfig(Section):
    """Which persons, and how a person becomes an input.

    File names are relative to ``root``, which comes from the command line.
    """

    format: Literal["coco", "mpii", "synthetic", "shards"] = "coco"
    root: str | None = None
    skeleton: str = "coco17"
    train_annotations: str = "annotations/train.json"
    train_images: str = "train"
    val_annotations: str = "annotations/val.json"
    val_images: str = "val"
    test_annotations: str | None = None
    test_images: str = "test"
    boxes: str | None = Field(
        default=None, description="detections JSON for evaluation; none: ground truth"
    )
    box_score_threshold: float = Field(default=0.0, ge=0, le=1)
    headboxes: str | None = Field(
        default=None, description="head boxes (.npz or .mat) of the validation file, for PCKh"
    )
    on_bad_image: Literal["error", "skip"] = "error"
    synthetic_train: int = Field(default=2000, ge=1)
    synthetic_val: int = Field(default=300, ge=1)
    synthetic_seed: int = 0
    synthetic_turn: float = Field(
        default=180.0, ge=0, le=180, description="degrees from facing the viewer; 180: any way up"
    )
    input_wh: tuple[int, int] = (128, 128)
    preset: Literal["hrnet", "udp", "posenfs"] = "hrnet"
    channel_order: Literal["rgb", "bgr"] = Field(
        default="rgb", description="of what the network sees; bgr only for released checkpoints"
    )
    sigma: float | None = Field(
        default=None, gt=0, description="heatmap pixels; none: by input height"
    )
    grow_boxes: Literal["never", "train", "everywhere"] | None = Field(
        default=None,
        description="where ground-truth boxes grow to cover their keypoints + 5 px (everywhere "
        "leaks labels into evaluation); none: by preset",
    )
    box_padding: float = Field(default=1.25, gt=0, le=4, description="factor on a box's sides")
    warp: Literal["biased", "unbiased"] | None = Field(
        default=None, description="box to input: W pixels or W - 1; none: by preset"
    )
    stride: Literal["biased", "unbiased"] | None = Field(
        default=None, description="input to heatmap: W / w or (W - 1) / (w - 1); none: by preset"
    )
    target: Literal["nearest", "subpixel", "filtered"] | None = Field(
        default=None,
        description="Gaussian on the nearest cell, between cells, or a filtered pixel; none: by "
        "preset",
    )
    outside_weight: float = Field(
        default=0.0, ge=0, description="of annotated keypoints outside the map (loss=mse only)"
    )
    smooth: float | None = Field(
        default=None,
        ge=0,
        le=8,
        description="heatmap pixels, sigma of a blur before a map's maximum is looked for; none: "
        "by preset",
    )
    decode: Literal["quarter", "dark", "udp-dark"] | None = Field(
        default=None, description="sub-pixel refinement; none: by preset"
    )
    decode_offset: float | None = Field(
        default=None, description="input pixels added when decoding; none: by preset"
    )
    missing_coordinate: float | None = Field(
        default=None, description="x and y where a map's maximum is 0 or less; none: by preset"
    )
    flip_shift: bool | None = Field(
        default=None, description="flip test moves mirrored maps by one pixel; none: by preset"
    )
    workers: int = Field(default=1, ge=0)
    cache: bool | Literal["memory", "device", "off"] = Field(
        default=True,
        description="where decoded uint8 crops stay after the first epoch: memory (true), the "
        "device (nothing is moved to it any more), or off (false)",
    )
    shard_window: int = Field(
        default=16, ge=1, description="format=shards: shards whose persons are mixed at a time"
    )

    @field_validator("input_wh")
    @classmethod
    def _multiple_of_32(cls, value: tuple[int, int]) -> tuple[int, int]:
        return checked_input_wh(value)


class AugmentConfig(Section):
    """Augmentation ranges; the transforms are drawn anew for every person and epoch."""

    preset: Literal["plain", "coco", "mpii", "posenfs"] = Field(
        default="plain",
        description="fills what is not given: the ranges of the HRNet family for a data set, of "
        "the released code, or the defaults here",
    )
    scale: float = Field(
        default=0.3, ge=0, lt=1, description="zoom factor in 1 - scale .. 1 + scale"
    )
    rotation: float = Field(
        default=45.0, ge=0, le=180, description="degrees, clipped normal: sigma, cut at 2x"
    )
    rotation_probability: float = Field(default=0.6, ge=0, le=1)
    flip: float = Field(default=0.5, ge=0, le=1)
    half_body: float = Field(default=0.0, ge=0, le=1)
    translate: float = Field(default=0.0, ge=0, le=0.5, description="shift, fraction of the box")
    colour: float = Field(
        default=0.2, ge=0, le=1, description="brightness, contrast and channel gain"
    )
    erase: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how often a rectangle of the input is covered, 2 to 20 % of its area",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {**AUGMENTATIONS.get(str(tree.get("preset")), {}), **tree}


# CONVENTIONS: augmentation. None of them changes colours.
AUGMENTATIONS: dict[str, dict[str, float]] = {
    "coco": {"scale": 0.35, "rotation": 45.0, "half_body": 0.3, "colour": 0.0},
    "mpii": {"scale": 0.25, "rotation": 30.0, "half_body": 0.0, "colour": 0.0},
    "posenfs": {"scale": 0.3, "rotation": 45.0, "half_body": 0.0, "colour": 0.0},
}
