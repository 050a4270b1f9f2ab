"""Losses of a network that leave no trace in it: with other weights, and of a part anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class PartProbe:
    """The loss on some batches as one part after another is changed; nothing of it moves.

    The pyramid and the maps of all parts are computed once, at the first call. A call then
    computes one part's map, as its next training step would, and takes the others as they were.
    The fabric of a fabric backbone, which all parts read, takes the whole network.

    Args:
        loss: of outputs (B, K, h, w), targets and weights (B, K); see ``train/loss.py``.
        autocast: makes the context that a training step's forward pass runs under.
    """

    def __init__(
        self,
        network: Any,
        batches: Sequence[PoseBatch],
        *,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        self.network = network
        self.batches = batches
        self.loss = loss
        self.autocast = autocast
        self._pyramids: list[list[Tensor]] = []
        self._maps: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def __call__(self, part: str | None = None) -> Tensor:
        """A scalar, the mean over the batches; ``part``: none, everything as it was."""
        if part is not None and part not in self.network.parts:
            pyramids = self._all_pyramids()
            maps = [self._all_maps(pyramid) for pyramid in pyramids]
            return self._mean_loss(maps)
        if not self._maps:
            self._pyramids = self._all_pyramids()
            self._maps = [self._all_maps(pyramid) for pyramid in self._pyramids]
        if part is None:
            return self._mean_loss(self._maps)
        new = [self._map(part, pyramid) for pyramid in self._pyramids]
        return self._mean_loss([{**a, part: b} for a, b in zip(self._maps, new, strict=True)])

    def _all_pyramids(self) -> list[list[Tensor]]:
        found = []
        for batch in self.batches:
            with self._untouched(self.network.backbone, batch.images.device):
                found.append(self.network.backbone(batch.images))
        return found

    def _all_maps(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        return {name: self._map(name, pyramid) for name in self.network.parts}

    def _map(self, name: str, pyramid: list[Tensor]) -> Tensor:
        with self._untouched(self.network.parts[name], pyramid[0].device):
            return self.network.part_maps(name, pyramid)

    def _mean_loss(self, maps: list[dict[str, Tensor]]) -> Tensor:
        losses = []
        for batch, own in zip(self.batches, maps, strict=True):
            outputs = self.network.join([own[part.name] for part in self.network.graph.parts])
            losses.append(self.loss(outputs.float(), batch.heatmaps, batch.weights))
        return torch.stack(losses).mean()

    @contextlib.contextmanager
    def _untouched(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        kept = [buffer.clone() for buffer in module.buffers()]
        try:
            with (
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                self.autocast(),
            ):
                yield
        finally:
            for buffer, value in zip(module.buffers(), kept, strict=True):
                buffer.copy_(value)


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
