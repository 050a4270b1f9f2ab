"""What may differ when a run is taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posefabric.config import Config
from posefabric.structures import PosefabricError

# Options that may differ on a resume: they say where and how fast, not what is computed.
MACHINE_OPTIONS = {
    "device",
    "threads",
    "model.path",
    "data.root",
    "data.workers",
    "data.cache",
    "data.on_bad_image",
}
MACHINE_SUFFIX = ".checkpoint_every"


def computed_options(config: Config) -> dict[str, Any]:
    """The options, by dotted name, that say what is computed: all but those of the machine."""
    flat = _flatten(config.model_dump(mode="json"))
    return {
        key: value
        for key, value in flat.items()
        if key not in MACHINE_OPTIONS and not key.endswith(MACHINE_SUFFIX)
    }


def check_resumable(old: Config, new: Config, *, path: Path) -> None:
    """PosefabricError when another configuration than the run's would compute something else."""
    before, after = computed_options(old), computed_options(new)
    differing = [
        f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    if differing:
        raise PosefabricError(
            f"{path}: cannot be continued with another configuration: "
            f"{'; '.join(differing[:5])}; use the old values, or choose another --out"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
