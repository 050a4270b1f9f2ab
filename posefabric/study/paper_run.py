"""A short run of a configuration of the paper, so that it is known to train and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posefabric.config import Config, load_config
from posefabric.data.pipeline import open_dataset
from posefabric.run import RunFolder
from posefabric.search.run_search import search
from posefabric.structures import PosefabricError
from posefabric.train.from_start import train_from_start

STEPS = 2
BATCH = 2


def run_briefly(
    name: str,
    out: Path,
    *,
    mpii: Path | None,
    coco: Path | None,
    overrides: Sequence[str] = (),
) -> str:
    """Train a shipped configuration for two steps of two persons and evaluate it; one line.

    ImageNet weights are left out, so that no hub is needed. ``mpii`` and ``coco`` are folders in
    the layout that the configuration names; its data options can be overridden.

    Raises PosefabricError when the folder it needs was not given.
    """
    first = load_config(name)
    root = mpii if first.data.format == "mpii" else coco
    if root is None:
        option = "--mpii" if first.data.format == "mpii" else "--coco"
        raise PosefabricError(f"{name}: needs {option} DIR")
    section = "search" if first.model.network == "fabric" else "finetune"
    settings = [f"data.root={root.resolve()}", "data.workers=0", "model.weights=none"]
    settings += [f"{section}.batch_size={BATCH}", *overrides]
    config = load_config(name, settings)
    persons = len(open_dataset(config.data, "train"))
    # A fabric with held-out persons sees its own share of them.
    share = 1 - config.search.architecture_share if "order" in config.search.strategy else 1.0
    steps_per_epoch = max(1, int(persons * share) // BATCH)
    config = load_config(name, [*settings, f"{section}.epochs={STEPS / steps_per_epoch}"])
    run = RunFolder.create(out / name, config=config, kind=_kind(config))
    if section == "search":
        _, result = search(run)
    else:
        _, result = train_from_start(run)
    return f"{name}: {result['train_steps']} steps, {result['predicted']} persons evaluated"


def _kind(config: Config):
    return "search" if config.model.network == "fabric" else "train"
