"""Imports timm where torchvision's C++ operators cannot load.

The torchvision wheel fails to import next to a CPU-only torch because its operators are not
registered; timm needs only its Python part. Declaring the two operator schemas cures it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

_kept: list[Any] = []


def import_timm() -> ModuleType:
    """The timm module; after it, torchvision imports too (without ``nms`` and ``decode_jpeg``)."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        _kept.append(library)
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
    return importlib.import_module("timm")
