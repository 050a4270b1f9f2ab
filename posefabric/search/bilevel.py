"""First- and second-order search: alpha and beta learn from persons the weights never see.

Liu, Simonyan and Yang, DARTS (ICLR 2019), equations 6 to 8; PAPER section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posefabric.distributed import summed
from posefabric.models.supernet import Supernet
from posefabric.search.deciding import Deciding
from posefabric.train.probe import full_precision
from posefabric.train.strategy import Evidence

BETAS = (0.5, 0.999)  # of Adam on alpha and beta, as in DARTS


class FirstOrder(Deciding):
    """Before each step of the weights, one Adam step of alpha and beta on the held-out loss.

    Its gradient takes the weights as they are: DARTS with xi = 0.
    """

    name = "first_order"

    def prepare(self, network: Supernet, generator: torch.Generator) -> None:
        super().prepare(network, generator)
        for parameter in network.arch_parameters().values():
            parameter.requires_grad_(False)

    def held_out_share(self) -> float:
        return self.config.architecture_share

    def architecture_optimiser(self, network: Supernet) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            list(network.arch_parameters().values()),
            lr=self.config.architecture_learning_rate,
            betas=BETAS,
            weight_decay=self.config.architecture_weight_decay,
        )

    def architecture_gradients(
        self, network: Supernet, evidence: Evidence, progress: float
    ) -> tuple[Tensor, list[Tensor]] | None:
        if not self.has_started(progress):
            return None
        loss = evidence.loss_of(evidence.held_out)
        found = _gradients(loss, list(network.arch_parameters().values()))
        return _whole(loss), found


class SecondOrder(FirstOrder):
    """The same step, by the gradient through one plain gradient step of the weights.

    xi is each weight's learning rate in the step that follows (the backbone may have its own),
    or ``unrolled_rate`` for all. As in DARTS's equations the unrolled step is gradient descent,
    without the moments, the decay and the clipping of the weights' own AdamW.
    """

    name = "second_order"

    def architecture_gradients(
        self, network: Supernet, evidence: Evidence, progress: float
    ) -> tuple[Tensor, list[Tensor]] | None:
        if not self.has_started(progress):
            return None
        xi = self.config.unrolled_rate
        return unrolled_gradients(
            list(network.arch_parameters().values()),
            {n: p for n, p in network.named_parameters() if n in evidence.rates},
            evidence,
            rates=evidence.rates if xi is None else dict.fromkeys(evidence.rates, xi),
        )


def unrolled_gradients(
    architecture: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    evidence: Evidence,
    *,
    rates: Mapping[str, float],
    perturbation: float = 0.01,
) -> tuple[Tensor, list[Tensor]]:
    """L_val(w', a) and its gradients by a, for w' = w - xi grad_w L_train(w, a).

    With v = grad_w' L_val(w', a) that is (DARTS, equations 7 and 8)::

        grad_a L_val(w', a) - (grad_a L_train(w + e xi v, a) - grad_a L_train(w - e xi v, a)) / 2e

    with e = ``perturbation`` / |xi v|. For one rate of all weights this is DARTS's form, whose
    e stands for our e xi; ours has a rate for each weight (``rates``, by name).
    """
    with full_precision():
        loss = evidence.loss_of(evidence.train, exact=True)
        slopes = _gradients(loss, list(weights.values()))
        moved = {
            name: (weight.detach() - rates[name] * slope).requires_grad_()
            for (name, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        held_out = evidence.loss_of(evidence.held_out, moved, exact=True)
        found = _gradients(held_out, [*architecture, *moved.values()])
        direct, beyond = found[: len(architecture)], found[len(architecture) :]
        direction = {name: rates[name] * v for name, v in zip(moved, beyond, strict=True)}
        norm = torch.nn.utils.get_total_norm(list(direction.values()))
        if norm == 0:
            return _whole(held_out), direct
        step = perturbation / norm
        sides = []
        for sign in (1, -1):
            aside = {n: w.detach() + sign * step * direction[n] for n, w in weights.items()}
            loss = evidence.loss_of(evidence.train, aside, exact=True)
            sides.append(_gradients(loss, architecture))
        return _whole(held_out), [
            g - (up - down) / (2 * step) for g, up, down in zip(direct, *sides, strict=True)
        ]


def _whole(loss: Tensor) -> Tensor:
    return summed([loss.detach()])[0]


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of the whole batch: ranks have shares of the loss, which add up.

    Zero for a tensor without influence, such as the weights of what sparsemax leaves out.
    """
    found = torch.autograd.grad(loss, list(tensors), allow_unused=True, materialize_grads=True)
    return summed(found)
