"""Drawings land where the joints are, and sheets say what the numbers say."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from posefabric.deploy import brush, draw, ranking
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError, Person, PersonDataset, PosefabricError, Predictions

SKELETON = load_skeleton("lsp14")


def standing(x: float, y: float, height: float) -> np.ndarray:
    """(14, 2): a front view, ankles first as in lsp14."""
    at = {
        "ankle": (0.1, 1.0),
        "knee": (0.1, 0.75),
        "hip": (0.1, 0.5),
        "wrist": (0.3, 0.5),
        "elbow": (0.25, 0.35),
        "shoulder": (0.15, 0.2),
    }
    points = []
    for name in SKELETON.keypoints:
        side, _, joint = name.partition("_")
        across, down = at.get(joint, (0.0, 0.15 if name == "neck" else 0.0))
        points.append((x + (across if side == "left" else -across) * height, y + down * height))
    return np.array(points, dtype=np.float32)


def person(keypoints: np.ndarray, *, visibility: int = 2) -> Person:
    low, high = keypoints.min(axis=0), keypoints.max(axis=0)
    return Person(
        image_id=1,
        annotation_id=1,
        file="made",
        box_xywh=np.concatenate([low, high - low]).astype(np.float32),
        keypoints=keypoints,
        visibility=np.full(len(keypoints), visibility, dtype=np.uint8),
    )


def grey(side: int = 200) -> np.ndarray:
    return np.full((side, side, 3), 120, dtype=np.uint8)


def test_left_is_warm_right_is_cool_and_middle_is_neutral():
    sides = brush.keypoint_sides(SKELETON)
    for name, side in zip(SKELETON.keypoints, sides, strict=True):
        assert side == (name.split("_")[0] if "_" in name and "head" not in name else "middle")
    for (start, end), (red, _, blue) in zip(
        SKELETON.limbs, brush.limb_colours(SKELETON), strict=True
    ):
        ends = {sides[start], sides[end]} - {"middle"}
        if ends == {"left"}:
            assert red > blue + 50
        elif ends == {"right"}:
            assert blue > red + 50
        else:
            assert abs(red - blue) < 20
    assert len(set(brush.limb_colours(SKELETON))) == len(SKELETON.limbs)


def test_limbs_are_painted_where_the_joints_are_and_the_input_stays():
    image, points = grey(), standing(100, 20, 160)
    drawn = draw.draw_pose(image, points, None, SKELETON)
    assert np.array_equal(image, grey()) and drawn is not image
    for number, (start, end) in enumerate(SKELETON.limbs):
        x, y = np.rint((points[start] + points[end]) / 2).astype(int)
        expected = brush.limb_colours(SKELETON)[number]
        near = drawn[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).astype(int)
        others = [brush.limb_colours(SKELETON)[other] for other in range(len(SKELETON.limbs))]
        distance = {colour: np.abs(near - colour).sum(axis=1).min() for colour in others}
        assert distance[expected] < 60
    assert np.array_equal(drawn[:10], image[:10])
    assert np.array_equal(drawn[:, :40], image[:, :40])


def test_a_dot_is_centred_on_its_joint():
    points = np.full((14, 2), np.nan)
    points[3] = (60.5, 71.25)
    drawn = draw.draw_pose(grey(), points, None, SKELETON, thickness=6)
    changed = np.abs(drawn.astype(float) - 120).sum(axis=2)
    ys, xs = np.mgrid[:200, :200]
    centre = (changed * xs).sum() / changed.sum(), (changed * ys).sum() / changed.sum()
    assert np.allclose(centre, (60.5, 71.25), atol=0.15)


def test_low_scores_are_faint_and_lower_ones_left_out():
    points = standing(100, 20, 160)

    def change(score: float) -> float:
        scores = np.full(14, score)
        drawn = draw.draw_pose(grey(), points, scores, SKELETON, threshold=0.4)
        return float(np.abs(drawn.astype(float) - 120).sum())

    assert change(0.4) == change(1.0)
    assert change(0.3) == pytest.approx(0.4 * change(1.0), rel=0.03)
    assert change(0.19) == 0
    assert change(0.0) == 0


def test_joints_that_are_not_finite_or_far_away_do_not_matter():
    points = standing(100, 20, 160)
    scores = np.ones(14)
    scores[0] = 0
    without = draw.draw_pose(grey(), points, scores, SKELETON, thickness=3)
    points[0] = np.nan
    assert np.array_equal(draw.draw_pose(grey(), points, None, SKELETON, thickness=3), without)
    points[0] = (1e12, -1e12)
    draw.draw_pose(grey(), points, None, SKELETON)


def test_line_width_follows_the_person():
    def painted(height: float) -> float:
        image = np.full((800, 800, 3), 120, dtype=np.uint8)
        drawn = draw.draw_pose(image, standing(400, 20, height), None, SKELETON)
        return float((drawn != image).any(axis=2).sum())

    assert painted(640) > 6 * painted(160)


def test_wrong_shapes_are_refused():
    with pytest.raises(PosefabricError, match="14 keypoints"):
        draw.draw_pose(grey(), np.zeros((17, 2)), None, SKELETON)
    with pytest.raises(PosefabricError, match="uint8"):
        draw.draw_pose(np.zeros((9, 9, 3)), np.zeros((14, 2)), None, SKELETON)


def test_many_people_are_all_drawn_with_their_boxes():
    points = np.stack([standing(60, 20, 100), standing(140, 60, 100)])
    boxes = np.array([[25.0, 15, 70, 110], [105, 55, 70, 110]])
    drawn = draw.draw_people(grey(), points, None, SKELETON, boxes=boxes)
    assert (drawn[15:17, 30:90] != 120).any() and (drawn[165, 110:170] != 120).any()
    assert (drawn[40:100, 58:63] != 120).any() and (drawn[80:140, 138:143] != 120).any()


def test_a_contact_sheet_keeps_order_and_aspect():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [np.full((40, 80, 3), colour, dtype=np.uint8) for colour in colours]
    sheet = draw.contact_sheet(images, columns=2, cell_wh=(60, 60), gap=4)
    assert sheet.shape == (4 + 2 * 64, 4 + 2 * 64, 3)
    assert tuple(sheet[34, 34]) == colours[0] and tuple(sheet[34, 98]) == colours[1]
    assert tuple(sheet[98, 34]) == colours[2]
    assert (sheet == colours[0]).all(axis=2).sum() == 60 * 30
    with pytest.raises(PosefabricError, match="captions"):
        draw.contact_sheet(images, columns=2, cell_wh=(60, 60), captions=["one"])
    with pytest.raises(PosefabricError, match="needs pictures"):
        draw.contact_sheet([], columns=2, cell_wh=(60, 60))


def test_long_captions_are_cut_inside_their_cell():
    strip = brush.text_strip("a very long caption that cannot fit " * 3, 120, 22)
    assert strip.shape == (22, 120, 3)
    assert (strip[:, -4:] == brush.SHEET).all() and (strip != brush.SHEET).any()


def test_person_error_in_box_and_torso_units():
    truth = standing(100, 20, 160)
    right, left = (SKELETON.keypoints.index(f"{side}_ankle") for side in ("right", "left"))
    predicted = truth.copy()
    predicted[left] += (30, 40)
    predicted[right] += (0, 5)
    one = person(truth)
    error = ranking.person_error(one, predicted, SKELETON)
    width, height = one.box_xywh[2:]
    assert error.mean == pytest.approx((50 + 5) / 14 / np.sqrt(width * height), rel=1e-5)
    # The torso is 160 x hypot(0.25, 0.3), so 0.2 of it is 12.5 pixels.
    assert (error.correct, error.annotated) == (13, 14)
    one.visibility[SKELETON.keypoints.index("left_shoulder")] = 0
    assert ranking.person_error(one, predicted, SKELETON).correct is None
    blank = person(truth, visibility=0)
    assert np.isnan(ranking.person_error(blank, predicted, SKELETON).mean)


def dataset(people: list[Person]) -> PersonDataset:
    def read(one: Person) -> np.ndarray:
        if one.file == "broken":
            raise DataError("broken: cannot be read")
        return grey()

    return PersonDataset(name="made", skeleton=SKELETON, persons=people, read_image=read)


def test_ranking_goes_from_best_to_worst_and_leaves_out_the_barely_annotated():
    truth = standing(100, 20, 160)
    barely = person(truth)
    barely.visibility[3:] = 0
    people = [person(truth), barely, person(truth), person(truth)]
    offsets = np.array([5.0, 0.0, 1.0])[:, None, None]
    predictions = Predictions(
        keypoints=truth[None] + offsets,
        scores=np.ones((3, 14), dtype=np.float32),
        index=np.array([3, 1, 0]),
    )
    assert ranking.rank_rows(dataset(people), predictions) == [0, 3]


def test_the_sheet_maps_people_into_their_cells():
    truth = standing(100, 20, 160)
    people = [person(truth), Person(**{**vars(person(truth)), "file": "broken"})]
    predictions = Predictions(
        keypoints=np.stack([truth, truth]),
        scores=np.zeros((2, 14), dtype=np.float32),
        index=np.array([0, 1]),
    )
    sheet = draw.prediction_sheet(dataset(people), predictions, [0, 1], cell_wh=(150, 190))
    assert sheet.shape == (190 + 22 + 12, 2 * 156 + 6, 3)
    # Scores of 0 hide the prediction: what is left is the white dashed truth, whole.
    cell = sheet[6:196, 6:156]
    ys = np.nonzero((cell > 160).all(axis=2))[0]
    scale = min(150 / (0.6 * 160), 190 / 160) / 1.3
    assert ys.max() - ys.min() == pytest.approx(160 * scale, abs=8)
    assert (ys.max() + ys.min()) / 2 == pytest.approx(95, abs=3)
    with pytest.raises(PosefabricError, match="person 7 has no prediction"):
        draw.prediction_sheet(dataset(people), predictions, [7])


def test_a_cell_shows_the_same_pixels_as_the_transform_says():
    # Ramps across and down: a pixel's colour tells where in the picture it comes from.
    across, down = np.meshgrid(np.arange(100) * 2.5, np.arange(100) * 2.5)
    image = np.stack([across, down, across * 0], axis=2).round().astype(np.uint8)
    for size in (15.0, 80.0):
        one = person(standing(48.3, 11, size))
        cell, to_cell = draw._person_cell(image, one, (40, 40), 1.0)
        inverse = cv2.invertAffineTransform(to_cell)
        for x, y in ((20, 20), (12, 25), (27, 10)):
            expected = 2.5 * (inverse @ (x, y, 1))
            assert np.abs(cell[y, x, :2] - expected).max() < 1.5


def test_png_round_trip_keeps_rgb(tmp_path: Path):
    image = np.random.default_rng(1).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    path = draw.save_png(tmp_path / "new" / "a.png", image)
    assert np.array_equal(cv2.imread(str(path))[:, :, ::-1], image)
    (tmp_path / "file").write_text("x")
    with pytest.raises(PosefabricError, match="cannot be written"):
        draw.save_png(tmp_path / "file" / "a.png", image)
