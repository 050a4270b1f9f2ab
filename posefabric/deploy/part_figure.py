"""Learned parts on paper: the matrix of mutual information and a coloured skeleton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posefabric.deploy.metro import matplotlib_figure
from posefabric.evaluate.groups import LearnedParts, normalised_positions
from posefabric.structures import PersonDataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#e4572e", "#2e86ab", "#59a14f", "#b07aa1", "#f1a208", "#17becf", "#8c564b", "#7f7f7f",
)  # fmt: skip


def write_parts(learned: LearnedParts, dataset: PersonDataset, folder: Path) -> list[Path]:
    """Write parts.json (parts, information in nats, eigenvalues) and parts.png; their paths.

    Raises PosefabricError where matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, picture = folder / "parts.json", folder / "parts.png"
    record.write_text(
        json.dumps(
            {
                "skeleton": dataset.skeleton.name,
                "source": learned.source,
                "persons": learned.persons,
                "parts": {name: list(members) for name, members in learned.parts.items()},
                "keypoints": list(dataset.skeleton.keypoints),
                "information_nats": learned.information.round(6).tolist(),
                "eigenvalues": learned.eigenvalues.round(6).tolist(),
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    figure = matplotlib_figure()(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_matrix(left, learned, dataset)
    _draw_skeleton(right, learned, dataset)
    figure.savefig(picture, dpi=130)
    return [record, picture]


def _draw_matrix(axes: Axes, learned: LearnedParts, dataset: PersonDataset) -> None:
    names = dataset.skeleton.keypoints
    order = [names.index(name) for members in learned.parts.values() for name in members]
    matrix = learned.information[np.ix_(order, order)]
    shown = axes.imshow(np.ma.masked_where(np.eye(len(order), dtype=bool), matrix), cmap="viridis")
    axes.set_xticks(range(len(order)), [names[k] for k in order], rotation=90, fontsize=8)
    axes.set_yticks(range(len(order)), [names[k] for k in order], fontsize=8)
    start = 0
    for number, members in enumerate(learned.parts.values()):
        size = len(members)
        x = [start - 0.5, start + size - 0.5]
        colour = _colour(number)
        axes.plot([x[0], x[1], x[1], x[0], x[0]], [x[0], x[0], x[1], x[1], x[0]], colour, lw=2.5)
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            if label.get_text() in members:
                label.set_color(colour)
        start += size
    axes.set_title(f"mutual information of {learned.source}, nats", fontsize=10)
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)


def _draw_skeleton(axes: Axes, learned: LearnedParts, dataset: PersonDataset) -> None:
    """The keypoints of the fullest person near the median pose, coloured by part."""
    names = dataset.skeleton.keypoints
    points, seen = normalised_positions(dataset)
    median = np.array([np.median(points[seen[:, k], k], axis=0) for k in range(len(names))])
    far = np.where(seen, np.linalg.norm(points - median, axis=-1), 0).sum(1)
    most = seen.sum(1).max()
    person = int(np.where(seen.sum(1) == most, far, np.inf).argmin())
    xy, there = points[person], seen[person]
    part_of = {k: i for i, members in enumerate(learned.parts.values()) for k in members}
    for a, b in dataset.skeleton.limbs:
        if there[a] and there[b]:
            same = part_of[names[a]] == part_of[names[b]]
            colour = _colour(part_of[names[a]]) if same else "#c8ccd2"
            axes.plot(*xy[[a, b]].T, colour, lw=4 if same else 2, solid_capstyle="round", zorder=1)
    for k in np.flatnonzero(there):
        axes.scatter(*xy[k], s=110, color=_colour(part_of[names[k]]), edgecolor="white", zorder=2)
        axes.annotate(names[k], xy[k], xytext=(6, 6), textcoords="offset points", fontsize=7)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"{len(learned.parts)} parts of {dataset.skeleton.name}", fontsize=10)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
