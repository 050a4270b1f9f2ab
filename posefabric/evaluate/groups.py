"""Parts from data: which keypoints move together, by mutual information and spectral clustering.

The paper's groupings are anatomy by hand (PAPER section 2); these need no knowledge of the
skeleton. Mutual information is Kraskov, Stoegbauer and Grassberger's first estimator (2004), the
clustering that of Ng, Jordan and Weiss (2002).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.spatial import KDTree
from scipy.special import digamma

from posefabric.config import Config
from posefabric.data.pipeline import open_dataset
from posefabric.structures import DataError, PersonDataset, PosefabricError, Predictions

NEIGHBOURS = 5
FEWEST_PERSONS = 20
MOST_PARTS = 8


@dataclass(frozen=True)
class LearnedParts:
    """A grouping of K keypoints and what it rests on.

    Attributes:
        parts: part name to keypoint names; a part is called after the keypoint that its others
            tell most about.
        information: (K, K) nats, symmetric, zero diagonal.
        eigenvalues: (K,) of the normalised Laplacian, rising; parts are few small ones.
        source: what the information is between.
        persons: how many persons it was measured on, at most.
    """

    parts: dict[str, tuple[str, ...]]
    information: np.ndarray
    eigenvalues: np.ndarray
    source: str
    persons: int


def part_count(parts: str) -> int | None:
    """K of ``learned:K``; None for ``learned``, which leaves K to the eigengap."""
    match = re.fullmatch(r"learned(?::([1-9]\d*))?", parts)
    if match is None:
        raise PosefabricError(f"model.parts={parts}: expected learned or learned:K")
    return int(match[1]) if match[1] else None


def with_learned_parts(config: Config, *, say: Callable[[str], None] = lambda text: None) -> Config:
    """``model.parts=learned:K`` replaced by the parts themselves; other configurations as they are.

    A run keeps what was learned: what is read later is what was searched.
    """
    if not str(config.model.parts).startswith("learned"):
        return config
    dataset = sample_persons(open_dataset(config.data, "train", evaluating=True))
    found = learn_parts(dataset, part_count(str(config.model.parts)))
    for name, members in found.parts.items():
        say(f"{name}: {', '.join(members)}")
    model = config.model.model_copy(update={"parts": found.parts})
    return config.model_copy(update={"model": model})


def learn_parts(
    dataset: PersonDataset,
    count: int | None = None,
    *,
    predictions: Predictions | None = None,
    seed: int = 0,
) -> LearnedParts:
    """Group the keypoints of a data set by how much their positions tell about each other.

    Args:
        count: number of parts; none: where the Laplacian's eigenvalues have their widest gap.
        predictions: of a trained network on ``dataset``: its errors take the positions' place.

    Raises PosefabricError for a count beyond the keypoints, DataError for a keypoint that too
    few persons show.
    """
    names = dataset.skeleton.keypoints
    if count is not None and not 1 <= count <= len(names):
        raise PosefabricError(
            f"model.parts=learned:{count}: skeleton {dataset.skeleton.name} has {len(names)} "
            f"keypoints; expected 1 .. {len(names)} parts"
        )
    points, seen = normalised_positions(dataset)
    source = "positions"
    if predictions is not None:
        found, rows = np.full_like(points, np.nan), predictions.index
        found[rows] = normalised_positions(dataset, predictions)[0][rows]
        points, source = found - points, "errors"
        seen = seen & np.isfinite(points).all(-1)
    for name, persons in zip(names, seen.sum(0), strict=True):
        if persons < FEWEST_PERSONS:
            raise DataError(
                f"{dataset.name}: {name} is annotated for {persons} persons; learned parts need "
                f"{FEWEST_PERSONS} or more; choose model.parts yourself or leave the keypoint out"
            )
    information = mutual_information(points, seen, seed=seed)
    labels, eigenvalues = spectral_clusters(information, count, seed=seed)
    parts = {}
    for label in dict.fromkeys(labels.tolist()):
        members = np.flatnonzero(labels == label)
        centre = members[information[np.ix_(members, members)].sum(1).argmax()]
        name = re.sub(r"\W+", "_", names[centre])
        parts[f"with_{name}"] = tuple(names[k] for k in members)
    return LearnedParts(parts, information, eigenvalues, source, int(seen.sum(0).max()))


def sample_persons(dataset: PersonDataset, limit: int = 1500, seed: int = 0) -> PersonDataset:
    """At most ``limit`` of the persons, drawn by ``seed``: enough for :func:`learn_parts`."""
    if len(dataset) <= limit:
        return dataset
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), limit, replace=False))
    return replace(dataset, persons=[dataset.persons[row] for row in rows], headboxes=None)


def normalised_positions(
    dataset: PersonDataset, predictions: Predictions | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(N, K, 2) positions from the box's centre in longer sides of the box, and (N, K) bool.

    Positions are the annotated ones, or those of ``predictions`` (others NaN).
    """
    boxes = np.stack([person.box_xywh for person in dataset.persons]).astype(np.float64)
    centre, size = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:].max(1)
    points = np.stack([person.keypoints for person in dataset.persons]).astype(np.float64)
    if predictions is not None:
        points = np.full_like(points, np.nan)
        points[predictions.index] = predictions.keypoints
    seen = np.stack([person.visibility for person in dataset.persons]) > 0
    return (points - centre[:, None]) / size[:, None, None], seen


def mutual_information(points: np.ndarray, seen: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """(K, K) mutual information in nats between points (N, K, 2) where both are seen (N, K).

    Estimates below zero are zero, and pairs that fewer than 20 persons show.
    """
    # Annotations on whole pixels tie, which the estimator does not bear.
    noise = np.random.default_rng(seed).normal(scale=1e-6, size=points.shape)
    points = points + noise
    count = points.shape[1]
    result = np.zeros((count, count))
    for a in range(count):
        for b in range(a):
            both = seen[:, a] & seen[:, b]
            if both.sum() >= FEWEST_PERSONS:
                value = _information(points[both, a], points[both, b])
                result[a, b] = result[b, a] = max(0.0, value)
    return result


def _information(x: np.ndarray, y: np.ndarray) -> float:
    """Nats between x (N, d) and y (N, d), by the distances to nearest neighbours."""
    both = np.concatenate([x, y], axis=1)
    reach = KDTree(both).query(both, k=NEIGHBOURS + 1, p=np.inf)[0][:, -1]
    # Strictly nearer ones; the point itself is counted, the formula's + 1.
    reach = np.nextafter(reach, 0)
    near = [KDTree(z).query_ball_point(z, reach, p=np.inf, return_length=True) for z in (x, y)]
    return float(digamma(NEIGHBOURS) + digamma(len(x)) - sum(digamma(n).mean() for n in near))


def spectral_clusters(
    affinity: np.ndarray, count: int | None = None, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(K,) labels and (K,) eigenvalues of I - D^-1/2 W D^-1/2 for a symmetric affinity W (K, K).

    ``count`` none: 2 .. 8 clusters (fewer than K), before the widest gap of eigenvalues.
    """
    degree = affinity.sum(1)
    scale = 1 / np.sqrt(np.maximum(degree, 1e-12))
    laplacian = np.eye(len(affinity)) - scale[:, None] * affinity * scale
    eigenvalues, vectors = np.linalg.eigh(laplacian)
    if count is None:
        most = min(MOST_PARTS, len(affinity) - 1)
        gaps = np.diff(eigenvalues)[1:most]
        count = int(gaps.argmax()) + 2 if len(gaps) else 1
    if count == len(affinity):
        return np.arange(count), eigenvalues
    rows = vectors[:, :count]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return _best_kmeans(rows, count, seed), eigenvalues


def _best_kmeans(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The tightest of twenty k-means whose clusters are all used."""
    best, least = None, np.inf
    for attempt in range(20):
        rng = np.random.default_rng([seed, attempt])
        centres, labels = kmeans2(rows, count, minit="++", rng=rng, missing="warn")
        spread = float(((rows - centres[labels]) ** 2).sum())
        if len(set(labels.tolist())) == count and spread < least:
            best, least = labels, spread
    if best is None:
        raise PosefabricError(f"{count} parts: the keypoints fall into fewer groups; ask for fewer")
    return best
