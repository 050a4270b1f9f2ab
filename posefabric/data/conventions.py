"""What each preset means, rule by rule; any rule can be chosen apart (CONVENTIONS)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from posefabric.structures import PosefabricError

Preset = Literal["hrnet", "udp", "posenfs"]
PRESETS: tuple[Preset, ...] = ("hrnet", "udp", "posenfs")
BOX_PADDING = 1.25


@dataclass(frozen=True)
class Conventions:
    """The decisions between a box in a picture and a keypoint in it.

    Attributes:
        grow_boxes: where ground-truth boxes are grown to cover their keypoints + 5 px:
            ``never``, in ``train`` alone, or ``everywhere`` (which leaks labels).
        warp: the box's region spans W x H input pixels about (W/2, H/2), ``biased``, or
            W - 1 x H - 1 about ((W - 1)/2, (H - 1)/2), ``unbiased``.
        stride: input pixels a heatmap pixel: W / w, ``biased``, or (W - 1) / (w - 1).
        target: the Gaussian stands on the ``nearest`` cell, between cells (``subpixel``), or is
            a pixel sent through a Gaussian filter and scaled to peak 1 (``filtered``).
        smooth: heatmap pixels, sigma of a Gaussian blur (zeros outside) of a map before its
            maximum is looked for; the score is the map's own maximum.
        decode: ``quarter`` pixel, ``dark`` or ``udp-dark``.
        decode_offset: input pixels added to decoded coordinates.
        missing_coordinate: both coordinates where a map's maximum is 0 or less.
        flip_shift: the flip test moves the maps of the mirror image one pixel to the right.
        nms_area: OKS-NMS takes the area of the padded ``crop`` or of the ``box``.
        box_padding: factor on the box's sides.
        outside_weight: weight of an annotated keypoint outside the map; its target is empty.
    """

    grow_boxes: Literal["never", "train", "everywhere"] = "never"
    warp: Literal["biased", "unbiased"] = "biased"
    stride: Literal["biased", "unbiased"] = "biased"
    target: Literal["nearest", "subpixel", "filtered"] = "nearest"
    smooth: float = 0.0
    decode: Literal["quarter", "dark", "udp-dark"] = "quarter"
    decode_offset: float = 0.0
    missing_coordinate: float = 0.0
    flip_shift: bool = True
    nms_area: Literal["crop", "box"] = "crop"
    box_padding: float = BOX_PADDING
    outside_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (
            ("grow_boxes", ("never", "train", "everywhere")),
            ("warp", ("biased", "unbiased")),
            ("stride", ("biased", "unbiased")),
            ("target", ("nearest", "subpixel", "filtered")),
            ("decode", ("quarter", "dark", "udp-dark")),
            ("nms_area", ("crop", "box")),
        ):
            if getattr(self, name) not in known:
                raise PosefabricError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)}"
                )
        if not 0 <= self.smooth <= 8:
            raise PosefabricError(f"smooth: expected a sigma of 0 to 8, got {self.smooth}")
        if not self.box_padding > 0:
            raise PosefabricError(f"box_padding: expected a factor above 0, got {self.box_padding}")

    def differing(self, preset: Preset) -> dict[str, Any]:
        """The rules that are not the preset's, by name."""
        usual = asdict(CONVENTIONS[preset])
        return {name: value for name, value in asdict(self).items() if value != usual[name]}


CONVENTIONS: dict[Preset, Conventions] = {
    "hrnet": Conventions(),
    "udp": Conventions(
        warp="unbiased",
        stride="unbiased",
        target="subpixel",
        decode="dark",
        missing_coordinate=-1.0,
        flip_shift=False,
    ),
    "posenfs": Conventions(
        grow_boxes="train",
        target="filtered",
        decode_offset=0.5,
        flip_shift=False,
        nms_area="box",
    ),
}


def choose_conventions(preset: Preset, **given: Any) -> Conventions:
    """The preset's rules, but for those given; None is as the preset has it.

    Raises PosefabricError for an unknown preset or value.
    """
    if preset not in CONVENTIONS:
        raise PosefabricError(f"preset: expected one of {', '.join(PRESETS)}, got {preset}")
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(CONVENTIONS[preset], **chosen)
