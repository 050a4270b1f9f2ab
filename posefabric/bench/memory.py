"""How much memory a process takes: resident, at its peak, and its own alone."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    """What this process holds in memory now (Linux; elsewhere its peak so far)."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def peak_bytes() -> int:
    """The most this process ever held in memory."""
    found = _status("VmHWM")
    if found is not None:
        return found
    # Kilobytes, but bytes on a Mac.
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def private_bytes(pid: int) -> int | None:
    """What only that process holds, shared and file-backed pages left out; None: not told."""
    with contextlib.suppress(OSError):
        total = 0
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1]) * 1024
        return total
    return None


class Growth:
    """The peak above what there was when this was made; on a GPU, of what torch allocated."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = resident_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return max(0, peak_bytes() - self.start)


def _status(key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None
