"""Steps of alpha and beta on held-out persons: guarded and resumed exactly, like the weights'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posefabric.config import OptimConfig
from posefabric.data.pipeline import TrainingData
from posefabric.distributed import first_told
from posefabric.models.network import first_non_finite
from posefabric.run import RunFolder
from posefabric.structures import CropBatch, PoseBatch, PosefabricError
from posefabric.train.loss import make_loss
from posefabric.train.precision import resolve_precision
from posefabric.train.probe import Probe
from posefabric.train.strategy import Evidence, Strategy


@dataclass
class ArchitectureTrainer:
    """Moves alpha and beta by an optimiser of their own.

    Attributes:
        data: the held-out persons; step s of the search sees its batch s.
        probe: the loss, without a trace.
        max_bad_steps: skipped non-finite steps in a row before it gives up.
    """

    network: Any
    data: TrainingData
    optimiser: torch.optim.Optimizer
    probe: Probe
    run: RunFolder
    max_bad_steps: int
    skipped_steps: int = 0
    bad_in_a_row: int = 0

    @classmethod
    def make(
        cls,
        network: Any,
        strategy: Strategy,
        data: TrainingData | None,
        *,
        optim: OptimConfig,
        run: RunFolder,
    ) -> ArchitectureTrainer | None:
        """None for a strategy without steps of its own, which then holds no data out."""
        optimiser = strategy.architecture_optimiser(network)
        if (optimiser is None) != (data is None):
            raise PosefabricError(
                f"strategy {strategy.name}: held-out persons and an optimiser of the architecture "
                f"come together; pass `held_out` exactly when held_out_share() is above 0"
            )
        if optimiser is None or data is None:
            return None
        half = resolve_precision(optim.precision, data.device) == "bf16"
        probe = Probe(network, loss=make_loss(optim.loss), half=half)
        limit = optim.max_bad_steps
        return cls(network, data, optimiser, probe=probe, run=run, max_bad_steps=limit)

    def crops(self, step: int) -> Iterator[CropBatch]:
        """The held-out batches from ``step`` on, without end."""
        for _, crops in self.data.crops(step):
            yield crops

    def step(
        self,
        *,
        crops: CropBatch,
        train: PoseBatch,
        strategy: Strategy,
        rates: dict[str, float],
        step: int,
        progress: float,
    ) -> dict[str, Any]:
        """One step, before the weights' step on ``train``; what to log of it.

        Raises PosefabricError after more than ``max_bad_steps`` non-finite ones in a row.
        """
        held_out = self.data.prepare(crops, step)
        evidence = Evidence(train=train, held_out=held_out, rates=rates, loss_of=self.probe)
        parameters = list(self.network.arch_parameters().values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            found = strategy.architecture_gradients(self.network, evidence, progress)
            if found is None:
                return {}
            loss, gradients = found
            record: dict[str, Any] = {"held_out_loss": float(loss)}
            penalty = strategy.penalty(self.network, progress)
            if penalty is not None:
                record["penalty"] = float(penalty.detach())
                more = torch.autograd.grad(
                    penalty, parameters, allow_unused=True, materialize_grads=True
                )
                gradients = [a + b for a, b in zip(gradients, more, strict=True)]
        finally:
            # At rest in the weights' step: no gradient to compute, none in its clipped norm.
            for parameter in parameters:
                parameter.requires_grad_(False)
        norm = torch.nn.utils.get_total_norm(gradients)
        record["architecture_gradient_norm"] = float(norm)
        if not bool(torch.isfinite(norm) & torch.isfinite(loss)):
            record["architecture_skipped"] = True
            self._skip(held_out, step)
            return record
        self.bad_in_a_row = 0
        self._move(parameters, gradients)
        return record

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the position in the held-out data is the search's step."""
        return {
            "optimiser": self.optimiser.state_dict(),
            "skipped_steps": self.skipped_steps,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.skipped_steps = state["skipped_steps"]
        self.bad_in_a_row = state["bad_in_a_row"]

    def _move(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        for parameter in parameters:
            parameter.grad = None

    def _skip(self, held_out: PoseBatch, step: int) -> None:
        self.skipped_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row <= self.max_bad_steps:
            return
        kept = [buffer.clone() for buffer in self.network.buffers()]
        culprit = first_told(first_non_finite(self.network, held_out.images))
        for buffer, value in zip(self.network.buffers(), kept, strict=True):
            buffer.copy_(value)
        self.run.set_state("failed")
        raise PosefabricError(
            f"{self.run.path}: {self.bad_in_a_row} architecture steps in a row were not finite at "
            f"step {step + 1}; first in "
            f"{culprit or 'the held-out loss or its gradient (the outputs are finite)'}; "
            f"lower learning_rate or search.architecture_learning_rate, use precision=fp32, or "
            f"look at the pictures with `posefabric data check`; the last checkpoint is good"
        )
