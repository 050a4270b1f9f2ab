"""Which precision a training runs in: what the options ask for and what the device can do."""

from __future__ import annotations

import logging
from typing import Literal

import torch

_log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """``auto`` is bf16 where the device computes in it, else fp32; others are as they are.

    Warns when bf16 was asked for by name and this CPU only emulates it.
    """
    if wanted == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if wanted == "bf16" and not has_bf16(device):
        _log.warning(
            "precision=bf16: this %s has no bf16 arithmetic and emulates it, ten times slower than "
            "fp32 and more; precision=auto chooses what is fast",
            device.type,
        )
    return "bf16" if wanted == "bf16" else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic: a recent GPU, AVX-512 BF16, AMX or Arm's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
