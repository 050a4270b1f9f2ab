"""OpenVINO finds the poses that torch finds, without torch."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_onnx_predictor import PROGRAM, assert_same, torch_estimator
from tiny_network import FOUR, TinyNetwork, blobs, tiny_config

from posefabric.deploy.export import export_onnx
from posefabric.deploy.onnx_graph import get_metadata
from posefabric.deploy.openvino_export import convert, require_bf16
from posefabric.deploy.openvino_predictor import OpenvinoPoseEstimator, has_bf16, openvino_core
from posefabric.deploy.quantize import RECIPES, quantize_int8
from posefabric.structures import PosefabricError

openvino = pytest.importorskip("openvino", reason="needs the extra: posefabric[openvino]")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """UDP, decoded in the graph and not, in int8, and float said to be for bf16."""
    folder = tmp_path_factory.mktemp("openvino")
    made = {}
    for name, decode in (("decoded", True), ("maps", False)):
        source = folder / f"{name}.onnx"
        export_onnx(TinyNetwork(), source, config=tiny_config("udp"), skeleton=FOUR, decode=decode)
        data = source.read_bytes()
        metadata = get_metadata(onnx.load_from_string(data))
        made[name] = convert(data, folder / f"{name}.xml", metadata=metadata)
        if decode:
            bf16 = {**metadata, "precision": "bf16"}
            made["bf16"] = convert(data, folder / "bf16.xml", metadata=bf16)
            crops = np.stack([blobs(seed, 96, 64) for seed in range(4)])
            int8 = quantize_int8(data, crops, recipe=RECIPES[0])
            facts = get_metadata(onnx.load_from_string(int8))
            made["int8"] = convert(int8, folder / "int8.xml", metadata=facts)
            made["int8 onnx"] = folder / "int8.onnx"
            made["int8 onnx"].write_bytes(int8)
    return made


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["decoded", "maps"])
def test_it_finds_what_torch_finds_in_photographs(files, shared: Path, kind, flip: bool) -> None:
    pictures = sorted((shared / "data/coco_sample").glob("*.jpg"))
    estimator = OpenvinoPoseEstimator(files[kind], threads=1)
    assert estimator.decodes is (kind == "decoded")
    found = estimator.predict(pictures, flip=flip)
    assert_same(found, torch_estimator("udp").predict(pictures, flip=flip))


def test_batches_of_any_size_are_one(files) -> None:
    pictures = [blobs(seed, 90, 70) for seed in range(5)]
    whole = OpenvinoPoseEstimator(files["decoded"], threads=1).predict(pictures)
    assert_same(OpenvinoPoseEstimator(files["decoded"], batch_size=2).predict(pictures), whole)
    assert OpenvinoPoseEstimator(files["decoded"]).predict([]) == []


def test_an_int8_file_is_as_near_to_float_as_in_onnxruntime(files) -> None:
    """The same integers, but each runtime rounds and joins operations in its own way."""
    from posefabric.deploy.onnx_predictor import OnnxPoseEstimator

    crops = np.stack([blobs(seed, 96, 64) for seed in range(30, 34)])
    found = OpenvinoPoseEstimator(files["int8"], threads=1)
    maps = found.score_maps(crops)
    other = OnnxPoseEstimator(files["int8 onnx"], threads=1).score_maps(crops)
    exact = OpenvinoPoseEstimator(files["decoded"], threads=1).score_maps(crops)
    assert np.abs(maps - exact).mean() > 1e-6, "it is not the float network"
    assert np.abs(maps - exact).mean() < 2 * np.abs(other - exact).mean() < 0.1 * exact.mean()
    assert found.metadata["precision"] == "int8"


def test_bf16_asked_of_a_cpu_without_it_is_said(files, caplog) -> None:
    estimator = OpenvinoPoseEstimator(files["bf16"], threads=1)
    crops = np.stack([blobs(seed, 96, 64) for seed in range(2)])
    exact = OpenvinoPoseEstimator(files["decoded"], threads=1).score_maps(crops)
    difference = np.abs(estimator.score_maps(crops) - exact).max()
    if has_bf16():
        assert not caplog.records and 0 < difference < 0.1 * exact.max()
        require_bf16()
        return
    assert "exported for bf16, which this CPU has not" in caplog.text and difference == 0
    with pytest.raises(PosefabricError, match=r"--quantize bf16: this CPU .* int8"):
        require_bf16()


def test_it_carries_its_skeleton_and_says_what_it_is(files) -> None:
    estimator = OpenvinoPoseEstimator(files["decoded"])
    assert estimator.skeleton.limbs == FOUR.limbs
    assert estimator.source.startswith(f"openvino export {files['decoded']} of posefabric ")


def test_files_that_are_none_of_ours_are_refused(files, tmp_path: Path) -> None:
    with pytest.raises(PosefabricError, match=r"no\.xml: no such file"):
        OpenvinoPoseEstimator(tmp_path / "no.xml")
    whole, weights = files["decoded"].read_bytes(), files["decoded"].with_suffix(".bin")
    alone = tmp_path / "alone.xml"
    alone.write_bytes(whole)
    with pytest.raises(PosefabricError, match=r"alone\.bin: no such file"):
        OpenvinoPoseEstimator(alone)
    for name, content, message in (
        ("cut", whole[: len(whole) // 2], r"cut\.xml: openvino .* cannot read it"),
        ("new", whole.replace(b"export_version&quot;: 1", b"export_version&quot;: 9"), "version 9"),
    ):
        assert content != whole
        (tmp_path / f"{name}.xml").write_bytes(content)
        (tmp_path / f"{name}.bin").write_bytes(weights.read_bytes())
        with pytest.raises(PosefabricError, match=message):
            OpenvinoPoseEstimator(tmp_path / f"{name}.xml")
    model = openvino_core().read_model(files["decoded"].with_suffix(".onnx"))
    openvino.save_model(model, tmp_path / "foreign.xml")
    with pytest.raises(PosefabricError, match=r"foreign\.xml: an OpenVINO model, but not one of"):
        OpenvinoPoseEstimator(tmp_path / "foreign.xml")
    with pytest.raises(PosefabricError, match="threads"):
        OpenvinoPoseEstimator(files["decoded"], threads=0)
    with pytest.raises(PosefabricError, match=r"input_wh=\(128, 96\).*--dynamic-size"):
        OpenvinoPoseEstimator(files["decoded"], input_wh=(128, 96))


def test_a_missing_extra_is_named(files, monkeypatch) -> None:
    real = builtins.__import__

    def refusing(name, *args, **kwargs):
        if name.split(".")[0] == "openvino":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(PosefabricError, match=r'pip install "posefabric\[openvino\]"'):
        OpenvinoPoseEstimator(files["decoded"])


def test_it_runs_where_torch_is_not_installed(files, tmp_path: Path) -> None:
    import cv2

    image = blobs(4, 80, 60)
    np.save(tmp_path / "image.npy", image)
    cv2.imwrite(str(tmp_path / "image.png"), image[..., ::-1])
    program = PROGRAM.replace("OnnxPoseEstimator", "OpenvinoPoseEstimator").replace(
        "deploy.onnx_predictor", "deploy.openvino_predictor"
    )
    program = program.replace('"scipy",', '"scipy", "onnxruntime",')
    command = [sys.executable, "-c", program, files["decoded"], tmp_path / "image.npy", tmp_path]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "image.png")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for flip in (False, True):
        expected = torch_estimator("udp").predict(image, flip=flip)[0].keypoints
        np.testing.assert_allclose(np.load(tmp_path / f"{flip}.npy"), expected, atol=0.05)
    (result,) = json.loads((tmp_path / "predictions.json").read_text())
    assert len(result["keypoints"]) == 12


SIGNALLED = """
import faulthandler, os, signal, sys
faulthandler.enable()
from posefabric.deploy.openvino_predictor import OpenvinoPoseEstimator
first, second = (OpenvinoPoseEstimator(sys.argv[1], threads=1) for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_files_were_closed_in_any_order(files) -> None:
    """A training in the same process is stopped by a signal, and told by one of its workers."""
    line = [sys.executable, "-c", SIGNALLED, str(files["decoded"])]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
