"""What a training step of several processes does beyond a step of one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posefabric.distributed import (
    any_rank,
    broadcast,
    check_equal,
    place,
    sum_gradients,
    summed,
)
from posefabric.models.grouped import is_fast, plain_path
from posefabric.train.synchronised import synchronised_norms

_log = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var")


class Parallel:
    """The steps of all ranks as one: of the whole batch, whose shares they have.

    In one process everything here leaves the training as it is, to the last bit.

    Args:
        sync_norms: batch norms see the whole batch, which makes a step that of one process;
            otherwise each rank's share, and their running statistics are averaged.
        seed: of the global generator, which draws dropout alone.
    """

    def __init__(self, network: nn.Module, *, sync_norms: bool, seed: int) -> None:
        self.network = network
        self._parameters = list(network.parameters())
        self._is_fast = is_fast(network)
        self.launch = place()
        self.sync_norms = sync_norms
        self.seed = seed

    @property
    def many(self) -> bool:
        return self.launch.ranks > 1

    def start(self) -> None:
        """Every rank begins with rank 0's weights, alpha and beta, and computes as all do."""
        if self.many and any_rank(not self._is_fast) and self._is_fast:
            # Norms that are added up have to come in the same groups everywhere.
            _log.warning("another process has no compiled kernels: all go the plain path")
            plain_path(self.network)
            self._is_fast = False
        state = self.network.state_dict(keep_vars=True)
        broadcast(state.values())

    def check(self, step: int) -> None:
        """PosefabricError when the ranks' weights, alpha or beta have come apart, in any bit."""
        if self.many:
            state = self.network.state_dict()
            check_equal(f"the network at step {step}", state.values())

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step's forward and backward passes."""
        if not self.many:
            yield
            return
        # Of (seed, step, rank), so that a resume with other ranks has no states to share out.
        words = np.random.SeedSequence([self.seed, step, self.launch.rank]).generate_state(1)
        torch.manual_seed(int(words[0]))
        synchronised = synchronised_norms(kernels=self._is_fast)
        with synchronised if self.sync_norms else contextlib.nullcontext():
            yield

    def penalty(self, penalty: Tensor) -> Tensor:
        """This rank's share of what every rank computes alike; shares are added up."""
        return penalty / self.launch.ranks if self.many else penalty

    def gather(self, loss: Tensor) -> Tensor:
        """After the backward pass: the whole batch's gradients, in place, and its loss."""
        if not self.many:
            return loss.detach()
        sum_gradients(self._parameters)
        return summed([loss.detach()])[0]

    def average_statistics(self) -> None:
        """Of norms that are not synchronised; ranks then have the same network again."""
        if not self.many or self.sync_norms:
            return
        found: list[Any] = [b for n, b in self.network.named_buffers() if n.endswith(STATISTICS)]
        with torch.no_grad():
            for buffer, total in zip(found, summed(found), strict=True):
                buffer.copy_(total / self.launch.ranks)
