"""Optimiser, learning-rate schedule and averaged weights of one training phase."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from posefabric.config import OptimConfig
from posefabric.models.network import PoseNetwork

LOGIT_FACTOR = 10.0


def weight_groups(network: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Parameter groups of the weights: backbone and heads at rates of their own, no decay on
    vectors.

    The heads are the last convolutions (``final_layer``). A step decays every weight by the same
    share, whatever its group's factor.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad or name.startswith(("alphas.", "betas.")):
            continue
        factor = 1.0
        if name.startswith("backbone."):
            factor = config.backbone_factor
        elif ".final_layer" in name:
            factor = head_factor(config, network)
        groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * factor,
            "weight_decay": config.weight_decay / max(1.0, factor) if decays else 0.0,
        }
        for (factor, decays), parameters in groups.items()
    ]


def head_factor(config: OptimConfig, network: nn.Module) -> float:
    """The learning rate of the heads, relative to the other weights'.

    Heatmap heads begin near 0. Scores under squared error end near 1, logits have to become
    several times as large, and Adam moves a weight by at most its rate a step. The squared lengths
    of vector heads grow by themselves.
    """
    if config.head_factor is not None:
        return config.head_factor
    logits = isinstance(network, PoseNetwork) and network.graph.head.kind == "heatmap"
    return LOGIT_FACTOR if logits and config.loss == "cross_entropy" else 1.0


def clip(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """The norm of all gradients, which are brought down to ``limit`` in place where it is higher.

    As torch's ``clip_grad_norm_``, without its product by one where nothing is clipped.
    """
    own = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
    if not norm + 1e-6 <= limit:
        nn.utils.clip_grads_with_norm_(own, limit, norm)
    return norm


def rate_factor(config: OptimConfig, progress: float) -> float:
    """The learning rate's factor at ``progress`` 0..1 of the phase."""
    if config.schedule != "steps" and progress < config.warmup:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / config.warmup)) / 2
    if config.schedule == "one_cycle":
        late = (progress - config.warmup) / (1 - config.warmup)
        return 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * min(late, 1.0))) / 2
    if config.schedule == "steps":
        return config.decay ** sum(milestone <= progress for milestone in config.milestones)
    return 1.0


def make_optimiser(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay; each group remembers its rate as ``base_lr``."""
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.AdamW(groups, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor


def rates_by_name(network: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, float]:
    """The present learning rate of every parameter that an optimiser moves."""
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in network.named_parameters() if id(p) in rates}


class AveragedWeights:
    """Exponential moving average of a network's weights and statistics."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        # Training writes into these tensors, and never puts others in their places.
        self._own = _floats(network)
        self.state = {name: value.detach().clone() for name, value in self._own.items()}

    def update(self, step: int) -> None:
        """Move towards the network; early on faster, so that the start is forgotten."""
        towards = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        towards(list(self.state.values()), list(self._own.values()), step)

    @torch.no_grad()
    def copy_to_network(self) -> None:
        for name, value in self._own.items():
            value.copy_(self.state[name])

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up a kept average, on whatever device this one is."""
        for name, value in self.state.items():
            value.copy_(state[name])


def _floats(network: nn.Module) -> dict[str, Tensor]:
    """What is averaged; a supernet's temperature is not learned but set by a schedule."""
    state = network.state_dict()
    return {n: v for n, v in state.items() if v.is_floating_point() and n != "temperature"}
