"""Object keypoint similarity of poses, the NMS that goes by it, and a person's score."""

from __future__ import annotations

import numpy as np

from posefabric.data.conventions import BOX_PADDING


def similarity(
    predictions: np.ndarray,
    references: np.ndarray,
    areas: np.ndarray,
    sigmas: np.ndarray,
    visible: np.ndarray | None = None,
) -> np.ndarray:
    """(M, N) OKS of M predictions (M, K, 2) with N references (N, K, 2), pixels.

    The mean over the visible keypoints of exp(-d^2 / (2 area (2 sigma)^2)), the COCO keypoint
    protocol. ``areas``, square pixels, broadcasts to (M, N); ``sigmas`` (K,); ``visible``
    (N, K), none: all. A reference without visible keypoints gets 0 (the COCO evaluation
    compares with its box there, and ignores it).
    """
    squared = ((predictions[:, None] - references[None]) ** 2).sum(axis=-1)
    scale = 2.0 * (np.asarray(areas, dtype=np.float64) + np.spacing(1))
    exponent = squared / (2.0 * np.asarray(sigmas)) ** 2 / scale[..., None]
    close = np.exp(-exponent)
    if visible is None:
        return close.mean(axis=-1)
    mask = np.asarray(visible) > 0
    return (close * mask[None]).sum(axis=-1) / np.maximum(mask.sum(axis=-1), 1)[None]


def oks_nms(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    sigmas: np.ndarray,
    threshold: float = 0.9,
) -> np.ndarray:
    """Rows kept of one picture's persons, best first; ties keep their order.

    A person goes when its OKS with a kept, better one is above ``threshold``; the area of a
    pair is the mean of both. ``keypoints`` (N, K, 2), ``scores`` (N,), ``areas`` (N,).
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    areas = np.asarray(areas, dtype=np.float64)
    points = np.asarray(keypoints, dtype=np.float64)
    kept: list[int] = []
    while len(order):
        best, rest = int(order[0]), order[1:]
        kept.append(best)
        if not len(rest):
            break
        pair_areas = (areas[rest] + areas[best])[:, None] / 2
        overlap = similarity(points[rest], points[best][None], pair_areas, sigmas)[:, 0]
        order = rest[overlap <= threshold]
    return np.asarray(kept, dtype=np.int64)


def crop_area(
    box_xywh: np.ndarray, input_wh: tuple[int, int] | None, padding: float = BOX_PADDING
) -> float:
    """Square pixels of a person's crop: the box widened to the input's shape, then padded.

    Without ``input_wh`` the box keeps its own shape.
    """
    width, height = float(box_xywh[2]), float(box_xywh[3])
    if input_wh is not None:
        aspect = input_wh[0] / input_wh[1]
        width, height = max(width, height * aspect), max(height, width / aspect)
    return width * height * padding**2


def rescored(box_score: float, scores: np.ndarray, threshold: float | None = 0.2) -> float:
    """The person's score: box score x mean of the keypoint scores above ``threshold``, or 0.

    Without a threshold it is the box score.
    """
    if threshold is None:
        return float(box_score)
    sure = np.asarray(scores, dtype=np.float64)
    sure = sure[sure > threshold]
    return float(box_score) * float(sure.mean()) if len(sure) else 0.0
