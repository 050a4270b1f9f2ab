"""Which precision a training runs in: what the options ask for and what the device can do."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from posefabric.structures import PosefabricError

_log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of the loss in fp16, whose smallest number is 6e-8; it halves whenever a gradient overflows.
FIRST_SCALE = 2.0**13


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """``auto`` is bf16 where the device computes in it, else fp32; others are as they are.

    Warns when bf16 was asked for by name and this CPU only emulates it. Raises PosefabricError
    for fp16 without a GPU.
    """
    if wanted == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if wanted == "bf16" and not has_bf16(device):
        _log.warning(
            "precision=bf16: this %s has no bf16 arithmetic and emulates it, ten times slower than "
            "fp32 and more; precision=auto chooses what is fast",
            device.type,
        )
    if wanted == "fp16" and device.type != "cuda":
        raise PosefabricError(
            f"precision=fp16: needs a GPU, this run's device is {device.type}; use precision=fp32, "
            f"or auto, which is bf16 where the device computes in it"
        )
    if wanted == "fp16":
        return "fp16"
    return "bf16" if wanted == "bf16" else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """What the forward pass runs under."""
    dtype = AUTOCAST.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def make_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Scales the loss in fp16, so that small gradients are not zero; else it does nothing."""
    return torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=precision == "fp16")


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic: a recent GPU, AVX-512 BF16, AMX or Arm's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
