"""The machine that a bench ran on, as its JSON describes it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from posefabric.run.environment import describe_environment

RUNTIMES = ("onnxruntime", "openvino", "faster-coco-eval", "pycocotools")
# Beginnings of the flags that decide how fast a convolution can be.
INSTRUCTIONS = ("avx", "fma", "f16c", "sse4", "amx", "asimd", "sve", "bf16", "i8mm")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, threads, instruction sets, memory, GPU, versions, load and date.

    JSON values only. ``cores`` are those this process may use, ``load`` the system's one-minute
    average: above the number of cores, others computed beside the bench.
    """
    environment = describe_environment()
    packages = dict(environment.pop("packages"))
    for name in RUNTIMES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    load = None
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
    return {
        **environment,
        "cores": usable_cores(),
        "cores_in_machine": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": instruction_sets(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": gpu_name() or "cpu",
        "packages": packages,
        "load": load,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def usable_cores() -> int:
    """Cores that this process may run on, at least one."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def gpu_name() -> str | None:
    """The first GPU that torch sees, by its name."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def instruction_sets(lines: Iterable[str] | None = None) -> list[str]:
    """Vector and matrix instruction sets of the first CPU, as Linux names them, sorted.

    ``lines``: of /proc/cpuinfo; none: read it, and an empty list where there is none.
    """
    if lines is None:
        lines = []
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return sorted({flag for flag in value.split() if flag.startswith(INSTRUCTIONS)})
    return []
