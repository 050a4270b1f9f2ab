"""What is timed for a latency table: each piece of a search space, by itself, in a runtime."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from posefabric.deploy.export import open_bytes, require_export
from posefabric.models.backbones import make_backbone
from posefabric.space.cell import build_source
from posefabric.space.latency import Piece
from posefabric.space.operations import build_operation

Runtime = Literal["onnxruntime", "torch"]
REPEATED = 3  # of a piece, side by side, so that what a call costs is a small part


class SideBySide(nn.Module):
    """A map plus the outputs of so many copies of a piece, as cells add what they read."""

    def __init__(self, piece: Piece, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(_build(piece) for _ in range(count))

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        total = onto + 0.5
        for copy in self.copies:
            total = total + copy(x)
        return total


class Levels(nn.Module):
    """A backbone's levels, without what only makes modules of them."""

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self.backbone = make_backbone(piece.name, levels=piece.width_out)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images))


def piece_runs(piece: Piece, *, runtime: Runtime, threads: int) -> dict[str, Callable[[], float]]:
    """Functions that compute once and return milliseconds: ``with`` a piece, and ``without``.

    What the piece takes is their difference over ``REPEATED``; of a backbone it is ``with``.
    """
    height, width = piece.size
    x = torch.randn(1, piece.width_in, height, width, generator=torch.Generator().manual_seed(0))
    if piece.kind == "backbone":
        return {"with": make_run(Levels(piece), (x,), runtime=runtime, threads=threads)}
    with torch.no_grad():
        onto = torch.zeros_like(_build(piece).eval()(x))
    return {
        name: make_run(SideBySide(piece, count), (x, onto), runtime=runtime, threads=threads)
        for name, count in (("with", REPEATED), ("without", 0))
    }


def make_run(
    module: nn.Module, inputs: tuple[Tensor, ...], *, runtime: Runtime, threads: int
) -> Callable[[], float]:
    """A function that runs a module once in a runtime and returns the milliseconds.

    onnxruntime on the CPU with so many threads; torch in eager, channels_last, with the threads
    that are set when it is called. Raises PosefabricError when onnxruntime is not installed.
    """
    module = fused(module.eval())
    if runtime == "torch":
        return _torch_run(module, inputs)
    return _onnxruntime_run(module, inputs, threads)


def fused(module: nn.Module) -> nn.Module:
    """The module with each batch norm that follows a convolution in a sequence folded into it."""
    for sequence in [m for m in module.modules() if isinstance(m, nn.Sequential)]:
        layers = list(sequence)
        for place in range(len(layers) - 1):
            first, second = layers[place], layers[place + 1]
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                sequence[place] = fuse_conv_bn_eval(first, second)
                sequence[place + 1] = nn.Identity()
    return module


def _build(piece: Piece) -> nn.Module:
    if piece.kind == "operation":
        return build_operation(piece.name, piece.width_in)
    if piece.kind == "source":
        kind: Any = piece.name
        return build_source(kind, piece.width_in, piece.width_out)
    return nn.Conv2d(piece.width_in, piece.width_out, 1)


def _torch_run(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], float]:
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)

    def run() -> float:
        with torch.no_grad():
            start = time.perf_counter()
            module(*inputs)
            return (time.perf_counter() - start) * 1e3

    return run


def _onnxruntime_run(
    module: nn.Module, inputs: tuple[Tensor, ...], threads: int
) -> Callable[[], float]:
    require_export()
    # The older exporter takes a tenth of the newer one's time; only the clock reads this graph.
    file: Any = io.BytesIO()
    names = [f"input{place}" for place in range(len(inputs))]
    with warnings.catch_warnings(), _without_gradients(module):
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, file, input_names=names, opset_version=18, dynamo=False)
    session = open_bytes(file.getvalue(), threads=threads)
    # What nothing reads has left the graph.
    read = {entry.name for entry in session.get_inputs()}
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True) if name in read}

    def run() -> float:
        start = time.perf_counter()
        session.run(None, feeds)
        return (time.perf_counter() - start) * 1e3

    return run


@contextmanager
def _without_gradients(module: nn.Module):
    module.requires_grad_(False)
    with torch.no_grad():
        yield
