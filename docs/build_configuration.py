"""Writes docs/configuration.md from the configuration models: every option and its default."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from posefabric.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DeriveConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    SearchConfig,
    shipped_configs,
)
from posefabric.models.backbones import OWN_BACKBONES
from posefabric.space.operations import OPERATIONS

PATH = Path(__file__).resolve().with_name("configuration.md")

INTRODUCTION = """\
# Every option

<!-- Written by docs/build_configuration.py; change posefabric/options*.py and run `make docs`. -->

A configuration is the defaults below, then a YAML file (or the name of a shipped one; a file that
has `extends: FILE` comes after that one), then
overrides from the command line. A YAML file holds only what differs:

```yaml
data:
  skeleton: lsp14
  input_wh: [128, 128]
search:
  epochs: 4
```

An override reads `section.option=value`; the value is YAML, so a list is `[96, 128]`, nothing is
`null`, and a text with blanks needs quotes around the whole:

```bash
posefabric search lspet_lite0_p3 data.root=my_data "data.input_wh=[96, 128]" --out runs/a
posefabric eval runs/a data.boxes=detections.json --split val
```

An unknown option, a value of the wrong kind or one out of range is an error that names the option
and offers near names. What a run resolved to is in its `config.yaml`. With `--resume`, only
`device`, `threads`, `data.root`, `data.workers`, `data.cache` and `checkpoint_every` may differ
from it.
"""

SECTIONS: tuple[tuple[str, str, type[BaseModel], type[BaseModel] | None], ...] = (
    ("General", "", Config, None),
    ("data", "data.", DataConfig, None),
    ("augment", "augment.", AugmentConfig, None),
    ("model", "model.", ModelConfig, None),
    ("search and finetune", "", OptimConfig, None),
    ("search", "search.", SearchConfig, OptimConfig),
    ("derive", "derive.", DeriveConfig, None),
    ("evaluation", "evaluation.", EvaluationConfig, None),
)

# What a field's own description in config.py leaves to say; a test wants one or the other.
MEANINGS = {
    "name": "shown in reports",
    "seed": "of the weights, the order of the persons, the augmentation and random architectures",
    "threads": "threads of torch on a CPU; none: torch's choice",
    "data.format": "COCO or MPII annotations and pictures on disk, or synthetic people made "
    "on the fly",
    "data.root": "folder of the data set, the start of the paths below",
    "data.skeleton": "a shipped name or a YAML file ([data.md](data.md))",
    "data.train_annotations": "COCO keypoint JSON (MPII: its JSON or .mat) to learn from",
    "data.train_images": "folder of its pictures",
    "data.val_annotations": "COCO keypoint JSON (MPII: its JSON) to choose by",
    "data.val_images": "folder of its pictures",
    "data.test_annotations": "COCO keypoint JSON (MPII: its JSON or .mat) for final numbers; may "
    "lack keypoints",
    "data.test_images": "folder of its pictures",
    "data.box_score_threshold": "detections below this score are left out",
    "data.on_bad_image": "an unreadable picture ends the run, or is left out, counted and reported",
    "data.synthetic_train": "synthetic persons to learn from",
    "data.synthetic_val": "synthetic persons to choose by, and as many for test",
    "data.synthetic_seed": "another number, other people",
    "data.input_wh": "pixels, multiples of 32; heatmaps are a quarter of it",
    "data.preset": "conventions of crop, heatmap and decoding ([conventions.md](conventions.md))",
    "data.workers": "processes that read pictures; 0: a thread of the training's own",
    "augment.rotation_probability": "how often a person is turned at all",
    "augment.flip": "how often a person is mirrored",
    "augment.half_body": "how often only the upper or lower half is shown, of persons with 8 or "
    "more keypoints",
    "model.backbone": "a timm model with levels at strides 4, 8, 16 and 32, or one of the paper's "
    f"({', '.join(f'`{name}`' for name in OWN_BACKBONES)})",
    "model.depth": "L: layers of a whole fabric",
    "model.first_layer": "layers before it are left out and replaced by the backbone's pyramid; "
    "from 1 to depth - 1",
    "model.hidden_nodes": "H: nodes of a cell",
    "model.operations": f"candidates: {', '.join(f'`{name}`' for name in OPERATIONS)}",
    "model.shared_alpha": "one alpha a part, or one for each of its cells",
    "model.faithful": "the scaling, border copies and missing norms of the paper's released code "
    "([method.md](method.md#what-faithful-changes))",
    "model.head": "one map a keypoint, or a vector at each pixel whose length is the score, made "
    "by a 2-D or a 3-D convolution",
    "model.vector_dim": "d: values of the vector heads",
    "batch_size": "persons a step; less where there are fewer persons",
    "learning_rate": "at the top of the schedule",
    "weight_decay": "decoupled (AdamW), on weights with two or more axes",
    "schedule": "rise and cosine fall, drops at the milestones, or none",
    "clip_norm": "largest norm of the gradient",
    "loss": "on the heatmaps; a fine-tuning keeps the loss of its search",
    "precision": "bf16: autocast, with depthwise convolutions in fp32 on a CPU",
    "log_every": "steps between readings of speed and entropies",
    "search.strategy": "what moves alpha and beta ([method.md](method.md#search))",
    "search.relaxation": "from logits to weights; only sparsemax reaches exact zeros",
    "search.architecture_learning_rate": "of alpha and beta; synchronous: under the weights' "
    "schedule, first and second order: constant",
    "derive.finetune": "train the compact network on, as `posefabric derive --finetune`",
}


def document() -> str:
    """The whole file."""
    pieces = [INTRODUCTION, _shipped()]
    pieces += [_section(*section) for section in SECTIONS]
    return "\n".join(pieces)


def undescribed() -> list[str]:
    """Options without a description: a row of the tables would leave the reader guessing."""
    return [
        prefix + name
        for _, prefix, model, base in SECTIONS
        for name, field in _options(model, base)
        if not _meaning(prefix + name, field)
    ]


def _shipped() -> str:
    rows = ["## Shipped configurations\n", "| name | what for |", "|---|---|"]
    for name, path in shipped_configs().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = [line.lstrip("# ") for line in itertools.takewhile(_is_comment, lines)]
        rows.append(f"| `{name}` | {' '.join(comment)} |")
    return "\n".join(rows) + "\n"


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def _section(title: str, prefix: str, model: type[BaseModel], base: type[BaseModel] | None) -> str:
    lines = [f"## {title}\n", " ".join((model.__doc__ or "").split()).replace("``", "`") + "\n"]
    if model is OptimConfig:
        lines.append(
            "Both `search` and `finetune` have these: `search.epochs`, `finetune.epochs`.\n"
        )
    lines += ["| option | values | default | |", "|---|---|---|---|"]
    for name, field in _options(model, base):
        option = prefix + name
        cells = (f"`{option}`", _values(field), _default(field), _meaning(option, field))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _options(
    model: type[BaseModel], base: type[BaseModel] | None
) -> Iterator[tuple[str, FieldInfo]]:
    """The options of a table: no sections, nothing that ``base`` shows with the same default."""
    inherited = {} if base is None else base.model_fields
    for name, field in model.model_fields.items():
        same = name in inherited and inherited[name].default == field.default
        if not same and not _is_section(field):
            yield name, field


def _meaning(option: str, field: FieldInfo) -> str:
    return field.description or MEANINGS.get(option, "")


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _values(field: FieldInfo) -> str:
    kind, or_null, _ = _type(field.annotation).partition(" or `null`")
    bounds = _bounds(field)
    if not bounds:
        return kind + or_null
    return f"{kind} {bounds}" + (f",{or_null}" if or_null else "")


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        kinds = [_type(argument) for argument in arguments if argument is not type(None)]
        return " or ".join([*kinds, "`null`"] if type(None) in arguments else kinds)
    if origin is tuple:
        kind = _type(arguments[0])
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {count}{kind}s"
    if origin is dict:
        return f"mapping from {_type(arguments[0])} to {_type(arguments[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}[annotation]


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = []
    for item in field.metadata:
        for attribute, sign in signs.items():
            bound = getattr(item, attribute, None)
            if bound is not None:
                found.append(f"{sign} {bound}")
    return ", ".join(found)


def _default(field: FieldInfo) -> str:
    value = field.get_default()
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value is None:
        return "`null`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def main() -> None:
    """Write the file, or with ``--check`` say by the exit code whether it is current."""
    if "--check" in sys.argv:
        raise SystemExit(PATH.read_text(encoding="utf-8") != document())
    PATH.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
