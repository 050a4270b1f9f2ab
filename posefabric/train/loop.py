"""The training loop: guarded steps, live progress, exact resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posefabric.config import OptimConfig
from posefabric.data.pipeline import TrainingData
from posefabric.distributed import any_rank, first_told, in_step, place
from posefabric.models.network import PoseNetwork, first_non_finite
from posefabric.run import RunFolder
from posefabric.structures import CropBatch, DataError, PoseBatch, PosefabricError
from posefabric.train.checkpoint import (
    capture_random_state,
    load_checkpoint,
    restore_random_state,
    save_checkpoint,
)
from posefabric.train.coming import Coming
from posefabric.train.gradients import add_gradients
from posefabric.train.held_out import ArchitectureTrainer
from posefabric.train.loss import make_loss
from posefabric.train.optim import (
    AveragedWeights,
    clip,
    make_optimiser,
    rate_factor,
    rates_by_name,
    set_rate,
    weight_groups,
)
from posefabric.train.parallel import Parallel
from posefabric.train.precision import Precision, autocast, make_scaler, resolve_precision
from posefabric.train.probe import PartProbe
from posefabric.train.progress import Progress, StopRequest
from posefabric.train.strategy import Strategy


class TrainingStopped(PosefabricError):
    """The user asked to stop; a checkpoint is written."""


@dataclass
class Trainer:
    """One phase of training a network in a run folder.

    Attributes:
        held_out: persons for the architecture's own steps, for a strategy that wants them.
        validate: called with the network every ``optim.evaluate_every`` epochs; its numbers
            are logged beside the step.
        sync_norms: with several processes, see ``train/parallel.py``.
        precision: what ``optim.precision`` came to on the device; known once ``fit`` began.
        seconds, cpu_seconds: the clock's and all threads' time in steps, over all resumes.
        phase: the label of this phase's records in metrics.jsonl.
    """

    network: PoseNetwork
    data: TrainingData
    run: RunFolder
    optim: OptimConfig
    strategy: Strategy
    phase: str
    seed: int
    device: torch.device
    held_out: TrainingData | None = None
    validate: Callable[[PoseNetwork], dict[str, float]] | None = None
    sync_norms: bool = True
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    skipped_steps: int = 0
    precision: Precision = "fp32"
    _bad_in_a_row: int = 0
    _optimiser: Any = None
    _scaler: Any = None
    _average: AveragedWeights | None = None
    _architecture: ArchitectureTrainer | None = None
    _ranks: Any = None
    _coming: Coming[tuple[int, CropBatch]] | None = None
    _parameters: list[Tensor] = field(default_factory=list)
    _buffers: list[Tensor] = field(default_factory=list)
    _kept_buffers: list[Tensor] = field(default_factory=list)

    @property
    def total_steps(self) -> int:
        return max(1, round(self.optim.epochs * self.data.steps_per_epoch))

    @property
    def skipped_architecture_steps(self) -> int:
        return 0 if self._architecture is None else self._architecture.skipped_steps

    def fit(self) -> None:
        """Train to the end, from the newest checkpoint if the run has one.

        Raises TrainingStopped on Ctrl-C or SIGTERM and DataError for a picture that cannot be
        read, both after writing a checkpoint, and PosefabricError after too many non-finite
        steps in a row.
        """
        self._prepare()
        self.run.set_state("running")
        with StopRequest() as stop, Progress(enabled=place().rank == 0) as progress:
            progress.start(self.total_steps, self.phase, step=self.step)
            started, cpu_started = time.perf_counter(), time.process_time()
            for step, crops, held_out in self._crops():
                if step >= self.total_steps:
                    break
                if any_rank(stop.requested):
                    self._save()
                    self.run.set_state("stopped")
                    raise TrainingStopped(
                        f"{self.run.path}: stopped at step {step} of {self.total_steps}; the same "
                        f"command with --resume goes on from here"
                    )
                batch = self.data.prepare(crops, step)
                with self._ranks.step(step):
                    record = self._train_step(batch, step, held_out)
                self.step = step + 1
                now, cpu_now = time.perf_counter(), time.process_time()
                self.seconds += now - started
                self.cpu_seconds += cpu_now - cpu_started
                started, cpu_started = now, cpu_now
                self._report(record, progress)
        self._finish()

    def _crops(self) -> Iterator[tuple[int, CropBatch, CropBatch | None]]:
        held_out = None if self._architecture is None else self._architecture.crops(self.step)
        held_out = None if held_out is None else in_step(held_out)
        try:
            self._coming = Coming(in_step(self.data.crops(self.step)))
            for step, crops in self._coming:
                yield step, crops, None if held_out is None else next(held_out)
        except DataError:
            # What is learned so far outlives a bad picture.
            self._save()
            raise

    def _prepare(self) -> None:
        self.precision = resolve_precision(self.optim.precision, self.device)
        # First, so that averages and optimiser states come to lie beside the weights.
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Only a backbone with dropout draws from the global generator.
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        self.strategy.prepare(self.network, generator)
        self._ranks = Parallel(self.network, sync_norms=self.sync_norms, seed=self.seed)
        self._ranks.start()
        architecture = self.strategy.parameter_groups(self.network)
        self._optimiser = make_optimiser([*weight_groups(self.network, self.optim), *architecture])
        self._scaler = make_scaler(self.device, self.precision)
        if self.optim.ema:
            self._average = AveragedWeights(self.network, self.optim.ema)
        self._architecture = ArchitectureTrainer.make(
            self.network, self.strategy, self.held_out, optim=self.optim, run=self.run
        )
        restored = load_checkpoint(self.run)
        if restored is not None:
            self._restore(*restored)
        else:
            # A training that died before its first checkpoint may have left records.
            self.run.rewind(0, self.phase)
        self._ranks.check(self.step)
        self.network.train()
        self._parameters = list(self.network.parameters())
        self._buffers = [b for b in self.network.buffers() if b.is_floating_point()]
        self._kept_buffers = [b.clone() for b in self._buffers]

    def _train_step(
        self, batch: PoseBatch, step: int, held_out: CropBatch | None
    ) -> dict[str, Any]:
        progress = step / self.total_steps
        self.strategy.schedule(self.network, progress)
        decided = self._decide(batch, progress)
        factor = rate_factor(self.optim, progress)
        set_rate(self._optimiser, factor)
        architecture: dict[str, Any] = {}
        if self._architecture is not None and held_out is not None:
            architecture = self._architecture.step(
                crops=held_out,
                train=batch,
                strategy=self.strategy,
                rates=rates_by_name(self.network, self._optimiser),
                step=step,
                progress=progress,
            )
        self._optimiser.zero_grad(set_to_none=True)
        _copy_all(self._buffers, to=self._kept_buffers)
        share = add_gradients(
            self.network,
            batch,
            loss=self.optim.loss,
            autocast=self._autocast,
            scale=self._scaler.scale,
        )
        # With steps of their own, alpha and beta meet the penalty there.
        penalty = None if held_out is not None else self.strategy.penalty(self.network, progress)
        # While alpha and beta rest it has no gradient.
        if penalty is not None and penalty.requires_grad:
            self._scaler.scale(self._ranks.penalty(penalty)).backward()
        loss = self._ranks.gather(share)
        self._scaler.unscale_(self._optimiser)
        norm = clip(self._parameters, self.optim.clip_norm)
        objective = loss if penalty is None else loss + penalty.detach()
        finite = bool(torch.isfinite(objective) & torch.isfinite(norm))
        record: dict[str, Any] = {
            "phase": self.phase,
            "step": step + 1,
            "loss": float(loss),
            "learning_rate": self.optim.learning_rate * factor,
            "gradient_norm": float(norm),
            **architecture,
            **decided,
        }
        if penalty is not None:
            record["penalty"] = float(penalty.detach())
        if not finite:
            record["skipped"] = True
            self._scaler.update()
            self._skip(batch)
            return record
        self._bad_in_a_row = 0
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._ranks.average_statistics()
        if self._average is not None:
            self._average.update(step)
        return record

    def _decide(self, batch: PoseBatch, progress: float) -> dict[str, Any]:
        """Let the strategy look at this batch and those to come, where it wants to."""
        wanted = self.strategy.batches_wanted(self.network, progress)
        if not wanted or self._coming is None:
            return {}
        try:
            ahead = self._coming.peek(wanted - 1)
        except DataError:
            self._save()
            raise
        batches = [batch, *(self.data.prepare(crops, number) for number, crops in ahead)]
        loss_of = PartProbe(
            self.network, batches, loss=make_loss(self.optim.loss), autocast=self._autocast
        )
        return self.strategy.decide(self.network, batches, loss_of, progress)

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def _skip(self, batch: PoseBatch) -> None:
        # The forward pass has already moved the batch norms' statistics.
        _copy_all(self._kept_buffers, to=self._buffers)
        self.skipped_steps += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row <= self.optim.max_bad_steps:
            return
        with self._autocast():
            culprit = first_told(first_non_finite(self.network, batch.images))
        _copy_all(self._kept_buffers, to=self._buffers)
        self.run.set_state("failed")
        raise PosefabricError(
            f"{self.run.path}: {self._bad_in_a_row} steps in a row were not finite at step "
            f"{self.step + 1}; first in "
            f"{culprit or 'the loss or its gradient (the outputs are finite)'}; lower "
            f"learning_rate, use precision=fp32, or look at the pictures with `posefabric data "
            f"check`; the last checkpoint is good"
        )

    def _report(self, record: dict[str, Any], progress: Progress) -> None:
        rate = self.data.loader.batch_size * self.step / max(self.seconds, 1e-9)
        shown = {"loss": record["loss"], "images_per_s": rate}
        if self.step % self.optim.log_every == 0 or self.step == self.total_steps:
            record["images_per_s"] = round(rate, 2)
            record.update(self.strategy.readings(self.network))
        shown.update({k: v for k, v in record.items() if k.endswith("entropy")})
        if self._is_due(self.optim.evaluate_every) and self.validate is not None:
            record.update({f"val_{k}": v for k, v in self.evaluate_average().items()})
        self.run.log(record)
        progress.update(self.step, shown)
        if self.step % self.optim.checkpoint_every == 0:
            self._save()

    def _is_due(self, every_epochs: float) -> bool:
        if every_epochs <= 0 or self.step == self.total_steps:
            return False
        return self.step % max(1, round(every_epochs * self.data.steps_per_epoch)) == 0

    def evaluate_average(self) -> dict[str, float]:
        """Validate with the averaged weights when there are any; the training ones come back."""
        assert self.validate is not None
        if self._average is None:
            return self.validate(self.network)
        kept = {name: value.clone() for name, value in self.network.state_dict().items()}
        self._average.copy_to_network()
        try:
            return self.validate(self.network)
        finally:
            self.network.load_state_dict(kept)

    def _save(self) -> None:
        self._ranks.check(self.step)
        state = {
            "phase": self.phase,
            "network": self.network.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.state,
            "architecture": None if self._architecture is None else self._architecture.state(),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "skipped_steps": self.skipped_steps,
            "bad_in_a_row": self._bad_in_a_row,
            "total_steps": self.total_steps,
            "random": None if self._ranks.many else capture_random_state(),
        }
        save_checkpoint(self.run, state, step=self.step)

    def _restore(self, state: dict[str, Any], step: int) -> None:
        if state["total_steps"] != self.total_steps:
            raise PosefabricError(
                f"{self.run.path}: the checkpoint is of a phase of {state['total_steps']} steps, "
                f"this command asks for {self.total_steps}; resume with the run's own options"
            )
        self.network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(state["optimiser"])
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
        if self._average is not None and state["average"] is not None:
            self._average.load(state["average"])
        if self._architecture is not None:
            self._architecture.restore(state["architecture"])
        self.seconds = state["seconds"]
        self.cpu_seconds = state["cpu_seconds"]
        self.skipped_steps = state["skipped_steps"]
        self._bad_in_a_row = state["bad_in_a_row"]
        if state.get("random") is not None and not self._ranks.many:
            restore_random_state(state["random"])
        self.step = step
        self.run.rewind(step, self.phase)

    def _finish(self) -> None:
        if self._average is not None:
            self._average.copy_to_network()
        self.network.eval()


@torch.no_grad()
def _copy_all(source: list[Tensor], *, to: list[Tensor]) -> None:
    for value, target in zip(source, to, strict=True):
        target.copy_(value)
