"""Loads the fast path's CPU kernels: ``kernels.cpp``, which needs nothing of torch."""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path

from posefabric.native import compile_library
from posefabric.structures import PosefabricError

SOURCE = Path(__file__).with_name("kernels.cpp")
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
OPTIONS = ("-O3", "-fopenmp", "-fno-math-errno", NATIVE)

_P, _I, _D = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_double
SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "depthwise": ([_P] * 3 + [_I] * 12, None),
    "depthwise_weight": ([_P] * 3 + [_I] * 11, None),
    "moments": ([_P, _I, _I, _I, _P], None),
    "norm_factors": ([_P, _P, _D, _I, _P, _P, _P, _P, _D, _D, _P], None),
    "mix": ([_I, _P, _P, _P, _P, _I, _I, _I, _P], None),
    "term_sums": ([_P] * 4 + [_I] * 3 + [_P, _P, _D, _P, _P, _P], _D),
    "term_input": ([_P] * 4 + [_I] * 3 + [_P, _D, _P, _D, _P], None),
}


@dataclass(frozen=True)
class Kernels:
    """The compiled functions, or why there are none."""

    library: ctypes.CDLL | None
    reason: str = ""


@functools.cache
def load_kernels() -> Kernels:
    """The kernels of this machine; compiles them the first time (seconds).

    The caller says ``reason`` to the user where there is no compiler.
    """
    try:
        path = compile_library(SOURCE, OPTIONS)
        return Kernels(_declare(ctypes.CDLL(str(path))))
    except (PosefabricError, OSError, AttributeError) as error:
        return Kernels(None, str(error))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (arguments, result) in SIGNATURES.items():
        for suffix in ("f32", "f64"):
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, result
    library.use_threads.argtypes, library.use_threads.restype = [_I], None
    library.threads.argtypes, library.threads.restype = [], _I
    return library
