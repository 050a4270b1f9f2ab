"""The whole HRNet (Sun et al., 2019) as a backbone of one level, its finest resolution."""

from __future__ import annotations

import re

from torch import Tensor, nn

from posefabric.data.batch import Normalisation
from posefabric.models.backbones import load_backbone_weights
from posefabric.models.posenfs_backbones import HighResolutionModule, HRNet
from posefabric.models.pyramid import PyramidBackbone
from posefabric.structures import PosefabricError

_STAGE_4_MODULES = 3


class WholeHRNet(HRNet):
    """Stem to stage 4; the last module computes the finest resolution alone.

    The tensors have the names of the HRNet family's own checkpoints, and of timm's.
    """

    def __init__(self, width: int = 32) -> None:
        widths = tuple(width * 2**level for level in range(4))
        super().__init__(levels=4, widths=widths)
        self.stage4 = nn.Sequential(
            *(HighResolutionModule(widths) for _ in range(_STAGE_4_MODULES - 1)),
            HighResolutionModule(widths, outputs=1),
        )
        self.channels = (width,)
        self.unused = ("final_layer.",)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.stage4(self.pyramid(images))


class HRNetBackbone(PyramidBackbone):
    """Images (B, 3, H, W) to a list of the one map (B, width, H/4, W/4)."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        found = re.fullmatch(r"hrnet_w([1-9]\d*)", name)
        if found is None:
            raise PosefabricError(
                f"model.network=hrnet is a whole network, with model.backbone={name}: expected "
                f"hrnet_w32, or another width (hrnet_w18, hrnet_w48, ...)"
            )
        self.body = WholeHRNet(int(found[1]))
        self.channels = self.body.channels
        self.naming, self.hub_name = "the HRNet family's", name
        self.stem_names = self.body.stem
        # The family's ImageNet weights, timm's among them, were trained with these.
        self.normalisation = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def build_hrnet(name: str, *, weights: str) -> HRNetBackbone:
    """``hrnet_w32`` or another width; ``weights``: hub, none, or a local file of the family.

    Raises PosefabricError when the name is no HRNet's or the weights cannot be had.
    """
    backbone = HRNetBackbone(name)
    load_backbone_weights(backbone, weights=weights)
    return backbone
