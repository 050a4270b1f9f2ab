"""How logits become the weights of a mixture: softmax, sparsemax, gates, Gumbel samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The logit of a source that a cell does not have.
ABSENT = -1e9


def sparsemax(logits: Tensor) -> Tensor:
    """Euclidean projection of the last axis onto the simplex (Martins and Astudillo, 2016).

    Unlike softmax it reaches exact zeros, so that what it drops can be pruned without loss.
    """
    ordered = logits.sort(dim=-1, descending=True).values
    counts = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    excess = ordered.cumsum(-1) - 1
    support = (ordered * counts > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support
    return (logits - threshold).clamp(min=0)


class Relaxation:
    """Softmax of logits / temperature; the others say what they do otherwise.

    Logits are (..., options); options a cell does not have are at ``ABSENT``.
    """

    def probabilities(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """How likely each option is, differentiable: what penalties and costs look at."""
        return (logits / temperature).softmax(-1)

    def weights(self, logits: Tensor, temperature: Tensor, noise: Tensor | None) -> Tensor:
        """What each option is multiplied by; ``noise``, of the logits' shape, for samples."""
        return self.probabilities(logits, temperature)

    def doubt(self, probabilities: Tensor, options: Tensor) -> Tensor:
        """(...,): 1 undecided, 0 decided; ``options`` (...,) counts those that exist, 2 or more."""
        return torch.special.entr(probabilities).sum(-1) / options.log()

    def impurity(self, probabilities: Tensor) -> Tensor:
        """(...,): a smooth measure of doubt, 0 exactly when decided: Gini's 1 - sum p^2."""
        return 1 - probabilities.square().sum(-1)


class Sparsemax(Relaxation):
    def probabilities(self, logits: Tensor, temperature: Tensor) -> Tensor:
        return sparsemax(logits / temperature)


class Gates(Relaxation):
    """Each option has a sigmoid gate of its own, so that several may stay (FairDARTS, 2020)."""

    def probabilities(self, logits: Tensor, temperature: Tensor) -> Tensor:
        return (logits / temperature).sigmoid()

    def doubt(self, probabilities: Tensor, options: Tensor) -> Tensor:
        both = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
        return both.sum(-1) / (options * math.log(2))

    def impurity(self, probabilities: Tensor) -> Tensor:
        """sum p (1 - p): up to a constant FairDARTS's zero-one loss, -(p - 1/2)^2."""
        return (probabilities * (1 - probabilities)).sum(-1)


class Gumbel(Relaxation):
    """One option a forward pass, drawn by its probability; without noise the likeliest.

    Straight through (Jang, Gu and Poole, 2017): the weight is exactly 1, its gradient that of the
    softmax of (logits + noise) / temperature. What is not drawn is not computed and gets no
    gradient of its own (GDAS, 2019).
    """

    def probabilities(self, logits: Tensor, temperature: Tensor) -> Tensor:
        return logits.softmax(-1)

    def weights(self, logits: Tensor, temperature: Tensor, noise: Tensor | None) -> Tensor:
        noisy = logits if noise is None else logits + noise
        soft = (noisy / temperature).softmax(-1)
        drawn = torch.zeros_like(soft).scatter(-1, noisy.argmax(-1, keepdim=True), 1.0)
        return drawn * (1 + (soft - soft.detach()))


RELAXATIONS: dict[str, Relaxation] = {
    "softmax": Relaxation(),
    "sparsemax": Sparsemax(),
    "gates": Gates(),
    "gumbel": Gumbel(),
}
