"""The contract between the training loop and what searches an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from posefabric.structures import PoseBatch


class LossOf(Protocol):
    """A network's loss on a batch, with tensors in the place of the weights they are named as.

    ``exact`` computes in fp32 where the training does not. Leaves no trace in the network.
    """

    def __call__(
        self, batch: PoseBatch, weights: Mapping[str, Tensor] | None = None, *, exact: bool = False
    ) -> Tensor: ...


class LossOfParts(Protocol):
    """The loss on some batches, one of the network's fabrics computed anew.

    That fabric as alpha and beta stand at the call, the rest as it was before the first one.
    Leaves no trace in the network.
    """

    def __call__(self, part: str | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Evidence:
    """What an architecture step may look at.

    Attributes:
        train: the batch of the weights' step that follows.
        held_out: a batch of persons from whom the weights never learn.
        rates: the weights by name, with the learning rate of the step that follows.
        loss_of: the loss on a batch; differentiable by alpha, beta and the weights. With several
            processes it is this rank's share, and what is made of it (gradients, the loss that is
            told) has to be added up by ``posefabric.distributed.summed``.
    """

    train: PoseBatch
    held_out: PoseBatch
    rates: Mapping[str, float]
    loss_of: LossOf


class Strategy:
    """How alpha and beta move while a network trains; this one lets them rest.

    Plain training uses it as it is, searches override what they need. alpha and beta move in
    one of two ways: with the weights (``parameter_groups``), or by steps of their own on
    persons held out for them (the three methods from ``held_out_share`` on).
    """

    name = "none"

    def prepare(self, network: Any, generator: torch.Generator) -> None:
        """Once before the first step: set, draw or freeze alpha and beta."""

    def parameter_groups(self, network: Any) -> list[dict[str, object]]:
        """Groups of architecture parameters for the weights' optimiser; none if they rest."""
        return []

    def schedule(self, network: Any, progress: float) -> None:
        """Before each step: set temperatures and the like from ``progress`` in 0..1."""

    def penalty(self, network: Any, progress: float) -> Tensor | None:
        """A scalar added to the loss that moves alpha and beta, or nothing."""
        return None

    def readings(self, network: Any) -> dict[str, float]:
        """What to show and log of the architecture: its entropies."""
        return {}

    def batches_wanted(self, network: Any, progress: float) -> int:
        """How many of the coming steps' batches :meth:`decide` is to look at before this one."""
        return 0

    def decide(
        self, network: Any, batches: Sequence[PoseBatch], loss_of: LossOfParts, progress: float
    ) -> dict[str, Any]:
        """Before a step that wants batches, after ``schedule``: close options; what to log of it.

        With several processes losses are this rank's share, as :class:`Evidence` says.
        """
        raise NotImplementedError

    def held_out_share(self) -> float:
        """The share of the training persons that is kept from the weights; 0: none."""
        return 0.0

    def architecture_optimiser(self, network: Any) -> torch.optim.Optimizer | None:
        """What moves alpha and beta on held-out persons; wanted when their share is above 0."""
        return None

    def architecture_gradients(
        self, network: Any, evidence: Evidence, progress: float
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Before each step of the weights: the held-out loss, and its gradients.

        Gradients are in the order of ``network.arch_parameters()``, which require grad during
        the call only; nothing of the network may move but alpha and beta, where a strategy sets
        them itself. None: no step for their optimiser.
        """
        return None
