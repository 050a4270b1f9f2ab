"""Which run is meant: children and theirs, the newest compact network, what to offer instead."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from posefabric.run.folder import RunFolder


def descendants(run: RunFolder) -> dict[str, RunFolder]:
    """Children, their children and so on, by name: ``01-derive``, ``01-derive/01-train``."""
    return _descend(run, {run.path})


def _descend(run: RunFolder, visited: set[Path]) -> dict[str, RunFolder]:
    found = {}
    for child in run.children():
        if child.path in visited:
            continue
        visited.add(child.path)
        found[child.path.name] = child
        for name, below in _descend(child, visited).items():
            found[f"{child.path.name}/{name}"] = below
    return found


def resolve(run: RunFolder, which: str = "auto") -> RunFolder:
    """As :meth:`posefabric.run.folder.RunFolder.resolve`."""
    if which == "mixture":
        return _searched(run)
    below = descendants(run)
    if which in ("auto", "compact"):
        compact = [
            child
            for child in below.values()
            if child.kind in ("derive", "train") and child.state == "finished"
        ]
        if compact:
            return max(compact, key=lambda child: child.created)
        if which == "compact" and run.kind == "search":
            raise PosefabricError(
                f"{run.path}: has no finished compact network; make one with "
                f"`posefabric derive {run.path}`, or ask for the mixture"
            )
        return run
    if which in below:
        return below[which]
    nested = [name for name in below if name.endswith(f"/{which}")]
    if len(nested) == 1:
        return below[nested[0]]
    raise PosefabricError(
        f"{run.path}: {'more than one' if nested else 'no'} child run is called {which}"
        f"{did_you_mean(which, below)}; there are: "
        f"{', '.join(['auto', 'mixture', 'compact', *below])}"
    )


def _searched(run: RunFolder) -> RunFolder:
    above: RunFolder | None = run
    while above is not None and above.kind != "search":
        above = above.parent
    if above is None:
        raise PosefabricError(f"{run.path}: is a {run.kind} run without a search above it")
    return above


def run_paths(folder: Path, *, depth: int) -> list[Path]:
    """The run folders in a folder (or that folder), down to ``depth``, without their children."""
    found: list[Path] = []
    level = [folder]
    for _ in range(depth + 1):
        below: list[Path] = []
        for place in level:
            with contextlib.suppress(OSError):
                if (place / "run.json").is_file():
                    found.append(place)
                    continue
                # No scan of a whole disk for a hint in an error message.
                entries = sorted(place.iterdir())[:1000]
                below += [e for e in entries if not e.name.startswith(".") and e.is_dir()]
        level = below[:1000]
    return found


def shortest(path: Path) -> str:
    """Relative to the working folder where that is shorter to read."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
