"""What each step of a derivation costs in accuracy, with inherited weights, before any training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from posefabric.config import Config
from posefabric.data.pipeline import has_data, open_dataset
from posefabric.distributed import place
from posefabric.models.build import choose_device
from posefabric.models.network import PoseNetwork
from posefabric.structures import PersonDataset
from posefabric.train.phase import evaluate, headline

Measure = Callable[[PoseNetwork], dict[str, float]]


def make_measure(config: Config) -> Measure | None:
    """Measures networks on the same ``derive.gap_persons`` validation persons, without flip test.

    The persons are spread evenly over the split. Returns a function from a network to its
    headline figures (PCK, PCKh, AP: shares of 1); None where no persons are asked for, in one of
    several processes, or where the run names no data (one made from a released checkpoint). Raises
    what opening the data raises.
    """
    count = config.derive.gap_persons
    # One process derives while the others wait, and a measurement would need them all.
    if count == 0 or place().ranks > 1 or not has_data(config.data):
        return None
    dataset = spread(open_dataset(config.data, "val", evaluating=True), count)
    device = choose_device(config.device)

    def measure(network: PoseNetwork) -> dict[str, float]:
        network.to(device)
        found = evaluate(network, config, dataset, device=device, flip=False)
        network.to("cpu")
        return headline(found)

    return measure


def spread(dataset: PersonDataset, count: int) -> PersonDataset:
    """``count`` persons of a data set, evenly spread; all of one that has no more."""
    total = len(dataset.persons)
    rows = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    return replace(
        dataset,
        persons=[dataset.persons[row] for row in rows],
        headboxes=None if dataset.headboxes is None else dataset.headboxes[rows],
        # OKS is measured on these persons alone.
        annotations_path=None,
        groups=None,
    )


def gaps(accuracy: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Points (of 100) that each step after the mixture lies below it, by measure."""
    whole = accuracy["mixture"]
    return {
        step: {name: 100 * (whole[name] - value) for name, value in found.items()}
        for step, found in accuracy.items()
        if step != "mixture"
    }


def gap_lines(accuracy: dict[str, dict[str, float]]) -> list[str]:
    """What a derivation's record says of its accuracy, for the terminal; none if not measured."""
    return [
        f"{step}: below the mixture, untrained: "
        + ", ".join(f"{points:+.2f} points of {name}" for name, points in found.items())
        for step, found in (gaps(accuracy) if accuracy else {}).items()
    ]
