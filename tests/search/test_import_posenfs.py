"""Released checkpoints as runs: what is imported, how it may be wrapped, every command on it."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from networks import command
from released import make_state, specification
from torch import Tensor

from posefabric.evaluate.reference import (
    fill_by_name,
    reference_quantities,
    relative_difference,
)
from posefabric.models.build import load_network
from posefabric.models.posenfs import load_posenfs
from posefabric.models.posenfs_parts import KEYPOINTS, released_parts
from posefabric.models.supernet import Supernet
from posefabric.run import RunFolder
from posefabric.search.import_posenfs import import_posenfs
from posefabric.structures import PosefabricError

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3)).double()


def released_yaml(spec: Mapping[str, Any], *, input_wh: tuple[int, int] = (64, 64)) -> dict:
    """A specification in the layout of the released code's files, parts left to the tables."""
    return {
        "model": {
            "backbone_net_name": spec["backbone"],
            "backbone": {"depth": 12},
            "input_size": {"w": input_wh[0], "h": input_wh[1]},
            "subnetwork_config": {
                "dataset_name": spec["dataset"],
                "parts_num": spec["parts_num"],
                "cell_config": dict(spec["cell_config"]),
            },
        },
        "train": {"batchsize": 24, "epoch_end": 200, "LR_STEP": [90, 120, 150]},
    }


def released_specification(**options: Any) -> dict[str, Any]:
    """A small one whose parts have the released code's own names."""
    spec = specification(**options)
    return {**spec, "parts": released_parts(spec["dataset"], spec["parts_num"])}


def write(folder: Path, content: Any, tree: Mapping[str, Any]) -> tuple[Path, Path]:
    checkpoint, config = folder / "best.pth.tar", folder / "released.yaml"
    torch.save(content, checkpoint)
    config.write_text(yaml.safe_dump(dict(tree)))
    return checkpoint, config


def in_released_order(network: Supernet, dataset: str) -> list[int]:
    return [network.graph.keypoint_names.index(name) for name in KEYPOINTS[dataset]]


def mixture(run: RunFolder) -> Supernet:
    network = load_network(run)
    assert isinstance(network, Supernet)
    return network.double().eval()


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv2_cnf3_coco_vector8_percell",
        pytest.param("hrnet_w32_cnf5_mpii_heatmap", marks=pytest.mark.slow),
        pytest.param("resnet50_cnf3_coco_vector8", marks=pytest.mark.slow),
    ],
)
def test_an_imported_run_has_the_reference_values(
    shared: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    spec = json.loads((shared / f"reference/posenfs/{name}.json").read_text())
    expected = np.load(shared / f"reference/posenfs/{name}.npz")
    state = {key: value.float() for key, value in fill_by_name(dict(spec["state"])).items()}
    tree = released_yaml(spec, input_wh=(spec["input"][3], spec["input"][2]))
    checkpoint, config = write(tmp_path, state, tree)
    out = tmp_path / "run"
    assert command(monkeypatch, "import-posenfs", checkpoint, config, "--out", out) == 0
    network = mixture(RunFolder.open(out))
    order = in_released_order(network, spec["dataset"])
    found = reference_quantities(
        network, spec["input"], spec["output"], arch=network.arch_parameters()
    )
    for key in ("heatmaps_train", "heatmaps_eval"):
        assert relative_difference(found[key][:, order], expected[key]) < 1e-6
    if spec["dataset"] == "coco":  # the target knows only the released order
        for key in (key for key in found if key.startswith("grad.")):
            value = found[key].reshape(expected[key].shape)
            assert relative_difference(value, expected[key]) < 1e-8


CONFIGURATIONS = {
    "mpii, summed parts": dict(dataset="mpii", parts=8, depth=4, factor=1),
    "width equal on one level": dict(factor=4, depth=4),
    "volume of vectors": dict(
        dataset="mpii", vector_in_pixel=True, convolution_mode="3D", vector_dim=3
    ),
    "hidden nodes, own alpha": dict(
        depth=5, hidden_states_num=2, one_shot=False, vector_in_pixel=True
    ),
    "unused input node": dict(depth=4, hidden_states_num=2, input_nodes_num=2),
    "two levels": dict(depth=4, operators=["conv_3x3", "avg_pool_3x3", "Bottle_Conv_3x3"]),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_any_configuration_is_what_load_posenfs_computes(tmp_path: Path, name: str) -> None:
    spec = released_specification(**CONFIGURATIONS[name])
    state = {key: value.float() for key, value in make_state(spec).items()}
    source = load_posenfs(spec, state).double().eval()
    checkpoint, config = write(tmp_path, state, released_yaml(spec))
    run, record = import_posenfs(checkpoint, config, tmp_path / "run")
    assert record["difference"] < 1e-12
    network = mixture(run)
    with torch.no_grad():
        found = network(IMAGES)[:, in_released_order(network, spec["dataset"])]
        assert relative_difference(found, source(IMAGES)) < 1e-12
    options = run.config
    assert options.data.channel_order == network.normalisation.channel_order == "bgr"
    assert options.model.shared_alpha == spec["cell_config"]["one-shot-search"]
    assert [p.name for p in network.graph.parts] == list(spec["parts"])


def variants(state: dict[str, Tensor]) -> dict[str, Any]:
    parallel = {f"module.{name}": value for name, value in state.items()}
    return {
        "bare": state,
        "parallel": parallel,
        "wrapped": {"epoch": 200, "state_dict": parallel, "perf": np.float64(0.9)},
        "twice": {"model": {"state_dict": state}, "optimizer": {"lr": 1.0}},
        "by another name": {"epoch": 3, "best": state},
    }


@pytest.mark.parametrize("name", list(variants({})))
def test_a_checkpoint_may_be_wrapped(tmp_path: Path, name: str) -> None:
    spec = released_specification(depth=4, one_shot=False, input_nodes_num=2)
    state = {key: value.float() for key, value in make_state(spec).items()}
    state["whole_body.cell_3_0.cell_arch.1.ops.2.operation.0.weight"] = torch.zeros(8, 1, 3, 3)
    tree = released_yaml(spec)
    # Files from before that option lack it; the shape of alpha tells.
    del tree["model"]["subnetwork_config"]["cell_config"]["one-shot-search"]
    run, record = import_posenfs(*write(tmp_path, variants(state)[name], tree), tmp_path / "run")
    assert record["unused_tensors"] > 0 and not run.config.model.shared_alpha
    assert torch.equal(mixture(run).alphas["whole_body"].float(), state["whole_body.alphas"][:, :1])
    assert run.kind == "search" and run.state == "finished"


def test_pickled_code_is_not_run_and_what_it_wants_is_said(tmp_path: Path) -> None:
    content = {"state_dict": {"x": torch.zeros(1)}, "args": argparse.Namespace(a=1)}
    checkpoint, config = write(tmp_path, content, released_yaml(specification()))
    with pytest.raises(PosefabricError, match=r"pickled code of argparse\.Namespace, .* not run"):
        import_posenfs(checkpoint, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.backbone_net_name", "meta_arch", "backbone_net_name is meta_arch, expected"),
        ("model.subnetwork_config.dataset_name", "lsp", "dataset_name is lsp, expected coco or"),
        ("model.subnetwork_config.parts_num", 4, "parts_num is 4, expected 1, 3, 5 or 8"),
        ("model.subnetwork_config.parts", {"a": ["tail"]}, r"parts\.a is \['tail'\], expected"),
        ("model.subnetwork_config.cell_config", None, "has no cell_config"),
        ("model.subnetwork_config.cell_config.depth", None, "depth: Field required"),
        ("model.subnetwork_config.cell_config.factor", 3, "wrong shape: "),
        ("model.subnetwork_config.parts_num", 3, "missing: upper_limb_part.alphas"),
        ("model.input_size", "large", "input_size is large"),
        ("model.input_size", {"w": 100, "h": 64}, "multiples of 32"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    spec = released_specification(depth=4)
    tree = copy.deepcopy(released_yaml(spec))
    node: Any = tree
    for key in path.split(".")[:-1]:
        node = node[key]
    node[path.split(".")[-1]] = value
    checkpoint, config = write(tmp_path, make_state(spec), tree)
    with pytest.raises(PosefabricError, match=message) as error:
        import_posenfs(checkpoint, config, tmp_path / "run")
    assert "released.yaml" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_network_cannot_be_overridden(tmp_path: Path) -> None:
    paths = write(tmp_path, {}, released_yaml(specification()))
    with pytest.raises(PosefabricError, match=r"model\.depth=5: comes from the checkpoint"):
        import_posenfs(*paths, tmp_path / "run", overrides=["data.root=x", "model.depth=5"])


@pytest.mark.slow
def test_every_command_takes_an_imported_run(tmp_path: Path, monkeypatch, capsys) -> None:
    spec = released_specification(depth=4, parts=3, vector_in_pixel=True, factor=1)
    checkpoint, config = write(tmp_path, make_state(spec), released_yaml(spec))
    out, people, found = tmp_path / "run", tmp_path / "people", tmp_path / "found"
    made = ["data", "synthetic", people, "--train", 4, "--val", 2]
    assert command(monkeypatch, *made) == 0
    assert command(monkeypatch, "import-posenfs", checkpoint, config, "--out", out) == 0
    assert "next: posefabric eval" in capsys.readouterr().out
    data = [
        f"data.root={people}",
        "data.train_annotations=annotations/train.json",
        "data.val_annotations=annotations/val.json",
        "data.train_images=train",
        "data.val_images=val",
    ]
    assert command(monkeypatch, "eval", out, *data) == 0
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "eval", out, *data, "data.channel_order=rgb") == 1
    assert "trained on bgr" in capsys.readouterr().err
    assert command(monkeypatch, "predict", out, people / "val", "--out", found) == 0
    mixture_found = json.loads((found / "predictions.json").read_text())
    assert command(monkeypatch, "export", out) == 0
    assert "noise" in capsys.readouterr().out
    model = out / "model.onnx"
    assert command(monkeypatch, "predict", model, people / "val", "--out", found / "onnx") == 0
    onnx_found = json.loads((found / "onnx" / "predictions.json").read_text())
    # Scores would differ if the file did not turn RGB into BGR as the run does.
    for ours, theirs in zip(mixture_found, onnx_found, strict=True):
        assert theirs["score"] == pytest.approx(ours["score"], rel=1e-3)
    assert command(monkeypatch, "derive", out, *data) == 0
    derived = RunFolder.open(out).resolve("compact")
    differences = derived.read_json("derivation.json")["differences"]
    assert differences["prune"] < 1e-5 and differences["fold"] < 1e-5
    assert load_network(derived).normalisation.channel_order == "bgr"
    short = ["finetune.epochs=1", "finetune.batch_size=2", "data.workers=0", "device=cpu"]
    assert command(monkeypatch, "train", out, *data, *short) == 0
    assert RunFolder.open(out).resolve("compact").kind == "train"
    assert command(monkeypatch, "show", out, *data) == 0
    assert (out / "report.html").is_file()
