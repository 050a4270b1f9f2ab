"""What every backbone is to the rest: a pyramid, its widths, its normalisation, a frozen stem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posefabric.data.batch import Normalisation


class PyramidBackbone(nn.Module):
    """A network cut to its pyramid.

    ``channels`` are those of the ``levels`` first strides of 4, 8, 16, 32. Input (B, 3, H, W),
    output a list of (B, c, H/4, W/4), (B, c, H/8, W/8), ... ``naming`` says whose names the
    tensors of ``body`` have, ``hub_name`` which of timm's models has its weights; a backbone
    that only learns here has none of the three. ``stem_names``: the modules of ``body`` up to
    stride 4, where these are not all that the first level depends on.
    """

    body: Any
    channels: tuple[int, ...]
    normalisation: Normalisation
    naming: str
    hub_name: str
    stem_names: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._frozen: list[nn.Module] = []

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.body(images)

    def freeze_to_stride_4(self) -> None:
        """Freeze the layers up to the first level: their weights and their batch norms.

        They hold the least of the parameters, the most of the pixels and what ImageNet
        teaches best; without their backward pass a step is a third faster.
        """
        for module in self._first_layers():
            self._frozen.append(module)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self.train(self.training)

    def _first_layers(self) -> list[nn.Module]:
        """The modules that the first level depends on, or those of ``stem_names``."""
        if self.stem_names:
            # HRNet's first level comes last: its stem is what lies before the branches.
            named = self.body.named_modules()
            return [module for name, module in named if name.split(".")[0] in self.stem_names]
        self.zero_grad()
        training = self.training
        self.eval()
        with torch.enable_grad():
            self(torch.zeros(1, 3, 64, 64))[0].sum().backward()
        found = [
            module
            for module in self.body.modules()
            if any(p.grad is not None for p in module.parameters(recurse=False))
        ]
        self.zero_grad()
        self.train(training)
        return found

    def train(self, mode: bool = True) -> PyramidBackbone:
        super().train(mode)
        for module in self._frozen:
            module.train(False)
        return self
