"""Fabric backbones: their sizes, and that they are searched, pruned and folded like parts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from networks import PLAIN, make_fabric_supernet
from trainings import make_config

from posefabric import cli
from posefabric.deploy.metro import describe_architecture, draw_architecture
from posefabric.derive.discretize import discretize
from posefabric.derive.fold import fold
from posefabric.derive.prune import prune
from posefabric.derive.transfer import transfer_weights
from posefabric.models.build import build_baseline, build_supernet
from posefabric.models.compact import CompactNetwork, build_compact
from posefabric.models.fabric_backbone import POOLS, build_fabric_backbone, fabric_backbone_shape
from posefabric.models.supernet import Supernet
from posefabric.run import RunFolder
from posefabric.space.architecture import Architecture, Head
from posefabric.space.fabric import BackboneShape, FabricShape
from posefabric.structures import PosefabricError
from posefabric.train.optim import weight_groups

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
POOLED = (*PLAIN, *POOLS)


def compact_of(graph: Architecture, mixture: Supernet) -> CompactNetwork:
    network = build_compact(graph)
    transfer_weights(mixture, network)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "params"), [("fabric_1", 5.8e6), ("fabric_2", 6.8e6), ("fabric_3", 10.5e6)]
)
def test_the_sizes_are_those_of_the_paper(name: str, params: float) -> None:
    """PAPER section 4; the depth and widths behind these numbers are not published."""
    shape = fabric_backbone_shape(name, operations=PLAIN, faithful=False, levels=4)
    assert shape.operations == POOLED
    with torch.device("meta"):
        backbone = build_fabric_backbone(name, shape)
    found = sum(p.numel() for p in backbone.parameters())
    assert found == pytest.approx(params, rel=0.003)


def test_layers_open_and_stop_where_nothing_reads_them() -> None:
    def cells(levels: int) -> list[int]:
        shape = BackboneShape(5, 0, 1, 1, POOLED, levels=levels)
        return [shape.cells_in(layer) for layer in range(-1, 5)]

    assert cells(4) == [1, 2, 3, 4, 4, 4]
    assert cells(2) == [1, 2, 3, 4, 3, 2]
    with pytest.raises(PosefabricError, match="3 layers or more, from layer 0"):
        BackboneShape(2, 0, 1, 1, POOLED)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("first_layer", [1, 3, 4])
def test_every_weight_is_used(first_layer: int, faithful: bool) -> None:
    network = make_fabric_supernet(first_layer=first_layer, faithful=faithful).train()
    pyramid = network.backbone(IMAGES)
    assert [level.shape[1] for level in pyramid] == list(network.backbone.channels)
    assert [level.shape[-1] for level in pyramid] == [16, 8, 4, 2][: len(pyramid)]
    outputs = network(IMAGES)
    assert outputs.shape == (2, 4, 16, 16)
    (outputs * torch.randn(outputs.shape)).sum().backward()
    idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_alpha_and_beta_of_the_backbone_are_architecture_parameters() -> None:
    network = make_fabric_supernet()
    found = network.arch_parameters()
    assert list(found)[:2] == ["backbone.alphas", "backbone.betas"] and len(found) == 6
    # Three edges of six candidates; layers of 2, 3 and 4 cells.
    assert found["backbone.alphas"].shape == (1, 3, 6)
    assert found["backbone.betas"].shape == (9, 3)
    config = make_config().search
    weights = {id(p) for group in weight_groups(network, config) for p in group["params"]}  # type: ignore[union-attr]
    assert not weights & {id(p) for p in found.values()}
    with torch.no_grad():
        for parameter in found.values():
            parameter.zero_()
        assert network.entropies() == pytest.approx({"alpha_entropy": 1, "beta_entropy": 1})
        uniform = [float(value) for value in network.indecision()]
        for name in ("backbone.alphas", "backbone.betas"):
            found[name][..., 0] = 50.0
        decided = network.entropies()
        assert decided["alpha_entropy"] == pytest.approx(2 / 3, abs=1e-4)
        assert 2 / 3 < decided["beta_entropy"] < 0.9, "some cells lack the first source"
        assert all(float(a) < b for a, b in zip(network.indecision(), uniform, strict=True))


def test_a_copy_goes_by_its_own_alpha() -> None:
    network = make_fabric_supernet()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        before = network.backbone(IMAGES)[0]
        twin.alphas["backbone"].copy_(torch.randn(1, 3, 6) * 3)
        assert torch.equal(network.backbone(IMAGES)[0], before)
        assert not torch.allclose(twin.backbone(IMAGES)[0], before)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("relaxation", ["softmax", "sparsemax"])
def test_pruned_and_folded_it_computes_the_same(relaxation: str, faithful: bool) -> None:
    mixture = make_fabric_supernet(seed=3, relaxation=relaxation, faithful=faithful).double()
    images = IMAGES.double()
    graph = prune(mixture.architecture())
    compact = build_compact(graph).double().eval()
    transfer_weights(mixture, compact)
    with torch.no_grad():
        expected = mixture(images)
        scale = expected.abs().max()
        assert float((compact(images) - expected).abs().max() / scale) < 1e-6
        folded = fold(compact).double()
        assert float((folded(images) - compact(images)).abs().max() / scale) < 1e-6
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if relaxation == "sparsemax":
        assert graph.backbone.fabric is not None and mixture.graph.backbone.fabric is not None
        assert count(graph) < count(mixture.graph)


def count(graph: Architecture) -> int:
    assert graph.backbone.fabric is not None
    return sum(len(e.choices) for cell in graph.backbone.fabric.cells for e in cell.edges)


def test_levels_that_nothing_reads_are_pruned_from_the_backbone() -> None:
    mixture = make_fabric_supernet()
    with torch.no_grad():
        for part in ("upper", "lower"):
            beta = mixture.betas[part]
            beta.zero_()
            # Layer 3 reads the next coarser level alone; of it, layer 4 the finest cell.
            beta[0, 2] = beta[3, 0] = beta[5, 0] = 1e4
    mixture.relaxation = "sparsemax"
    graph = prune(mixture.architecture())
    assert [(c.layer, c.scale) for c in graph.parts[0].cells] == [(3, 0), (4, 0), (5, 0)]
    assert graph.backbone.channels == (4, 8)
    fabric = graph.backbone.fabric
    assert fabric is not None
    assert [c.scale for c in fabric.cells if c.layer == 2] == [1], "level 0 is not read"
    compact = compact_of(graph, mixture)
    with torch.no_grad():
        assert [tuple(level.shape) for level in compact.backbone(IMAGES)] == [
            (2, 0, 16, 16),
            (2, 8, 8, 8),
        ]
        torch.testing.assert_close(compact(IMAGES), mixture(IMAGES), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fold(compact)(IMAGES), compact(IMAGES), rtol=1e-4, atol=1e-5)


def test_limits_hold_for_the_backbone_too() -> None:
    graph = prune(
        discretize(make_fabric_supernet().architecture(), operations_kept=1, sources_kept=1)
    )
    assert graph.backbone.fabric is not None
    for cell in graph.backbone.fabric.cells:
        assert len(cell.sources) == 1 and all(len(edge.choices) == 1 for edge in cell.edges)
    build_compact(graph)(IMAGES)


def test_the_graph_goes_through_json_and_is_drawn() -> None:
    graph = make_fabric_supernet().architecture()
    assert Architecture.from_json(graph.to_json()) == graph
    tree = json.loads(graph.to_json())
    assert tree["backbone"]["fabric"]["name"] == "backbone"
    plain = build_supernet(make_config()).architecture()
    assert "fabric" not in json.loads(plain.to_json())["backbone"]
    assert Architecture.from_json(plain.to_json()) == plain
    other = prune(discretize(graph, operations_kept=1, sources_kept=None))
    assert any(line.startswith("- backbone layer 0") for line in graph.diff(other))
    assert "backbone (9 cells): the pyramid" in describe_architecture(graph)
    figure = draw_architecture(graph)
    assert len(figure.axes) == 4, "the backbone, two parts, the legend"
    said = {text.get_text() for text in figure.axes[0].texts}
    assert {"backbone", "stem", "64 ch", "pyramid"} <= said
    assert "stem" not in {text.get_text() for text in figure.axes[1].texts}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(weights="hub"), r"model\.weights=hub: a fabric backbone \(fabric_1\) has no"),
        (dict(frozen_stem=True), r"model\.frozen_stem=true: the stem of fabric_1"),
    ],
)
def test_what_needs_learned_weights_is_refused(model: dict, message: str) -> None:
    with pytest.raises(PosefabricError, match=message):
        build_supernet(make_config(model=dict(backbone="fabric_1", **model)))


def test_a_baseline_has_no_searched_backbone() -> None:
    config = make_config(model=dict(network="branchnet", backbone="fabric_2"))
    with pytest.raises(PosefabricError, match=r"model\.backbone=fabric_2: is searched"):
        build_baseline(config)


def test_a_part_of_that_name_is_told() -> None:
    own = BackboneShape(3, 0, 1, 1, POOLED)
    with pytest.raises(PosefabricError, match="is called backbone too"):
        Supernet(
            shape=FabricShape(6, 3, 2, 1, PLAIN),
            parts={"backbone": (0, 1)},
            backbone=build_fabric_backbone("fabric_1", own),
            skeleton="two",
            keypoint_names=("a", "b"),
            input_wh=(64, 64),
            head=Head(),
            backbone_shape=own,
        )


@pytest.mark.slow
def test_search_derive_and_eval(tmp_path: Path, monkeypatch) -> None:
    def command(*words: object) -> None:
        monkeypatch.setattr("sys.argv", ["posefabric", *map(str, words)])
        cli.main()

    options = [
        "data.input_wh=[64,64]",
        "data.synthetic_train=8",
        "data.synthetic_val=4",
        "model.backbone=fabric_1",
        "model.weights=none",
        "model.frozen_stem=false",
        "model.channel_factor=2",
        "search.epochs=2",
        "search.worth_persons=8",
        "search.batch_size=4",
        "search.precision=fp32",
        "search.architecture_learning_rate=0.3",
        "search.architecture_start=0",
        "finetune.epochs=1",
        "finetune.batch_size=4",
        "finetune.precision=fp32",
        "derive.operations_kept=1",
        "derive.sources_kept=1",
    ]
    for words in (
        ("search", "demo", *options, "--out", tmp_path / "run"),
        ("derive", tmp_path / "run", "--finetune"),
        ("eval", tmp_path / "run", "--no-flip"),
        ("export", tmp_path / "run"),
        ("show", tmp_path / "run", "--no-report"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(*words)
            raise SystemExit(0)
        assert not stop.value.code, words
    run = RunFolder.open(tmp_path / "run")
    searched = Architecture.load(run.architecture_path)
    assert searched.backbone.fabric is not None
    weights = {c.weight for c in searched.backbone.fabric.cells[0].edges[0].choices}
    assert len(weights) > 1, "alpha of the backbone has moved"
    compact = run.resolve("compact")
    kept = Architecture.load(compact.architecture_path)
    assert compact.kind == "train" and count(kept) < count(searched)
    record = compact.parent.read_json("derivation.json")  # type: ignore[union-attr]
    assert record["differences"]["prune"] < 1e-4 and record["differences"]["fold"] < 1e-4
    assert (run.path / "model.onnx").is_file()


def test_a_frozen_stem_is_its_two_convolutions() -> None:
    backbone = make_fabric_supernet().backbone.train()
    backbone.freeze_to_stride_4()
    resting = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert resting and resting == {n for n, _ in backbone.named_parameters() if "stem" in n}
    assert not backbone.train().stem[1].training and backbone.reduce.training  # type: ignore[index]
