"""The released YAML in its variants, the options it becomes, and the tables of parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from released import specification

from posefabric.config import config_from_tree
from posefabric.models.posenfs_parts import KEYPOINTS, SKELETONS, released_parts
from posefabric.models.posenfs_yaml import ReleasedConfig, read_released_config
from posefabric.skeletons import load_skeleton
from posefabric.structures import PosefabricError

CELLS = specification()["cell_config"]
FILE: dict[str, Any] = {
    "model": {
        "backbone_net_name": "resnet",
        "backbone_layers": 101,
        "backbone": {"depth": 12},
        "dataset_name": "coco",
        "keypoints_num": 17,
        "input_size": {"w": 288, "h": 384},
        "margin_to_border": 1.15,
        "subnetwork_config": {"dataset_name": "coco", "parts_num": 3, "cell_config": CELLS},
    },
    "train": {
        "batchsize": 20,
        "arch_search_strategy": "random",
        "epoch_end": 100,
        "LR_STEP": [50, 75],
        "LR_FACTOR": 0.1,
        "w_lr_cosine_begin": 0.002,
        "heatmap_peak_sigma_factor": 3,
        "aug_scale": 0.2,
        "aug_rotation": 30,
        "aug_flip": False,
    },
}


def read(folder: Path, tree: Any) -> ReleasedConfig:
    (folder / "x.yaml").write_text(yaml.safe_dump(tree))
    return read_released_config(folder / "x.yaml")


@pytest.mark.parametrize("dataset", ["coco", "mpii"])
@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_the_parts_are_the_papers(dataset: str, count: int) -> None:
    """The same groups of keypoints as our skeletons', which follow the paper's table."""
    skeleton = load_skeleton(SKELETONS[dataset])
    assert sorted(KEYPOINTS[dataset]) == sorted(skeleton.keypoints)
    parts = released_parts(dataset, count)
    found = {frozenset(KEYPOINTS[dataset][k] for k in rows) for rows in parts.values()}
    ours = skeleton.groupings[count].values()
    assert found == {frozenset(skeleton.keypoints[k] for k in part) for part in ours}


def test_parts_are_named_and_ordered_as_in_the_references(shared: Path) -> None:
    for path in sorted((shared / "reference/posenfs").glob("*.json")):
        spec = json.loads(path.read_text())
        parts = released_parts(spec["dataset"], spec["parts_num"])
        assert list(parts.items()) == list(spec["parts"].items())


def test_the_whole_recipe_becomes_options(tmp_path: Path) -> None:
    released = read(tmp_path, FILE)
    config = config_from_tree(released.options, origin="test")
    assert released.spec["backbone"] == "resnet101"
    assert config.model.backbone == "posenfs_resnet101" and config.model.faithful
    assert config.data.skeleton == "coco17" and config.data.input_wh == (288, 384)
    assert config.data.preset == "posenfs" and config.data.channel_order == "bgr"
    assert config.data.sigma == 3
    assert config.data.val_annotations == "annotations/person_keypoints_val2017.json"
    assert config.data.train_images == "train2017"
    search = config.search
    assert (search.strategy, search.loss, search.batch_size) == ("random", "mse", 20)
    assert (search.epochs, search.milestones, search.decay) == (100, (0.5, 0.75), 0.1)
    assert search.learning_rate == 0.002 and config.finetune.loss == "mse"
    augment = config.augment
    assert (augment.scale, augment.rotation, augment.flip, augment.colour) == (0.2, 30, 0, 0)
    assert config.data.box_padding == 1.15 and released.notes == []


def test_a_flat_specification_will_do(tmp_path: Path) -> None:
    spec = {**specification(dataset="mpii", parts=3), "backbone": "hrnet"}
    released = read(tmp_path, spec)
    assert released.spec["parts"] == spec["parts"]
    assert released.options["model"]["backbone"] == "hrnet_w32_stage3"
    assert released.options["data"]["input_wh"] == [256, 256]
    parts = released.options["model"]["parts"]
    assert parts["head"] == ["head_top", "upper_neck", "thorax"]
    named = {**spec, "parts": parts}
    assert read(tmp_path, named).spec["parts"] == spec["parts"]


def test_other_ways_to_write_it(tmp_path: Path) -> None:
    cells = {k: v for k, v in CELLS.items() if k != "one-shot-search"}
    cells |= {"operators": ["zero", "SKIP_connect"], "one_shot_search": False}
    tree = {
        "backbone_net_name": "MobileNet-V2",
        "keypoints_num": 16,
        "input_size": 320,
        "subnetwork_config": {"parts_num": 1, "cell_config": cells},
        "train": {"augmentation": False, "arch_search_strategy": "evolution"},
    }
    released = read(tmp_path, tree)
    assert released.spec["dataset"] == "mpii"
    assert released.options["data"]["format"] == "mpii"
    assert released.spec["cell_config"]["operators"] == ["Zero", "skip_connect"]
    assert released.spec["cell_config"]["one-shot-search"] is False
    assert released.options["data"]["input_wh"] == [320, 320]
    assert set(released.options["augment"].values()) == {0}
    assert released.notes == ["arch_search_strategy is evolution; not set in the run's options"]
    tree["train"]["arch_search_strategy"] = "second_order_gradient"
    assert read(tmp_path, tree).options["search"]["strategy"] == "second_order"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected sections, got list"),
        ("a: [", "cannot be read as YAML"),
        ("cell_config: {depth: 6}", "dataset_name is None, expected coco or mpii"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(PosefabricError, match=rf"x\.yaml: {message}"):
        read_released_config(tmp_path / "x.yaml")
