"""Every row of docs/conventions.md is an option, and every option changes what it says it does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from trainings import make_config

from posefabric.config import Config, DataConfig, OptimConfig, config_from_tree
from posefabric.data.batch import Normalisation
from posefabric.data.conventions import CONVENTIONS, PRESETS, Conventions, choose_conventions
from posefabric.data.pipeline import (
    TrainingData,
    make_codec,
    make_conventions,
    make_geometry,
    open_dataset,
)
from posefabric.structures import PosefabricError

BOX = np.array([10.0, 20.0, 60.0, 80.0])


def options(**given: Any) -> DataConfig:
    return DataConfig(**{"input_wh": (96, 128), **given})


def encode(x: float, y: float, **given: Any) -> tuple[np.ndarray, float]:
    """(32, 24) target of an input pixel, and its weight."""
    codec = make_codec(options(**given))
    maps, weights = codec.encode(torch.tensor([[[x, y]]]), torch.full((1, 1), 2))
    return maps[0, 0].numpy(), float(weights[0, 0])


def decode(maps: np.ndarray, **given: Any) -> np.ndarray:
    """(2,) input pixels of one map (32, 24)."""
    codec = make_codec(options(**given))
    return codec.decode(torch.from_numpy(maps)[None, None].float())[0][0, 0].numpy()


def test_what_the_presets_choose() -> None:
    """The table of CONVENTIONS, column by column."""
    common = dict(box_padding=1.25, outside_weight=0.0, smooth=0.0)
    assert asdict(CONVENTIONS["hrnet"]) == common | dict(
        grow_boxes="never",
        warp="biased",
        stride="biased",
        target="nearest",
        decode="quarter",
        decode_offset=0.0,
        missing_coordinate=0.0,
        flip_shift=True,
        nms_area="crop",
    )
    assert asdict(CONVENTIONS["udp"]) == common | dict(
        grow_boxes="never",
        warp="unbiased",
        stride="unbiased",
        target="subpixel",
        decode="dark",
        decode_offset=0.0,
        missing_coordinate=-1.0,
        flip_shift=False,
        nms_area="crop",
    )
    assert asdict(CONVENTIONS["posenfs"]) == common | dict(
        grow_boxes="train",
        warp="biased",
        stride="biased",
        target="filtered",
        decode="quarter",
        decode_offset=0.5,
        missing_coordinate=0.0,
        flip_shift=False,
        nms_area="box",
    )


OTHERS = dict(
    grow_boxes="everywhere",
    box_padding=1.5,
    warp="unbiased",
    stride="unbiased",
    target="subpixel",
    outside_weight=0.5,
    smooth=1.5,
    decode="udp-dark",
    decode_offset=0.25,
    missing_coordinate=-2.0,
    flip_shift=False,
)


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_changes_its_own_rule_only(name: str) -> None:
    config = options(**{name: OTHERS[name]})
    assert make_conventions(options()) == CONVENTIONS["hrnet"]
    assert make_conventions(config).differing("hrnet") == {name: OTHERS[name]}
    assert make_codec(config).rules == make_geometry(config).rules == make_conventions(config)
    # What the preset has can be chosen back.
    back = options(preset="udp", **{name: asdict(CONVENTIONS["hrnet"])[name]})
    assert asdict(make_conventions(back))[name] == asdict(CONVENTIONS["hrnet"])[name]


def test_every_rule_is_an_option() -> None:
    elsewhere = {"nms_area"}
    assert set(OTHERS) | elsewhere == set(Conventions.__dataclass_fields__)
    assert elsewhere <= set(type(Config().evaluation).model_fields)


def test_unknown_values_are_refused() -> None:
    with pytest.raises(PosefabricError, match=r"data\.decode.*'quarter', 'dark' or 'udp-dark'"):
        config_from_tree({"data": {"decode": "half"}}, origin="x")
    with pytest.raises(PosefabricError, match="decode: expected one of quarter, dark"):
        choose_conventions("hrnet", decode="half")
    with pytest.raises(PosefabricError, match="preset: expected one of hrnet, udp, posenfs"):
        choose_conventions("other")  # type: ignore[arg-type]


def test_box_padding() -> None:
    for padding in (1.0, 1.25, 2.0):
        _, size = make_geometry(options(box_padding=padding)).region(BOX)
        np.testing.assert_allclose(size, [60 * padding, 80 * padding])


def test_warp() -> None:
    """The box's centre (40, 60), and a corner of the region, 37.5 px to its left."""
    for warp, middle, left in (("biased", [48, 64], 0.0), ("unbiased", [47.5, 63.5], 0.0)):
        matrix = make_geometry(options(warp=warp)).image_to_input(BOX)
        found = matrix[:, :2] @ np.array([40, 60]) + matrix[:, 2]
        np.testing.assert_allclose(found, middle, atol=1e-4)
        corner = matrix[:, :2] @ np.array([2.5, 60]) + matrix[:, 2]
        assert corner[0] == pytest.approx(left, abs=1e-4)
    assert make_geometry(options()).image_to_input(BOX)[0, 0] == pytest.approx(96 / 75)
    unbiased = make_geometry(options(warp="unbiased")).image_to_input(BOX)
    assert unbiased[0, 0] == pytest.approx(95 / 75)


def test_stride() -> None:
    """The last cell stands for input pixel 92, or for the last one, 95."""
    peak = np.zeros((32, 24))
    peak[31, 23] = 1
    assert decode(peak).tolist() == [92, 124]
    np.testing.assert_allclose(decode(peak, stride="unbiased"), [95, 127], rtol=1e-6)
    biased, unbiased = encode(49.5, 64.0)[0], encode(49.5, 64.0, stride="unbiased")[0]
    assert [int(maps.argmax()) for maps in (biased, unbiased)] == [16 * 24 + 12, 16 * 24 + 12]
    assert int(encode(46.5, 62.0)[0].argmax()) == 16 * 24 + 12
    assert int(encode(46.5, 62.0, stride="unbiased")[0].argmax()) == 15 * 24 + 11


def test_target() -> None:
    nearest, _ = encode(50.0, 64.0)
    subpixel, _ = encode(50.0, 64.0, target="subpixel")
    filtered, _ = encode(50.0, 64.0, target="filtered")
    assert nearest.max() == 1 and filtered.max() == 1 and subpixel.max() < 0.98
    # 50 / 4 = 12.5 goes to cell 13; between cells it is as far from 12 as from 13.
    assert subpixel[16, 12] == pytest.approx(subpixel[16, 13])
    assert nearest[16, 13] == 1 and nearest[16, 12] < 0.9
    # Cut at 3 sigma of 1.5 px, or by the filter at 4.
    assert (np.flatnonzero(nearest[16]).min(), np.flatnonzero(filtered[16]).min()) == (9, 7)


def test_sigma() -> None:
    wide, _ = encode(48.0, 64.0, sigma=3.0)
    usual, _ = encode(48.0, 64.0)
    assert usual[16, 13] == pytest.approx(np.exp(-1 / (2 * 1.5**2)))
    assert wide[16, 13] == pytest.approx(np.exp(-1 / (2 * 3.0**2)))


def test_outside_weight() -> None:
    for given, expected in ((0.0, 0.0), (0.5, 0.5)):
        maps, weight = encode(300.0, 64.0, outside_weight=given)
        assert weight == expected and not maps.any()
        assert encode(48.0, 64.0, outside_weight=given)[1] == 1
        assert encode(float("nan"), 64.0, outside_weight=given)[1] == 0
    codec = make_codec(options(outside_weight=0.5))
    _, weights = codec.encode(torch.tensor([[[300.0, 64.0]]]), torch.zeros(1, 1))
    assert weights.item() == 0, "not annotated weighs nothing"
    with pytest.raises(PosefabricError, match=r"outside_weight .*set search\.loss=mse"):
        make_config(data=dict(outside_weight=0.5))
    assert make_config(data=dict(outside_weight=0.5), search=dict(loss="mse"))


def udp_dark(one: np.ndarray) -> np.ndarray:
    """(2,) cells by UDP's decoder, in plain steps on OpenCV's blur."""
    y, x = np.unravel_index(one.argmax(), one.shape)
    blurred = cv2.GaussianBlur(one, (11, 11), 0)
    log = np.pad(np.log(np.clip(blurred, 1e-3, 50)), 1, mode="edge")
    near = log[y : y + 3, x : x + 3]
    gradient = np.array([near[1, 2] - near[1, 0], near[2, 1] - near[0, 1]]) / 2
    mixed = (near[2, 2] + near[0, 0] - near[0, 2] - near[2, 0]) / 4
    curve = near[1, 0] + near[1, 2] - 2 * near[1, 1], near[0, 1] + near[2, 1] - 2 * near[1, 1]
    hessian = np.array([[curve[0], mixed], [mixed, curve[1]]])
    return np.array([x, y]) - np.linalg.solve(hessian, gradient)


def test_decode() -> None:
    maps, _ = encode(49.5, 63.0, target="subpixel", sigma=2.0)
    found = {name: decode(maps, decode=name) for name in ("quarter", "dark", "udp-dark")}
    assert found["quarter"].tolist() == [4 * 12.25, 4 * 15.75]
    np.testing.assert_allclose(found["dark"], [49.5, 63.0], atol=0.05)
    np.testing.assert_allclose(found["udp-dark"], [49.5, 63.0], atol=0.05)
    # UDP's clip at 0.001 and its mirrored border differ for faint maps and near the border.
    for x, y, scale in ((49.5, 63.0, 0.0021), (0.9, 63.0, 1.0), (91.0, 63.0, 1.0)):
        maps = scale * encode(x, y, target="subpixel", sigma=2.0)[0]
        ours = decode(maps, decode="udp-dark")
        np.testing.assert_allclose(ours, 4 * udp_dark(maps), atol=1e-2)
        assert np.abs(ours - decode(maps, decode="dark")).max() > 0.05


def test_smoothing_prefers_a_hill_to_a_peak() -> None:
    """Against scipy's filter; the score stays the map's own maximum."""
    maps = 0.6 * encode(20.0, 40.0, sigma=2.0)[0]
    maps[16, 12] = 0.9
    assert np.hypot(*(decode(maps) - [48.0, 64.0])) < 2
    for sigma in (1.0, 1.7):
        found = decode(maps, smooth=sigma)
        blurred = gaussian_filter(maps, sigma, mode="constant")
        y, x = np.unravel_index(blurred.argmax(), blurred.shape)
        assert np.abs(found - [4 * x, 4 * y]).max() <= 1.0
        assert np.hypot(*(found - [20.0, 40.0])) < 3
        scores = make_codec(options(smooth=sigma)).decode(torch.from_numpy(maps[None, None]))[1]
        assert float(scores) == np.float32(0.9)
    with pytest.raises(PosefabricError, match=r"smooth: expected a sigma of 0 to 8, got 9"):
        choose_conventions("hrnet", smooth=9)


def test_decode_offset_and_missing_coordinate() -> None:
    maps, _ = encode(48.0, 64.0)
    np.testing.assert_allclose(decode(maps, decode_offset=0.5) - decode(maps), 0.5)
    for given, expected in ((dict(), 0.0), (dict(missing_coordinate=-1.0), -1.0)):
        assert decode(np.zeros((32, 24)), **given).tolist() == [expected, expected]
        assert decode(-maps - 1, **given).tolist() == [expected, expected]


def test_flip_shift() -> None:
    maps = torch.arange(24.0).expand(1, 1, 32, 24)
    for shift, expected in ((True, [23, 23, 22]), (False, [23, 22, 21]), (None, [23, 23, 22])):
        codec = make_codec(options(flip_shift=shift))
        assert codec.flip_back(maps, np.array([0]))[0, 0, 0, :3].tolist() == expected


def coco(shared: Path, **given: Any) -> DataConfig:
    folder = shared / "data" / "coco_sample"
    names = dict(
        (f"{split}_{kind}", name)
        for split in ("train", "val")
        for kind, name in (("annotations", "test_coco.json"), ("images", "."))
    )
    return DataConfig(root=str(folder), **names, **given)  # type: ignore[arg-type]


def test_grow_boxes(shared: Path) -> None:
    """Ground-truth boxes that cover their keypoints + 5 px: for training, and never unasked."""
    plain = open_dataset(coco(shared), "train")
    grown = open_dataset(coco(shared, grow_boxes="train"), "train")
    assert "grown to cover its keypoints" in grown.box_source
    for before, after in zip(plain.persons, grown.persons, strict=True):
        seen = before.keypoints[before.visibility > 0]
        low, high = after.box_xywh[:2], after.box_xywh[:2] + after.box_xywh[2:]
        assert (low <= np.maximum(np.ceil(seen.min(axis=0) - 5), 0)).all()
        assert (low <= before.box_xywh[:2]).all()
        picture = grown.read_image(after).shape[1::-1]
        assert (high >= np.minimum(np.floor(seen.max(axis=0) + 5), picture)).all()
        assert (low >= 0).all() and (high <= picture).all()
        assert (after.box_xywh == np.round(after.box_xywh)).all()
    boxes = {"plain": plain, "grown": grown}
    for given, split, evaluating, expected in (
        (dict(), "train", False, "plain"),
        (dict(preset="posenfs"), "train", False, "grown"),
        (dict(preset="posenfs"), "train", True, "plain"),
        (dict(preset="posenfs"), "val", False, "plain"),
        (dict(preset="posenfs", grow_boxes="never"), "train", False, "plain"),
        (dict(grow_boxes="everywhere"), "val", True, "grown"),
    ):
        found = open_dataset(coco(shared, **given), split, evaluating=evaluating)  # type: ignore[arg-type]
        for a, b in zip(found.persons, boxes[expected].persons, strict=True):
            assert a.box_xywh.tolist() == b.box_xywh.tolist(), (given, split, evaluating)


@pytest.mark.parametrize("preset", PRESETS)
def test_training_batches_follow_the_options(preset: str) -> None:
    """Geometry and codec of a training are those of the options, of each preset."""
    config = make_config(data=dict(preset=preset, box_padding=1.5, decode="dark"))
    data = TrainingData.open(
        config,
        optim=OptimConfig(batch_size=4),
        normalisation=Normalisation(),
        seed=0,
        device=torch.device("cpu"),
    )
    assert data.geometry.rules == data.codec.rules == make_conventions(config.data)
    assert (data.codec.rules.box_padding, data.codec.rules.decode) == (1.5, "dark")
    assert data.codec.rules.target == CONVENTIONS[preset].target  # type: ignore[index]
    step, crops = next(data.crops(0))
    assert data.prepare(crops, step).heatmaps.shape == (4, 17, 16, 16)


def test_augmentation_presets() -> None:
    """The table's two rows; what is given stays, and a run takes all of a preset named later."""
    from posefabric.config import AugmentConfig, with_overrides

    def ranges(augment: AugmentConfig) -> list[float]:
        names = ("scale", "rotation", "rotation_probability", "flip", "half_body", "colour")
        return [getattr(augment, name) for name in names]

    assert ranges(AugmentConfig(preset="coco")) == [0.35, 45, 0.6, 0.5, 0.3, 0]
    assert ranges(AugmentConfig(preset="mpii")) == [0.25, 30, 0.6, 0.5, 0, 0]
    assert ranges(AugmentConfig(preset="posenfs")) == [0.3, 45, 0.6, 0.5, 0, 0]
    assert ranges(AugmentConfig()) == [0.3, 45, 0.6, 0.5, 0, 0.2]
    given = config_from_tree({"augment": {"preset": "mpii", "scale": 0.1}}, origin="x")
    assert ranges(given.augment) == [0.1, 30, 0.6, 0.5, 0, 0]
    assert with_overrides(given, ["augment.flip=0"]).augment.scale == 0.1
    later = with_overrides(given, ["augment.flip=0", "augment.preset=coco"])
    assert ranges(later.augment) == [0.35, 45, 0.6, 0, 0.3, 0]
    assert config_from_tree(given.model_dump(mode="json"), origin="x") == given
