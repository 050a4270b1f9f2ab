"""Where the time of a step of search goes, stage by stage, and how far each is from the peaks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from posefabric.bench.fresh import Gate
from posefabric.bench.roofline import ConvolutionCounter
from posefabric.bench.timing import Clock, Rounds
from posefabric.config import Config
from posefabric.data.pipeline import TrainingData
from posefabric.models.build import build_supernet
from posefabric.search.run_search import STRATEGIES
from posefabric.train.loss import LOSSES
from posefabric.train.memory import keep_freed_memory
from posefabric.train.optim import make_optimiser, weight_groups
from posefabric.train.phase import choose_path
from posefabric.train.precision import resolve_precision

# Adam reads weight, gradient and both moments, and writes all but the gradient, 4 bytes each.
OPTIMISER_BYTES = 7 * 4


class StagedStep:
    """One step of search in pieces, each a function to be timed.

    ``read`` are crops from JPEG files in this process (which workers do beside a training),
    ``prepare`` is augmentation and targets, ``backbone`` and ``fabrics`` the forward pass, and
    ``optimiser`` the clipping too.
    """

    def __init__(self, config: Config, *, batch: int, device: torch.device) -> None:
        optim = config.search.model_copy(update={"batch_size": batch})
        strategy = STRATEGIES[optim.strategy](optim)
        self.network = build_supernet(config)
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network.train()
        data = TrainingData.open(
            config,
            optim=optim,
            normalisation=self.network.normalisation,
            seed=config.seed,
            device=device,
        )
        groups = weight_groups(self.network, optim) + strategy.parameter_groups(self.network)
        self.optimiser = make_optimiser(groups)
        self.clip = optim.clip_norm
        self.device = device
        self.precision = resolve_precision(optim.precision, device)
        self._source = data.crops(0)
        self._prepare = data.prepare
        self._loss_of = LOSSES[optim.loss]
        self._values: dict[str, Any] = {}

    def functions(self) -> dict[str, Callable[[], None]]:
        return {
            "read": self.read,
            "prepare": self.prepare,
            "backbone": self.backbone,
            "fabrics": self.fabrics,
            "loss": self.loss,
            "backward": self.backward,
            "optimiser": self.optimise,
        }

    def read(self) -> None:
        self._values["step"], self._values["crops"] = next(self._source)

    def prepare(self) -> None:
        self._values["batch"] = self._prepare(self._values["crops"], self._values["step"])

    def backbone(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            self._values["pyramid"] = self.network.backbone(self._values["batch"].images)

    def fabrics(self) -> None:
        with self._autocast():
            self._values["outputs"] = self.network.head_forward(self._values["pyramid"])

    def loss(self) -> None:
        batch, outputs = self._values["batch"], self._values["outputs"].float()
        self._values["loss"] = self._loss_of(outputs, batch.heatmaps, batch.weights)

    def backward(self) -> None:
        self._values["loss"].backward()

    def optimise(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimiser.step()
        self._values.clear()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def stage_rounds(gate: Gate, *, config: Config, batch: int, device: str, plan: Rounds) -> None:
    """At a turn: seconds of each stage by round, and the operations of each.

    {"seconds": {stage: [...]}, "flops": {stage: {"dense", "depthwise"}}, "bytes": of the
    optimiser, "precision"}.
    """
    keep_freed_memory(torch.device(device))
    step = StagedStep(config, batch=batch, device=torch.device(device))
    # On the plain path: a fused kernel does the same work, but does not show it to torch.
    flops = count_stages(step)
    choose_path(step.network, config, step.device)
    while gate.turn():
        seconds = time_stages(step, plan)
        moved = sum(p.numel() for g in step.optimiser.param_groups for p in g["params"])
        gate.answer(
            {
                "seconds": seconds,
                "flops": flops,
                "bytes": moved * OPTIMISER_BYTES,
                "precision": step.precision,
            }
        )


def count_stages(step: StagedStep) -> dict[str, dict[str, int]]:
    """The convolutions' operations of one step, by stage."""
    found = {}
    for stage, work in step.functions().items():
        with ConvolutionCounter() as counter:
            work()
        found[stage] = {"dense": counter.dense, "depthwise": counter.depthwise}
    return found


def time_stages(
    step: StagedStep, plan: Rounds, *, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each stage, by step."""
    functions = step.functions()
    took: dict[str, list[float]] = {stage: [] for stage in functions}
    began = clock()
    for turn in range(plan.warmup + plan.rounds):
        if turn >= plan.warmup + plan.least and clock() - began >= plan.seconds:
            break
        for stage, work in functions.items():
            started = clock()
            work()
            if step.device.type == "cuda":
                torch.cuda.synchronize(step.device)
            if turn >= plan.warmup:
                took[stage].append(clock() - started)
    return took


def stage_table(found: dict[str, Any], peaks: dict[str, Any], *, batch: int) -> dict[str, Any]:
    """The stages' times and how much of the peaks they reach, as JSON has it.

    By stage: ``ms`` an image (median), ``share`` of the step (reading left out, since workers do
    it), ``gflops`` a second (none: no convolutions), ``of_conv_3x3`` that over the 3x3 peak, and
    ``of_attainable``: the least time that its dense and its depthwise operations would take at
    their own peaks, over the time it took; for the optimiser, the bytes it must move at the
    speed of a copy. In a precision other than fp32 shares of the fp32 peaks can exceed 1.
    """
    medians = {stage: statistics.median(values) for stage, values in found["seconds"].items()}
    whole = sum(seconds for stage, seconds in medians.items() if stage != "read")
    dense_peak = peaks["conv_3x3"]["gflops"] * 1e9
    depthwise_peak = peaks["depthwise_3x3"]["gflops"] * 1e9
    stages = {}
    for stage, seconds in medians.items():
        dense, depthwise = (found["flops"][stage][kind] for kind in ("dense", "depthwise"))
        least = dense / dense_peak + depthwise / depthwise_peak
        if stage == "optimiser":
            least = found["bytes"] / (peaks["copy"]["gbytes"] * 1e9)
        computes = dense + depthwise > 0
        stages[stage] = {
            "ms": 1e3 * seconds / batch,
            "share": None if stage == "read" else seconds / whole,
            "gflops": (dense + depthwise) / seconds / 1e9 if computes else None,
            "depthwise_share": depthwise / (dense + depthwise) if computes else None,
            "of_conv_3x3": (dense + depthwise) / seconds / dense_peak if computes else None,
            "of_attainable": least / seconds if least > 0 else None,
        }
    return {"batch": batch, "precision": found["precision"], "stages": stages}
