"""Baselines as runs: trained, resumed, shipped, and kept apart from searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from trainings import make_config

from posefabric import cli
from posefabric.config import Config
from posefabric.deploy.predictor import PoseEstimator
from posefabric.deploy.run_export import export_run
from posefabric.deploy.run_report import build_report, shipped_network
from posefabric.derive.run_derive import derive, finetune
from posefabric.models.baselines import Branchnet
from posefabric.models.build import build_baseline, build_supernet, load_network
from posefabric.run import RunFolder
from posefabric.skeletons import load_skeleton
from posefabric.structures import PosefabricError
from posefabric.train import loop
from posefabric.train.from_start import train_from_start

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, dict[str, Any]] = {
    "branchnet": dict(network="branchnet", branch_width=8, branch_blocks=1, parts=3),
    "simple_baseline": dict(network="simple_baseline", deconv_width=8),
    "hrnet": dict(network="hrnet", backbone="hrnet_w2", head="vector"),
}


def config_of(network: str, **finetune: Any) -> Config:
    return make_config(
        model=SMALL[network], data=dict(synthetic_val=4), finetune=dict(epochs=0.5, **finetune)
    )


def new_run(path: Path, config: Config) -> RunFolder:
    return RunFolder.create(path, config=config, kind="train")


@pytest.fixture(scope="module", params=SMALL)
def trained(request, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp(request.param)
    run = new_run(folder / "run", config_of(request.param, loss="mse"))
    _, result = train_from_start(run)
    assert result["train_steps"] == 2 and run.state == "finished"
    return run


@pytest.mark.slow
def test_a_run_of_a_baseline_is_shipped(trained: RunFolder) -> None:
    network = load_network(trained)
    assert network.graph.head.scores == "identity", "made for finetune.loss"
    folded = shipped_network(trained)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        expected = network(IMAGES)
        torch.testing.assert_close(folded(IMAGES), expected, rtol=1e-4, atol=1e-6)
    exported = export_run(trained, trained.onnx_path, measure=False)
    check = exported.check
    assert exported.path.is_file()
    assert check["score_maps_difference"] <= 1e-3 * check["largest_score"]
    estimator = PoseEstimator.load(trained.path)
    (prediction,) = estimator.predict(np.zeros((64, 64, 3), np.uint8))
    assert prediction.keypoints.shape == (1, 17, 2)
    page = build_report(trained).read_text()
    assert "What was trained" in page and network.graph.digest() in page


@pytest.mark.slow
def test_the_command_line_trains_a_baseline(tmp_path: Path, monkeypatch, capsys) -> None:
    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["posefabric", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out + said.err

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config_of("branchnet").model_dump(mode="json")))
    width = ["model.branch_width=4"]
    assert command("train", path, *width, "--out", "run")[0] == 0
    assert RunFolder.open("run").config.model.branch_width == 4
    assert "is finished already" in command("train", path, *width, "--resume", "--out", "run")[1]
    assert command("eval", "run", "--no-flip")[0] == 0
    status, said = command("show", "run", "--no-report")
    assert status == 0 and "branchnet: 4 channels, 1 residual blocks" in said
    assert command("train", "run")[0] == 0, "trained on, in a child"
    assert RunFolder.open("run").resolve("auto").path.name == "01-train"
    for words, message in (
        (("search", path, "--out", "x"), "nothing to search"),
        (("train", "demo", "--out", "x"), "not known before a search"),
        (("train", path), "or --out RUN"),
        (("train", "demo"), "or --out RUN"),
        (("train",), "or --out RUN"),
        (("train", "run", "--out", "x"), "whose trainings are its children"),
        (("derive", "run"), "nothing to derive"),
    ):
        status, said = command(*words)
        assert status == 1 and message in said and "Traceback" not in said
    assert not Path("x").exists()


def test_a_stopped_training_goes_on_exactly(tmp_path: Path, monkeypatch) -> None:
    config = make_config(model=SMALL["branchnet"], data=dict(synthetic_val=4))
    whole = new_run(tmp_path / "whole", config)
    train_from_start(whole)
    stopped = new_run(tmp_path / "stopped", config)
    step = loop.Trainer._train_step

    def stopping(self: loop.Trainer, batch: Any, number: int, held_out: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, batch, number, held_out)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "_train_step", stopping)
        train_from_start(stopped)
    train_from_start(RunFolder.open(stopped.path))
    assert stopped.weights_path.read_bytes() == whole.weights_path.read_bytes()


def test_a_baseline_has_nothing_to_derive(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", config_of("branchnet"))
    train_from_start(run)
    with pytest.raises(PosefabricError, match="holds a branchnet, in which there is nothing"):
        derive(run, run.new_child("derive", run.config))
    child = run.new_child("train", run.config)
    network, result = finetune(run, child)
    assert isinstance(network, Branchnet) and result["train_steps"] == 2
    assert json.loads(child.read_bytes("architecture.json"))["network"] == "branchnet"


def test_searches_and_trainings_are_kept_apart() -> None:
    with pytest.raises(PosefabricError, match=r"model\.network=hrnet: there is nothing to search"):
        build_supernet(config_of("hrnet"))
    with pytest.raises(PosefabricError, match=r"model\.network=fabric: its architecture is not"):
        build_baseline(make_config())


def test_branchnet_takes_a_random_partition_and_a_frozen_stem() -> None:
    config = make_config(model={**SMALL["branchnet"], "parts": "random", "frozen_stem": True})
    network = build_baseline(config)
    found = sorted(k for part in network.graph.parts for k in part.keypoints)
    assert len(network.graph.parts) > 1 and found == list(range(17))
    assert any(not p.requires_grad for p in network.backbone.parameters())
    network = build_baseline(make_config(model={**SMALL["hrnet"], "frozen_stem": True}))
    resting = [n for n, p in network.backbone.named_parameters() if not p.requires_grad]
    assert {name.split(".")[1] for name in resting} == {"conv1", "bn1", "conv2", "bn2", "layer1"}


def test_branchnet_on_the_papers_backbone_with_parts_of_ones_own() -> None:
    parts = {"face": ["nose", "left_eye"], "rest": list(load_skeleton("coco17").keypoints[1:])}
    model = {**SMALL["branchnet"], "backbone": "hrnet_w32_stage3", "weights": "none"}
    model |= {"parts": parts, "head": "vector3d", "vector_dim": 2}
    network = build_baseline(make_config(model=model, data=dict(channel_order="bgr"))).eval()
    assert {part.name: part.keypoints for part in network.graph.parts} == {
        "face": (0, 1),
        "rest": tuple(range(1, 17)),
    }
    assert network.backbone.channels == (32, 64, 128, 256)
    assert network.normalisation.channel_order == "bgr"
    with torch.no_grad():
        assert network(IMAGES[:1]).shape == (1, 17, 16, 16)


def test_a_baselines_own_loss_decides_about_empty_targets() -> None:
    chosen = dict(data=dict(outside_weight=0.5), model=SMALL["branchnet"])
    make_config(**chosen, finetune=dict(loss="mse"))
    with pytest.raises(PosefabricError, match=r"data\.outside_weight"):
        make_config(**chosen, search=dict(loss="mse"))
