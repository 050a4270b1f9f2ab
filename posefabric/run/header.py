"""run.json: what a run folder says of itself."""

from __future__ import annotations

import json
import os
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from posefabric import __version__
from posefabric.structures import PosefabricError

FORMAT_VERSION = 1

Kind = Literal["search", "derive", "train"]
State = Literal["running", "stopped", "failed", "finished"]


def new_header(path: Path, *, kind: Kind, parent: Path | None) -> dict[str, Any]:
    """What a run that starts now, in the folder ``path``, writes into run.json."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "created": now(),
        "parent": relative(parent, path) if parent else None,
        "posefabric": __version__,
        "command": shlex.join(sys.argv),
        "state": "running",
        "info": {},
        "children": [],
    }


def check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise PosefabricError(f"kind {kind!r}: expected one of {', '.join(get_args(Kind))}")


def check_state(state: str) -> None:
    if state not in get_args(State):
        raise PosefabricError(f"state {state!r}: expected one of {', '.join(get_args(State))}")


def read_header(path: Path) -> dict[str, Any]:
    """run.json of the folder ``path``; PosefabricError when it is damaged or of another version."""
    file = path / "run.json"
    restore = "restore it from a copy, or start again with another --out"
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PosefabricError(
            f"{file}: cannot be read ({error.strerror}); expected a file you may read"
        ) from error
    except ValueError as error:
        raise PosefabricError(f"{file}: damaged, expected JSON ({error}); {restore}") from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise PosefabricError(
            f"{file}: format version {version}, this posefabric {__version__} reads "
            f"{FORMAT_VERSION}; use posefabric {header.get('posefabric', 'of that version')}"
        )
    if (
        version is None
        or header.get("kind") not in get_args(Kind)
        or header.get("state") not in get_args(State)
        or not isinstance(header.get("created"), str)
        or not isinstance(header.get("parent"), str | None)
    ):
        raise PosefabricError(
            f"{file}: damaged, expected format_version, kind, state, created and parent; {restore}"
        )
    return header


def relative(path: Path, start: Path) -> str:
    """As written into run.json: a tree of runs can be moved."""
    return Path(os.path.relpath(path, start)).as_posix()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
