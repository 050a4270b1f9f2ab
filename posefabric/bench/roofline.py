"""What the machine can do at best: a 3x3 and a depthwise convolution, and copying memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from posefabric.bench.fresh import Gate, answer_turns
from posefabric.bench.timing import Clock

# (batch, channels, height, width): the shapes in use, from the finest scale to the coarsest.
SHAPES = ((8, 64, 64, 48), (8, 128, 32, 24), (8, 256, 16, 12))
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
COPY_BYTES = 2**27


def roofline(gate: Gate, *, device: str, seconds: float) -> None:
    """At a turn: the measured peaks, each the best of all its tries.

    ``conv_3x3`` and ``depthwise_3x3``: {"gflops", "shape", "layout"}, forward in fp32, a
    multiply-add counted as two; ``copy``: {"gbytes"} a second, read and written both counted.
    """
    place = torch.device(device)

    def measured() -> dict[str, Any]:
        return {
            "conv_3x3": best_convolution(depthwise=False, device=place, seconds=seconds),
            "depthwise_3x3": best_convolution(depthwise=True, device=place, seconds=seconds),
            "copy": {"gbytes": copy_speed(place, seconds=seconds)},
        }

    answer_turns(gate, measured)


def best_convolution(
    *,
    depthwise: bool,
    device: torch.device,
    seconds: float,
    shapes: tuple[tuple[int, int, int, int], ...] = SHAPES,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """The fastest of the shapes and layouts; ``seconds`` are for all of them together."""
    best: dict[str, Any] = {"gflops": 0.0}
    share = seconds / (len(shapes) * len(LAYOUTS))
    for shape in shapes:
        channels = shape[1]
        weight = torch.randn(channels, 1 if depthwise else channels, 3, 3, device=device)
        flops = 2 * shape[0] * shape[2] * shape[3] * weight.numel()
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
            w = weight.contiguous(memory_format=memory_format)
            groups = channels if depthwise else 1

            def work(x=x, w=w, groups=groups) -> None:
                functional.conv2d(x, w, padding=1, groups=groups)

            with torch.no_grad():
                took = fastest(work, device=device, seconds=share, clock=clock)
            if flops / took / 1e9 > best["gflops"]:
                best = {"gflops": flops / took / 1e9, "shape": list(shape), "layout": layout}
    return best


def copy_speed(
    device: torch.device,
    *,
    seconds: float,
    size: int = COPY_BYTES,
    clock: Clock = time.perf_counter,
) -> float:
    """Gigabytes read and written a second while a tensor larger than any cache is copied."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    took = fastest(lambda: target.copy_(source), device=device, seconds=seconds, clock=clock)
    return 2 * size / took / 1e9


def fastest(
    work: Callable[[], object], *, device: torch.device, seconds: float, clock: Clock
) -> float:
    """The least seconds that ``work`` took, over about ``seconds`` and at least three tries."""
    work()
    least, tries, began = float("inf"), 0, clock()
    while tries < 3 or clock() - began < seconds:
        _wait(device)
        started = clock()
        work()
        _wait(device)
        least = min(least, clock() - started)
        tries += 1
    return least


class ConvolutionCounter(TorchDispatchMode):
    """Counts the convolutions' floating-point operations, a multiply-add as two.

    ``dense`` and ``depthwise`` are of what runs inside the context, forward and backward. Only
    convolutions are counted: they are nearly all that there is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dense = 0
        self.depthwise = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten.convolution.default, aten._convolution.default):
            x, weight, transposed, groups = args[0], args[1], args[6], args[8]
            self._add(weight, (x if transposed else result), groups, 1)
        elif func is aten.convolution_backward.default:
            gradient, x, weight, transposed, groups = args[0], args[1], args[2], args[7], args[9]
            self._add(weight, (x if transposed else gradient), groups, sum(args[10][:2]))
        return result

    def _add(self, weight: Any, map_: Any, groups: int, times: int) -> None:
        # Every value of the smaller-strided side meets one filter of the weight.
        positions = map_.numel() // map_.shape[1]
        flops = 2 * weight.numel() * positions * times
        if groups > 1 and weight.shape[1] == 1:
            self.depthwise += flops
        else:
            self.dense += flops


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
