"""Keeps freed memory in the process between steps."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_freed_memory() -> bool:
    """Tell glibc not to give large blocks back to the system; True where it listened.

    A training step allocates the same large tensors as the one before. By default each is
    mapped and cleared by the kernel anew, which costs about a tenth of a CPU step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
