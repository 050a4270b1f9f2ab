"""What a training step allocates comes from what the step before it freed."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from pathlib import Path

import torch

from posefabric.native import compile_library
from posefabric.structures import PosefabricError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1
SOURCE = Path(__file__).with_name("memory.cpp")

_log = logging.getLogger(__name__)


def keep_freed_memory(device: torch.device) -> None:
    """Have this process keep what it frees, and, on a CPU, cut its maps from few large pieces.

    On Linux. By default glibc maps every large block anew, which the kernel clears each time, a
    tenth of a CPU step. Kept in its heap, blocks do not fit where one of their size was freed
    (``memory.cpp``): torch takes those of 64 KiB and more from extents instead, which needs a
    C++ compiler once, and warns where there is none.
    """
    if not sys.platform.startswith("linux"):
        return
    _keep_heap()
    if device.type != "cpu":
        return
    try:
        load_extents()
    except (PosefabricError, OSError) as error:
        _log.warning("maps stay in the C library's heap, which takes more memory: %s", error)


@functools.cache
def load_extents() -> ctypes.CDLL:
    """Torch's CPU allocator from now on: ``memory.cpp``, compiled the first time (seconds).

    ``live()`` of it says how many bytes are in use. Raises PosefabricError or OSError where it
    cannot be compiled, loaded or given room.
    """
    package = Path(torch.__file__).parent
    options = (
        "-O2",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{package / 'include'}",
        f"-L{package / 'lib'}",
        "-lc10",
    )
    path = compile_library(SOURCE, options, built_for=torch.__version__)
    library = ctypes.CDLL(str(path))
    library.live.restype = ctypes.c_size_t
    if not library.install():
        raise PosefabricError("the system reserves no range of twice its memory (ulimit -v?)")
    return library


def _keep_heap() -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER)
