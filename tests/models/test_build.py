"""Networks from configurations and from run folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainings import make_config

from posefabric.data.pipeline import make_codec
from posefabric.models.build import (
    build_supernet,
    choose_device,
    load_network,
    make_head,
    make_shape,
)
from posefabric.models.compact import CompactNetwork, build_compact
from posefabric.models.supernet import Supernet
from posefabric.models.weights import save_weights
from posefabric.run import RunFolder
from posefabric.structures import PosefabricError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu") == choose_device("cpu")
    with pytest.raises(PosefabricError, match="device=cuda:1: this torch sees no GPU"):
        choose_device("cuda:1")
    with pytest.raises(PosefabricError, match="device=gpu: expected auto, cpu, cuda"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:0") == torch.device("cuda:0")


def test_a_supernet_follows_its_configuration() -> None:
    config = make_config(
        model=dict(
            parts=5,
            channel_factor=3,
            hidden_nodes=2,
            shared_alpha=False,
            operations=["skip", "max_pool_3x3"],
            head="vector",
            vector_dim=2,
        ),
        search=dict(loss="mse", relaxation="sparsemax"),
        data=dict(input_wh=[64, 96]),
    )
    network = build_supernet(config)
    assert {part.name for part in network.graph.parts} == set(network.alphas)
    assert len(network.alphas) == 5 and network.graph.input_wh == (64, 96)
    assert tuple(next(iter(network.alphas.values())).shape) == (6, 3, 2)
    assert network.graph.parts[0].cells[-1].width == 12
    assert network.graph.skeleton == "coco17" and len(network.graph.keypoint_names) == 17
    assert network.relaxation == "sparsemax"
    assert network(torch.zeros(1, 3, 96, 64)).shape == (1, 17, 24, 16)
    head = make_head(config)
    assert (head.kind, head.dim, head.scores, head.peak) == ("vector", 2, "identity", 1.0)
    logits = make_head(make_config())
    assert logits.scores == "softmax"
    assert logits.peak == make_codec(make_config().data).target_peak
    assert make_shape(config).operations == ("skip", "max_pool_3x3")


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (build_supernet(make_config(seed=s)).state_dict() for s in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_random_parts_follow_the_seed() -> None:
    def parts(seed: int) -> list[tuple[int, ...]]:
        graph = build_supernet(make_config(seed=seed, model=dict(parts="random"))).graph
        return [part.keypoints for part in graph.parts]

    assert parts(1) == parts(1) != parts(2)


def test_a_frozen_stem() -> None:
    network = build_supernet(make_config(model=dict(frozen_stem=True)))
    assert any(not p.requires_grad for p in network.backbone.parameters())
    assert all(p.requires_grad for p in network.head_parameters())
    assert all(p.requires_grad for p in build_supernet(make_config()).parameters())


def test_finished_runs_load_what_they_saved(tmp_path: Path) -> None:
    config = make_config()
    search = RunFolder.create(tmp_path / "run", config=config, kind="search")
    with pytest.raises(PosefabricError, match=r"has no weights.safetensors \(state: running\)"):
        load_network(search)
    mixture = build_supernet(config)
    with torch.no_grad():
        for parameter in mixture.arch_parameters().values():
            parameter.normal_()
    save_weights(search.weights_path, mixture)
    loaded = load_network(search)
    assert isinstance(loaded, Supernet) and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), mixture.eval()(IMAGES))
    assert loaded.architecture() == mixture.architecture()

    child = search.new_child("derive", config)
    compact = build_compact(mixture.architecture()).eval()
    child.write_text("architecture.json", compact.architecture().to_json())
    save_weights(child.weights_path, compact)
    loaded = load_network(child)
    assert isinstance(loaded, CompactNetwork)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), compact(IMAGES))
