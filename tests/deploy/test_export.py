"""An exported file computes what torch does, alone, quietly, and says all about itself."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import make_supernet
from tiny_network import FOUR, TinyNetwork, blobs, tiny_config

from posefabric import __version__
from posefabric.deploy.export import export_onnx
from posefabric.structures import PosefabricError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CROPS = np.stack([blobs(seed, 96, 64) for seed in range(5)])
MIXTURE: dict[str, Any] = dict(first_layer=4, parts={"all": (0, 1, 2, 3)})


def session_of(path: Path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def mixture_file(tmp_path_factory: pytest.TempPathFactory):
    """An untrained mixture, exported: (network, path, report)."""
    network = make_supernet(**MIXTURE)
    path = tmp_path_factory.mktemp("mixture") / "deep" / "model.onnx"
    crops = np.stack([blobs(seed, 64, 64) for seed in range(3)])
    report = export_onnx(
        network, path, config=tiny_config(input_wh=(64, 64)), skeleton=FOUR, crops=crops
    )
    return network, path, report


def test_a_mixture_becomes_a_plain_graph_that_computes_the_same(mixture_file) -> None:
    network, path, report = mixture_file
    crops = np.stack([blobs(seed, 64, 64) for seed in range(20, 26)])
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = network.score_maps(network(network.normalisation.apply(pixels))).numpy()
    (found,) = session_of(path).run(["heatmaps"], {"images": crops})
    variation = np.ptp(expected, axis=(2, 3)).min()
    assert variation > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * variation)
    assert 0 < report["score_maps_difference"] < 1e-4
    assert report["checked_on"] == "3 crops given"
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "Conv" in operators and "BatchNormalization" not in operators


def test_it_leaves_the_network_as_it_was(mixture_file) -> None:
    network, _, _ = mixture_file
    fresh = make_supernet(**MIXTURE)
    for (name, mine), theirs in zip(
        network.state_dict().items(), fresh.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    report = export_onnx(TinyNetwork(), path, config=tiny_config("udp"), skeleton=FOUR, crops=CROPS)
    return path, report


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 17])
def test_the_batch_is_free(tiny_file, batch: int) -> None:
    path, _ = tiny_file
    crops = np.concatenate([CROPS] * 4)[:batch]
    maps, keypoints, scores = session_of(path).run(None, {"images": crops})
    assert maps.shape == (batch, 4, 24, 16)
    assert keypoints.shape == (batch, 4, 2) and scores.shape == (batch, 4)
    np.testing.assert_allclose(scores, np.clip(maps.max(axis=(2, 3)), 0, 1), atol=1e-6)
    row, column = np.divmod(maps.reshape(batch, 4, -1).argmax(-1), 16)
    cells = np.stack([column, row], axis=-1) * np.array([63 / 15, 95 / 23])
    assert np.abs(keypoints - cells).max() <= 63 / 15 + 1e-3


def test_the_report_gives_the_differences(tiny_file) -> None:
    path, report = tiny_file
    assert report["path"] == str(path) and report["bytes"] == path.stat().st_size
    assert report["opset"] == 18 and report["outputs"] == "heatmaps, keypoints, scores"
    assert report["score_maps_difference"] < 1e-5
    assert report["keypoints_difference_px"] < 0.05
    assert report["keypoints_apart"] == 0
    json.dumps(report)


def test_the_metadata_tells_how_to_use_the_file(tiny_file, mixture_file) -> None:
    stored = session_of(tiny_file[0]).get_modelmeta()
    metadata = {key: json.loads(text) for key, text in stored.custom_metadata_map.items()}
    assert stored.producer_name == "posefabric"
    assert metadata["posefabric"] == __version__
    assert metadata["skeleton"]["keypoints"] == ["a", "b", "c", "d"]
    assert metadata["skeleton"]["flip_pairs"] == [[0, 2]]
    assert metadata["skeleton"]["limbs"] == [[0, 1], [1, 2], [2, 3]]
    assert metadata["skeleton"]["sigmas"] == [0.05, 0.06, 0.07, 0.08]
    assert metadata["input_wh"] == [64, 96] and metadata["preset"] == "udp"
    assert metadata["heatmap"]["wh"] == [16, 24]
    assert metadata["heatmap"]["stride"] == [63 / 15, 95 / 23]
    assert metadata["heatmap"]["sigma"] == 1.375
    assert metadata["box_padding"] == 1.25
    assert metadata["normalisation"] == {
        "in_graph": True,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "channel_order": "rgb",
    }
    assert metadata["architecture_digest"] is None
    network, path, _ = mixture_file
    digest = session_of(path).get_modelmeta().custom_metadata_map["architecture_digest"]
    assert json.loads(digest) == network.architecture().digest()


def test_the_file_is_alone_and_names_no_place(tiny_file) -> None:
    path, _ = tiny_file
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.onnx"]
    data = path.read_bytes()
    assert str(Path.cwd()).encode() not in data and b".py" not in data


def test_without_the_decoder_there_are_only_maps(tmp_path: Path, capfd) -> None:
    path = tmp_path / "maps.onnx"
    report = export_onnx(
        TinyNetwork(), path, config=tiny_config(), skeleton=FOUR, decode=False, crops=CROPS[:1]
    )
    assert [output.name for output in session_of(path).get_outputs()] == ["heatmaps"]
    assert "keypoints_difference_px" not in report
    assert capfd.readouterr() == ("", "")


class Unfaithful(TinyNetwork):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(images)
        return 1.5 * outputs if torch.compiler.is_exporting() else outputs


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    with pytest.raises(PosefabricError, match=r"model\.onnx: not written: .* differ by"):
        export_onnx(Unfaithful(), path, config=tiny_config(), skeleton=FOUR, crops=CROPS)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


class Broken(TinyNetwork):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(images)
        return outputs if float(outputs.sum()) > 0 else -outputs


def test_what_cannot_be_traced_is_said(tmp_path: Path, capfd) -> None:
    with pytest.raises(PosefabricError, match=r"could not export this network with opset 18"):
        export_onnx(Broken(), tmp_path / "x.onnx", config=tiny_config(), skeleton=FOUR)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    config = tiny_config()
    with pytest.raises(PosefabricError, match=r"\(N, 96, 64, 3\) uint8"):
        export_onnx(
            TinyNetwork(), path, config=config, skeleton=FOUR, crops=CROPS.transpose(0, 2, 1, 3)
        )
    with pytest.raises(PosefabricError, match="at least one"):
        export_onnx(TinyNetwork(), path, config=config, skeleton=FOUR, crops=CROPS[:0])
    from posefabric.skeletons import load_skeleton

    with pytest.raises(PosefabricError, match="expected 14 keypoints"):
        export_onnx(TinyNetwork(), path, config=config, skeleton=load_skeleton("lsp14"))
    with pytest.raises(PosefabricError, match="was made for a, b, c, d"):
        export_onnx(make_supernet(), path, config=config, skeleton=load_skeleton("lsp14"))


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch, missing: str) -> None:
    real = builtins.__import__

    def refusing(name, *args, **kwargs):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(
        PosefabricError, match=rf'{missing} is .*pip install "posefabric\[export\]"'
    ):
        export_onnx(TinyNetwork(), tmp_path / "x.onnx", config=tiny_config(), skeleton=FOUR)
