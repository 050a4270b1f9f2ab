"""Skeletons: keypoints, left and right, limbs, OKS sigmas, part groupings; one YAML each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from posefabric.structures import PosefabricError

FALLBACK_SIGMA = 0.079  # COCO's sigma of a shoulder: neither its sharpest point nor its vaguest

_REQUIRED = ("name", "keypoints", "flip_pairs", "limbs")
_OPTIONAL = ("sigmas", "sigmas_source", "torso", "upper_body", "groupings")


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What the pipeline knows of K keypoints; all indices point into ``keypoints``.

    Attributes:
        name: shown in reports.
        keypoints: K names, in the order of the annotations.
        flip_pairs: (left, right) keypoints that change places in a mirrored picture.
        limbs: the lines to draw.
        sigmas: (K,) float64, the OKS constants (COCO evaluation: k_i = 2 sigma_i).
        sigmas_source: where the sigmas come from, said next to every OKS number.
        groupings: P -> part name -> keypoints (PAPER section 2). Parts may overlap; together
            they hold every keypoint. P = 1 is always there.
        torso: (left shoulder, right hip), the length unit of PCK on LSP; None: no such unit.
        upper_body: keypoints of the upper half, for half-body augmentation; may be empty.
    """

    name: str
    keypoints: tuple[str, ...]
    flip_pairs: tuple[tuple[int, int], ...]
    limbs: tuple[tuple[int, int], ...]
    sigmas: np.ndarray
    sigmas_source: str
    groupings: dict[int, dict[str, tuple[int, ...]]]
    torso: tuple[int, int] | None = None
    upper_body: tuple[int, ...] = ()

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoints)

    @property
    def flip_index(self) -> np.ndarray:
        """(K,) int64: ``mirrored = original[flip_index]`` renames left and right."""
        index = np.arange(self.num_keypoints, dtype=np.int64)
        for left, right in self.flip_pairs:
            index[left], index[right] = right, left
        return index


def shipped_skeletons() -> dict[str, Path]:
    """Name to path of every skeleton YAML in the package."""
    folder = Path(str(resources.files("posefabric"))) / "skeletons"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_skeleton(name_or_path: str) -> Skeleton:
    """The skeleton of a shipped name (``coco17``) or of a user's YAML file.

    Raises PosefabricError that names the file and the entry when something does not fit.
    """
    shipped = shipped_skeletons()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise PosefabricError(
            f"{name_or_path}: no such skeleton file or shipped skeleton"
            f"{_did_you_mean(path.stem, shipped)}; shipped: {', '.join(shipped)}"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PosefabricError(f"{path}: cannot be read as YAML: {error}") from error
    return skeleton_from_tree(tree, origin=str(path))


def skeleton_from_tree(tree: Any, *, origin: str) -> Skeleton:
    """A checked skeleton from parsed YAML; ``origin`` names the file in errors.

    Raises PosefabricError on unknown or missing entries, unknown keypoint names, a keypoint in
    two flip pairs, a wrong number of sigmas, or a grouping that is not whole.
    """
    if not isinstance(tree, dict):
        raise PosefabricError(f"{origin}: expected entries like `keypoints: [...]`, got {tree!r}")
    return _Reader(tree, origin).skeleton()


class _Reader:
    def __init__(self, tree: dict[Any, Any], origin: str) -> None:
        self.tree = tree
        self.origin = origin
        self.index: dict[str, int] = {}

    def skeleton(self) -> Skeleton:
        known = (*_REQUIRED, *_OPTIONAL)
        for key in self.tree:
            if key not in known:
                hint = _did_you_mean(str(key), known)
                self.fail(f"unknown entry {key!r}{hint}; known: {', '.join(known)}")
        for key in _REQUIRED:
            if key not in self.tree:
                hint = ""
                if key == "flip_pairs":
                    hint = "; write `flip_pairs: []` if the skeleton has no left and right"
                elif key == "limbs":
                    hint = "; write `limbs: []` if there is no line to draw"
                self.fail(f"the entry `{key}` is missing{hint}")
        names = self.names()
        self.index = {name: number for number, name in enumerate(names)}
        sigmas, source = self.sigmas(names)
        torso = self.tree.get("torso")
        return Skeleton(
            name=str(self.tree["name"]),
            keypoints=names,
            flip_pairs=self.flip_pairs(names),
            limbs=self.pairs("limbs"),
            sigmas=sigmas,
            sigmas_source=source,
            groupings=self.groupings(names),
            torso=None if torso is None else self.pair(torso, "torso"),
            upper_body=self.many(self.tree.get("upper_body") or [], "upper_body"),
        )

    def fail(self, text: str) -> NoReturn:
        raise PosefabricError(f"{self.origin}: {text}")

    def names(self) -> tuple[str, ...]:
        names = self.tree["keypoints"]
        if not isinstance(names, list) or not names:
            self.fail(f"keypoints: expected a list of names, got {names!r}")
        for number, name in enumerate(names):
            if not isinstance(name, str) or not name:
                self.fail(f"keypoints: entry {number + 1} is {name!r}, expected a name (quote it)")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            self.fail(f"keypoints: named more than once: {', '.join(repeated)}")
        return tuple(names)

    def one(self, name: Any, where: str) -> int:
        if name not in self.index:
            hint = _did_you_mean(str(name), self.index)
            self.fail(f"{where}: unknown keypoint {name!r}{hint}; known: {', '.join(self.index)}")
        return self.index[name]

    def many(self, names: Any, where: str) -> tuple[int, ...]:
        if not isinstance(names, list):
            self.fail(f"{where}: expected a list of keypoint names, got {names!r}")
        found = tuple(self.one(name, where) for name in names)
        if len(set(found)) < len(found):
            self.fail(f"{where}: a keypoint is named twice in {names!r}")
        return found

    def pair(self, names: Any, where: str) -> tuple[int, int]:
        found = self.many(names, where)
        if len(found) != 2:
            self.fail(f"{where}: expected two keypoint names, got {names!r}")
        return found[0], found[1]

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        entries = self.tree[key]
        if entries is None:
            entries = []
        if not isinstance(entries, list):
            self.fail(f"{key}: expected a list of pairs of keypoint names, got {entries!r}")
        return tuple(
            self.pair(entry, f"{key}, entry {number}") for number, entry in enumerate(entries, 1)
        )

    def flip_pairs(self, names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
        found = self.pairs("flip_pairs")
        taken: dict[int, int] = {}
        for number, pair in enumerate(found, 1):
            for keypoint in pair:
                if keypoint in taken:
                    self.fail(
                        f"flip_pairs: {names[keypoint]} is in entry {taken[keypoint]} and in entry "
                        f"{number}; a keypoint has one counterpart"
                    )
                taken[keypoint] = number
        return found

    def sigmas(self, names: tuple[str, ...]) -> tuple[np.ndarray, str]:
        given = self.tree.get("sigmas")
        if given is None:
            source = f"fallback: {FALLBACK_SIGMA} for every keypoint, none given in {self.origin}"
            return np.full(len(names), FALLBACK_SIGMA), source
        if isinstance(given, dict):
            for name in given:
                self.one(name, "sigmas")
            missing = [name for name in names if name not in given]
            if missing:
                self.fail(f"sigmas: missing for {', '.join(missing)}")
            given = [given[name] for name in names]
        if not isinstance(given, list) or len(given) != len(names):
            came = len(given) if isinstance(given, list) else repr(given)
            self.fail(f"sigmas: expected {len(names)} values, one a keypoint, got {came}")
        for name, value in zip(names, given, strict=True):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                self.fail(f"sigmas: {name} has {value!r}, expected a number above 0")
        source = self.tree.get("sigmas_source") or f"given in {self.origin}"
        return np.asarray(given, dtype=np.float64), str(source)

    def groupings(self, names: tuple[str, ...]) -> dict[int, dict[str, tuple[int, ...]]]:
        given = self.tree.get("groupings")
        if given is None:
            given = {}
        if not isinstance(given, dict):
            self.fail(f"groupings: expected `number of parts: {{name: [...]}}`, got {given!r}")
        found = {1: {"all": tuple(range(len(names)))}}
        for count, parts in given.items():
            where = f"groupings, {count}"
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                self.fail(f"{where}: the key is the number of parts, a whole number from 1 up")
            if not isinstance(parts, dict) or len(parts) != count:
                came = len(parts) if isinstance(parts, dict) else repr(parts)
                self.fail(f"{where}: expected {count} named parts, got {came}")
            group = {
                str(part): self.many(members, f"{where}, {part}") for part, members in parts.items()
            }
            # A part's name becomes a module's and a tensor's.
            odd = [part for part in group if not part or "." in part or "/" in part]
            if odd:
                self.fail(
                    f"{where}: the part name {odd[0]!r}: expected one without dots or slashes"
                )
            empty = [part for part, members in group.items() if not members]
            if empty:
                self.fail(f"{where}: no keypoint in {', '.join(empty)}")
            covered = {keypoint for members in group.values() for keypoint in members}
            missing = [name for number, name in enumerate(names) if number not in covered]
            if missing:
                self.fail(f"{where}: no part holds {', '.join(missing)}; every keypoint needs one")
            found[count] = group
        return dict(sorted(found.items()))


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
