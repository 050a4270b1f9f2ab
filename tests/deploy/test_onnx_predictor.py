"""onnxruntime finds the poses that torch finds, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_network import FOUR, TinyNetwork, blobs, tiny_config

from posefabric.data.pipeline import make_codec
from posefabric.deploy.export import export_onnx
from posefabric.deploy.onnx_predictor import OnnxPoseEstimator
from posefabric.deploy.predictor import PoseEstimator
from posefabric.structures import DataError, PosefabricError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """(preset, decode) to file."""
    folder = tmp_path_factory.mktemp("onnx")
    made = {}
    for preset, decode in [("hrnet", True), ("udp", True), ("udp", False)]:
        path = folder / f"{preset}-{decode}.onnx"
        export_onnx(TinyNetwork(), path, config=tiny_config(preset), skeleton=FOUR, decode=decode)
        made[preset, decode] = path
    return made


def torch_estimator(preset: str) -> PoseEstimator:
    return PoseEstimator(
        network=TinyNetwork(),
        skeleton=FOUR,
        codec=make_codec(tiny_config(preset).data),
        normalisation=TinyNetwork.normalisation,
    )


def assert_same(found, expected) -> None:
    """Keypoints to 0.01 input pixels, at about 4 picture pixels an input pixel, but for ties."""
    ours = np.concatenate([prediction.keypoints for prediction in found])
    theirs = np.concatenate([prediction.keypoints for prediction in expected])
    assert np.abs(ours - theirs).max() < 0.04
    ours = np.concatenate([prediction.scores for prediction in found])
    theirs = np.concatenate([prediction.scores for prediction in expected])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours.max() > 0.1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", [("hrnet", True), ("udp", True), ("udp", False)], ids=str)
def test_it_finds_what_torch_finds_in_photographs(files, shared: Path, kind, flip: bool) -> None:
    pictures = sorted((shared / "data/coco_sample").glob("*.jpg"))
    tree = json.loads((shared / "data/coco_sample/test_coco.json").read_text())
    boxes = [
        np.array([a["bbox"] for a in tree["annotations"] if a["image_id"] == int(path.stem)])
        for path in pictures
    ]
    estimator = OnnxPoseEstimator(files[kind], threads=1)
    assert estimator.decodes is kind[1]
    found = estimator.predict(pictures, boxes, flip=flip)
    assert sum(len(prediction) for prediction in found) == 14
    assert_same(found, torch_estimator(kind[0]).predict(pictures, boxes, flip=flip))


def test_batches_of_any_size_are_one(files) -> None:
    pictures = [blobs(seed, 90, 70) for seed in range(5)]
    whole = OnnxPoseEstimator(files["hrnet", True]).predict(pictures)
    single = OnnxPoseEstimator(files["hrnet", True], batch_size=2).predict(pictures)
    assert_same(single, whole)
    assert OnnxPoseEstimator(files["hrnet", True]).predict([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{"box_padding": 1.5, "decode": "dark", "flip_shift": False}, {"smooth": 1.5}],
    ids=lambda changed: "-".join(changed),
)
def test_conventions_chosen_apart_go_with_the_file(tmp_path: Path, changed: dict) -> None:
    """Another crop, blur, decoder or flip shift than the preset's, all found in the file."""
    config = tiny_config()
    for name, value in changed.items():
        setattr(config.data, name, value)
    export_onnx(TinyNetwork(), tmp_path / "x.onnx", config=config, skeleton=FOUR)
    estimator = OnnxPoseEstimator(tmp_path / "x.onnx")
    assert estimator.codec.rules.differing("hrnet") == changed
    expected = PoseEstimator(
        network=TinyNetwork(),
        skeleton=FOUR,
        codec=make_codec(config.data),
        normalisation=TinyNetwork.normalisation,
    )
    pictures = [blobs(seed, 90, 70) for seed in range(3)]
    for flip in (False, True):
        found = estimator.predict(pictures, flip=flip)
        assert_same(found, expected.predict(pictures, flip=flip))
        other = torch_estimator("hrnet").predict(pictures, flip=flip)
        assert np.abs(found[0].keypoints - other[0].keypoints).max() > 0.1


def test_it_carries_its_skeleton_and_says_what_it_is(files) -> None:
    estimator = OnnxPoseEstimator(files["udp", True], providers=["CPUExecutionProvider"])
    skeleton = estimator.skeleton
    assert (skeleton.keypoints, skeleton.limbs) == (FOUR.keypoints, FOUR.limbs)
    assert skeleton.flip_pairs == FOUR.flip_pairs
    np.testing.assert_array_equal(skeleton.sigmas, FOUR.sigmas)
    assert "udp-True.onnx" in estimator.source and "posefabric 0" in estimator.source


def test_bad_boxes_are_named(files) -> None:
    with pytest.raises(DataError, match="picture 0, box 1"):
        OnnxPoseEstimator(files["hrnet", True]).predict(
            blobs(0, 50, 50), [[0, 0, 9, 9], [1, 1, 5, -5]]
        )


def test_files_that_are_none_of_ours_are_refused(files, tmp_path: Path) -> None:
    with pytest.raises(PosefabricError, match=r"no\.onnx: no such file"):
        OnnxPoseEstimator(tmp_path / "no.onnx")
    whole = files["hrnet", True].read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PosefabricError, match=r"cut\.onnx: onnxruntime .* cannot open"):
        OnnxPoseEstimator(cut)
    model = onnx.load_from_string(whole)
    version = next(entry for entry in model.metadata_props if entry.key == "export_version")
    version.value = "99"
    (tmp_path / "new.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(PosefabricError, match=r"new\.onnx: export version 99"):
        OnnxPoseEstimator(tmp_path / "new.onnx")
    del model.metadata_props[:]
    (tmp_path / "foreign.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(PosefabricError, match=r"foreign\.onnx: an ONNX file, but not one of"):
        OnnxPoseEstimator(tmp_path / "foreign.onnx")


def test_bad_options_are_refused(files) -> None:
    path = files["hrnet", True]
    with pytest.raises(PosefabricError, match=r"NoSuchProvider.*CPUExecutionProvider"):
        OnnxPoseEstimator(path, providers=["NoSuchProvider"])
    with pytest.raises(PosefabricError, match="providers"):
        OnnxPoseEstimator(path, providers=[])
    with pytest.raises(PosefabricError, match="threads"):
        OnnxPoseEstimator(path, threads=0)
    with pytest.raises(PosefabricError, match="batch_size"):
        OnnxPoseEstimator(path, batch_size=0)


PROGRAM = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is not installed here")

FORBIDDEN = {"torch", "torchvision", "timm", "onnx", "onnxscript", "scipy", "matplotlib"}
FORBIDDEN |= {"yaml", "pydantic", "safetensors"}
sys.meta_path.insert(0, Forbid())
import numpy as np
from posefabric.deploy.onnx_predictor import OnnxPoseEstimator

estimator = OnnxPoseEstimator(sys.argv[1])
image = np.load(sys.argv[2])
for flip in (False, True):
    prediction, = estimator.predict(image, flip=flip)
    np.save(f"{sys.argv[3]}/{flip}.npy", prediction.keypoints)
FORBIDDEN -= {"yaml", "pydantic"}
from posefabric.deploy.prediction_files import predict_files

predict_files(estimator, sys.argv[4], sys.argv[3])
assert not {"torch", "timm"} & set(sys.modules)
"""


def test_it_runs_where_torch_is_not_installed(files, tmp_path: Path) -> None:
    image = blobs(4, 80, 60)
    np.save(tmp_path / "image.npy", image)
    import cv2

    cv2.imwrite(str(tmp_path / "image.png"), image[..., ::-1])
    command = [sys.executable, "-c", PROGRAM, files["udp", True], tmp_path / "image.npy", tmp_path]
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
    assert len(result["keypoints"]) == 12 and (tmp_path / "overlays/image.png").is_file()
