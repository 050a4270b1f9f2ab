"""Loads and calls the fast path's CPU kernels: ``kernels.cpp``, which needs nothing of torch."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posefabric.native import compile_library
from posefabric.structures import PosefabricError

SOURCE = Path(__file__).with_name("kernels.cpp")
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
OPTIONS = ("-O3", "-fopenmp", "-fno-math-errno", NATIVE)

_P, _I, _D = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_double
_B = ctypes.c_char_p  # packed structures
SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "depthwise": ([_P, _P, _I] + [_P] * 3 + [_I] * 12, None),
    "depthwise_weight": ([_P, _P, _I] + [_P] * 2 + [_I] * 11, None),
    "weighted_sum": ([_I, _B, _I, _I, _I, _P, _P, _I, _P], _D),
    "weighted_sum_back": ([_I, _B, _I, _I, _P, _P, _P, _P, _D, _P, _P], _I),
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
        for suffix in SUFFIX.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, result
    tiles: Any = library
    tiles.pointwise_bf16.argtypes, tiles.pointwise_bf16.restype = [_P] * 5 + [_I] * 4, None
    tiles.pointwise_weight_bf16.argtypes = [_P] * 3 + [_I] * 3
    tiles.pointwise_weight_bf16.restype = None
    tiles.has_tiles.argtypes, tiles.has_tiles.restype = [], _I
    library.use_threads.argtypes, library.use_threads.restype = [_I], None
    library.threads.argtypes, library.threads.restype = [], _I
    return library


@functools.cache
def has_tiles() -> bool:
    """Whether the kernels multiply matrices in bfloat16 on the processor's tiles (AMX)."""
    library = load_kernels().library
    return library is not None and bool(library.has_tiles())


def kernel(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """To be called at once: it runs on as many threads as torch has now."""
    library: Any = load_kernels().library
    library.use_threads(torch.get_num_threads())
    return getattr(library, f"{name}_{SUFFIX[dtype]}")


def computed_in(maps: torch.dtype) -> torch.dtype:
    """What a kernel computes in, and its weights and statistics are, for maps of this kind."""
    return torch.float32 if maps == torch.bfloat16 else maps


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows_of(x: Tensor) -> tuple[int, int]:
    """Pixels of the batch, and channels."""
    return x.numel() // x.shape[1], x.shape[1]


def channels_last(x: Tensor) -> Tensor:
    """Channels last in memory, without gaps."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A map of another shape (B, C, H, W), channels last, of the same type."""
    size = torch.Size(shape)
    return torch.empty(size, dtype=like.dtype, memory_format=torch.channels_last)
