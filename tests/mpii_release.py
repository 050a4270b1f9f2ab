"""A small file in the published structure of MPII's official .mat, and pictures for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.io import savemat

JOINTS = np.random.default_rng(5).uniform(20, 90, (6, 16, 2)).round(1)


def structs(entries: list[dict[str, Any]]) -> np.ndarray:
    """(1, N) struct array; MATLAB gives every entry the same fields, empty where unset."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    array = np.empty((1, len(entries)), dtype=[(name, object) for name in names])
    for column, entry in enumerate(entries):
        for name in names:
            array[name][0, column] = entry.get(name, np.zeros((0, 0)))
    return array


def rect(row: int, *, points: dict[int, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """One annorect; ``points``: joint id to is_visible, or no annopoints at all (a test set)."""
    entry: dict[str, Any] = {
        "objpos": {"x": 50.0 + row, "y": 60.0},
        "scale": 0.4 + 0.1 * row,
    }
    if points is not None:
        entry |= {"x1": 40.0, "y1": 10.0, "x2": 52.0, "y2": 26.0}
        found = [
            {"x": JOINTS[row, k, 0], "y": JOINTS[row, k, 1], "id": float(k)}
            | ({} if seen is None else {"is_visible": seen})
            for k, seen in points.items()
        ]
        entry["annopoints"] = {"point": structs(found)}
    entry |= changes
    return {name: value for name, value in entry.items() if value is not None}


def picture(name: str, rects: list[dict[str, Any]]) -> dict[str, Any]:
    return {"image": {"name": name}, "annorect": structs(rects) if rects else np.zeros((0, 0))}


def write_release(folder: Path) -> Path:
    """Three training and three test pictures; returns the .mat."""
    everything: dict[int, Any] = {k: None if 6 <= k <= 9 else float(k % 3 > 0) for k in range(16)}
    annolist = [
        picture("t1.jpg", [rect(0, points={0: 1.0, 7: None, 15: 0.0})]),
        picture("e1.jpg", [rect(1), rect(2)]),
        picture("t2.jpg", [rect(3, points=everything), rect(4, points={3: "0"}, scale=None)]),
        picture("e2.jpg", []),
        picture("t3.jpg", [rect(5, x1=1.0)]),
        picture("e3.jpg", [rect(4), rect(5)]),
    ]
    singles = np.empty((6, 1), dtype=object)
    singles[:, 0] = [
        np.array([[1]]),
        np.array([[2]]),
        np.zeros((0, 0)),
        np.zeros((0, 0)),
        np.array([[1]]),
        np.array([[1], [2]]),
    ]
    release = {
        "annolist": structs(annolist),
        "img_train": np.array([[1, 0, 1, 0, 1, 0]]),
        "single_person": singles,
        "version": "12",
    }
    path = folder / "mpii_human_pose.mat"
    savemat(path, {"RELEASE": release})
    (folder / "images").mkdir(exist_ok=True)
    for number, entry in enumerate(annolist):
        noise = np.random.default_rng(number).integers(0, 256, (100, 120, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / entry["image"]["name"]), noise)
    return path
