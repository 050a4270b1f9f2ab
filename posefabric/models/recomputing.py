"""Maps that are not kept for the backward pass, because they say how to be had again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Recipe:
    """How to have a map again that was not kept."""

    again: Callable[[], Tensor]
    version: int

    def __call__(self) -> Tensor:
        return self.again()


def give_recipe(result: Tensor, again: Callable[[], Tensor]) -> None:
    """Say how to compute ``result`` again, to the layers that would keep it.

    A map in bfloat16 is half as large, and is kept.
    """
    if result.dtype == torch.bfloat16:
        return
    result.recipe = Recipe(again, result._version)  # type: ignore[attr-defined]


def recipe_of(x: Tensor) -> Recipe | None:
    """None where there is none, or where somebody has written into x since."""
    recipe: Recipe | None = getattr(x, "recipe", None)
    return None if recipe is None or recipe.version != x._version else recipe


def recomputing(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)`` that does not keep x for the backward pass where x tells its recipe."""
    recipe = recipe_of(x)
    if recipe is None:
        return layer(x)
    place, shape = x.data_ptr(), x.shape

    def pack(kept: Tensor) -> Tensor | Recipe:
        return recipe if kept.data_ptr() == place and kept.shape == shape else kept

    def unpack(kept: Tensor | Recipe) -> Tensor:
        return kept() if isinstance(kept, Recipe) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(x)
