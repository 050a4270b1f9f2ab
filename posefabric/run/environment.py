"""The machine and the versions a result was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import posefabric

PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless")


def describe_environment() -> dict[str, Any]:
    """What a result depends on besides the configuration, and the hardware it names."""
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    cpu, memory = platform.processor(), None
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "posefabric": posefabric.__version__,
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "memory_bytes": memory,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of posefabric's own checkout; None when it is installed from elsewhere."""
    package = Path(posefabric.__file__).resolve().parent
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    top, _, commit = answer.stdout.strip().partition("\n")
    return commit if Path(top).resolve() == package.parent else None
