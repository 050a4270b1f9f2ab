"""Studies of seconds: synthetic people, 64 pixels, the smallest backbone.

As a script it makes one: ``python tiny_studies.py FILE OUT [JOBS]``, as the command would.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

TINY = [
    "device=cpu",
    "data.format=synthetic",
    "data.input_wh=[64,64]",
    "data.workers=0",
    "data.synthetic_train=8",
    "data.synthetic_val=4",
    "model.backbone=test_efficientnet",
    "model.weights=none",
    "model.channel_factor=2",
    "model.parts=1",
    "search.strategy=synchronous",
    "search.batch_size=4",
    "search.epochs=0.5",
    "search.checkpoint_every=1",
    "finetune.batch_size=4",
    "finetune.epochs=0.5",
    "finetune.checkpoint_every=1",
]
SIMPLE = ["model.network=simple_baseline", "model.deconv_width=4"]


def write_study(path: Path, **sections: Any) -> Path:
    """A study of one mixture and one seed, but for what is given."""
    tree = {
        "name": "tiny",
        "overrides": TINY,
        "seeds": [0],
        "arms": {"mixture": {"steps": "search"}},
        **sections,
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def main(file: str, out: str, jobs: str = "1") -> int:
    from posefabric.study.study import run_study
    from posefabric.train.loop import TrainingStopped

    try:
        run_study(file, [], out=Path(out), jobs=int(jobs), table=False, final=False, say=print)
    except TrainingStopped:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
