"""Reads the released code's YAML: which network a checkpoint holds, and the options it was made by.

Made from the published structure of these files: a ``model`` section with the backbone, the
sizes and a ``subnetwork_config``, and a ``train`` section. The flat form of a specification
(:func:`posefabric.models.posenfs.load_posenfs`) is taken too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posefabric.models.posenfs import OPERATION_NAMES
from posefabric.models.posenfs_parts import KEYPOINTS, SKELETONS, released_parts
from posefabric.structures import PosefabricError

BACKBONES = {
    "resnet": "posenfs_resnet50",
    **{f"resnet{n}": f"posenfs_resnet{n}" for n in (50, 101, 152)},
    "mobilenetv2": "posenfs_mobilenet_v2",
    "hrnet": "hrnet_w32_stage3",
    "hrnetw32": "hrnet_w32_stage3",
}
STRATEGIES = {
    "sync": "synchronous",
    "random": "random",
    "none": "uniform",
    "first_order_gradient": "first_order",
    "second_order_gradient": "second_order",
}
INPUT_WH = {"coco": (192, 256), "mpii": (256, 256)}
COCO_FILES = {
    f"{split}_{kind}": text.format(split)
    for split in ("train", "val")
    for kind, text in (
        ("annotations", "annotations/person_keypoints_{}2017.json"),
        ("images", "{}2017"),
    )
}


MPII_FILES = {
    "format": "mpii",
    "train_annotations": "annot/train.json",
    "train_images": "images",
    "val_annotations": "annot/valid.json",
    "val_images": "images",
}


@dataclass(frozen=True)
class ReleasedConfig:
    """What a released YAML says.

    Attributes:
        spec: for :func:`posefabric.models.posenfs.load_posenfs`.
        options: posefabric's own options, by section; all but ``model.shared_alpha``, which the
            checkpoint tells.
        notes: what the YAML asks for and posefabric does otherwise.
    """

    spec: dict[str, Any]
    options: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def read_released_config(path: Path) -> ReleasedConfig:
    """Read a released configuration.

    Raises PosefabricError that names the file and the entry which is missing or not understood.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PosefabricError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, Mapping):
        raise PosefabricError(f"{path}: expected sections, got {type(tree).__name__}")
    return _Reader(path, tree).read()


class _Reader:
    def __init__(self, path: Path, tree: Mapping[str, Any]) -> None:
        self.path = path
        model = tree.get("model")
        self.model: Mapping[str, Any] = model if isinstance(model, Mapping) else tree
        inner = self.model.get("subnetwork_config", tree.get("subnetwork_config"))
        # Nearest first: the parts' own section, the model's, the file's.
        self.places = [p for p in (inner, self.model, tree) if isinstance(p, Mapping)]
        train = tree.get("train")
        self.train: Mapping[str, Any] = train if isinstance(train, Mapping) else {}
        self.notes: list[str] = []

    def read(self) -> ReleasedConfig:
        cells = self._cells()
        dataset = self._dataset()
        backbone = self._backbone()
        parts = self._parts(dataset)
        spec = {
            "backbone": BACKBONES[backbone].removeprefix("posenfs_").removesuffix("_stage3"),
            "dataset": dataset,
            "parts_num": len(parts),
            "parts": parts,
            "cell_config": cells,
        }
        options = {
            "data": self._data(dataset),
            "augment": self._augment(),
            "model": {
                "backbone": BACKBONES[backbone],
                "weights": "none",
                "faithful": True,
                "parts": {
                    name: [KEYPOINTS[dataset][k] for k in rows] for name, rows in parts.items()
                },
            },
            **self._training(),
        }
        return ReleasedConfig(spec, options, self.notes)

    def _get(self, *names: str) -> Any:
        for place in self.places:
            for name in names:
                if place.get(name) is not None:
                    return place[name]
        return None

    def _wrong(self, what: str) -> PosefabricError:
        return PosefabricError(f"{self.path}: {what}")

    def _cells(self) -> dict[str, Any]:
        cells = self._get("cell_config")
        if not isinstance(cells, Mapping):
            raise self._wrong(
                "has no cell_config; expected the released code's YAML, with "
                "model.subnetwork_config.cell_config"
            )
        found = {("one-shot-search" if k in ALPHA_KEYS else k): v for k, v in cells.items()}
        if isinstance(found.get("operators"), Sequence):
            # The released code's own examples write "zero" too.
            known = {name.lower(): name for name in OPERATION_NAMES}
            found["operators"] = [known.get(str(x).lower(), x) for x in found["operators"]]
        return {key: value for key, value in found.items() if value is not None}

    def _dataset(self) -> str:
        dataset = self._get("dataset_name", "dataset")
        if dataset is None:
            counts = {len(names): name for name, names in KEYPOINTS.items()}
            dataset = counts.get(self._get("keypoints_num"))
        if str(dataset).lower() not in KEYPOINTS:
            raise self._wrong(f"dataset_name is {dataset}, expected coco or mpii")
        return str(dataset).lower()

    def _backbone(self) -> str:
        names = [self._get("backbone_net_name"), self._get("backbone_name")]
        names += [place.get("backbone") for place in self.places]
        name = next((name for name in names if isinstance(name, str)), None)
        plain = str(name).lower().replace("_", "").replace("-", "")
        if plain == "resnet":
            plain = f"resnet{self._get('backbone_layers') or 50}"
        if plain not in BACKBONES:
            raise self._wrong(
                f"backbone_net_name is {name}, expected resnet (of 50, 101 or 152 layers), "
                f"mobilenet_v2 or hrnet"
            )
        return plain

    def _parts(self, dataset: str) -> dict[str, list[int]]:
        given = self._get("parts")
        if given is None:
            count = self._get("parts_num")
            try:
                return released_parts(dataset, count)
            except PosefabricError as error:
                raise self._wrong(str(error)) from error
        if not isinstance(given, Mapping):
            raise self._wrong("parts: expected a mapping from a part's name to its keypoints")
        names = KEYPOINTS[dataset]
        found = {}
        for part, keypoints in given.items():
            rows = [names.index(k) if k in names else k for k in keypoints]
            if not all(isinstance(k, int) and 0 <= k < len(names) for k in rows):
                raise self._wrong(
                    f"parts.{part} is {list(keypoints)}, expected indices 0 .. {len(names) - 1}, "
                    f"or names: {', '.join(names)}"
                )
            found[str(part)] = rows
        return found

    def _data(self, dataset: str) -> dict[str, Any]:
        data: dict[str, Any] = {
            "skeleton": SKELETONS[dataset],
            "input_wh": self._input_wh(dataset),
            "preset": "posenfs",
            "channel_order": "bgr",
        }
        data |= COCO_FILES if dataset == "coco" else MPII_FILES
        if self.train.get("heatmap_peak_sigma_factor"):
            data["sigma"] = float(self.train["heatmap_peak_sigma_factor"])
        padding = self._get("margin_to_border")
        if padding is not None:
            data["box_padding"] = float(padding)
        return data

    def _input_wh(self, dataset: str) -> list[int]:
        size = self._get("input_size")
        if size is None:
            return list(INPUT_WH[dataset])
        try:
            if isinstance(size, Mapping):
                return [int(size["w"]), int(size["h"])]
            width, height = (size, size) if isinstance(size, int) else size
            return [int(width), int(height)]
        except (KeyError, TypeError, ValueError) as error:
            raise self._wrong(f"input_size is {size}, expected w and h in pixels") from error

    def _augment(self) -> dict[str, Any]:
        train = self.train
        if train.get("augmentation") is False:
            return {"scale": 0, "rotation": 0, "flip": 0, "colour": 0}
        return {
            "scale": train.get("aug_scale", 0.3),
            "rotation": train.get("aug_rotation", 45),
            "flip": 0.5 if train.get("aug_flip", True) else 0,
            "colour": 0,
        }

    def _training(self) -> dict[str, dict[str, Any]]:
        """The search as it was, and a fine-tuning under the same loss."""
        train = self.train
        epochs = train.get("epoch_end", 200)
        steps = train.get("LR_STEP", [90, 120, 150])
        rate = train.get("w_lr_cosine_begin", 1e-3)
        search = {
            "relaxation": "softmax",
            "loss": "mse",
            "epochs": epochs,
            "batch_size": train.get("batchsize", 24),
            "learning_rate": rate,
            "architecture_learning_rate": rate,
            "schedule": "steps",
            "milestones": [step / epochs for step in steps],
            "decay": train.get("LR_FACTOR", 0.25),
        }
        strategy = str(train.get("arch_search_strategy", "sync")).lower()
        if strategy in STRATEGIES:
            search["strategy"] = STRATEGIES[strategy]
        else:
            self.notes.append(f"arch_search_strategy is {strategy}; not set in the run's options")
        return {"search": search, "finetune": {"loss": "mse"}}


ALPHA_KEYS = ("one-shot-search", "one_shot_search")
