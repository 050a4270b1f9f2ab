"""Losses of a network that leave no trace in it: with other weights, and in full precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from posefabric.structures import PoseBatch


class Probe:
    """A network's loss on a batch, as in its next training step; nothing of it moves.

    Batch norms write into copies of their statistics, and every call begins with the random
    state as it was, so that two calls differ by what they are given and not by their dropout.

    Args:
        loss: of outputs (B, K, h, w), targets and weights (B, K); see ``train/loss.py``.
        half: compute under bf16 autocast, unless asked to be exact.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        half: bool = False,
    ) -> None:
        self.network = network
        self.loss = loss
        self.half = half

    def __call__(
        self, batch: PoseBatch, weights: Mapping[str, Tensor] | None = None, *, exact: bool = False
    ) -> Tensor:
        """A scalar; ``weights`` stand in for the parameters they are named as."""
        state = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        state.update(weights or {})
        device = batch.images.device
        half = self.half and not exact
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            outputs = torch.func.functional_call(self.network, state, (batch.images,))
        return self.loss(outputs.float() if half else outputs, batch.heatmaps, batch.weights)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32, whose 10 bits would round small differences of weights away on a GPU."""
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    kept = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = kept
