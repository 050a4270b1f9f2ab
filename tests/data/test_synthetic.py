"""The synthetic people: reproducible, exact, varied, and left and right as in people."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from posefabric.data.canvas import FOREIGN, Canvas, Light
from posefabric.data.coco import read_coco
from posefabric.data.figure import (
    View,
    camera_rotation,
    draw_pose,
    fit_view,
    keypoint_positions,
    pose_figure,
    rotation,
    solids,
)
from posefabric.data.human import HUMAN
from posefabric.data.quadruped import QUADRUPED
from posefabric.data.scene import joint_visibility, paint_layout
from posefabric.data.scenery import draw_coats
from posefabric.data.synthetic import SyntheticPictures, synthetic_people, write_coco
from posefabric.skeletons import load_skeleton
from posefabric.structures import DataError

COCO17 = load_skeleton("coco17")
NAMES = COCO17.keypoints


@pytest.fixture(scope="module")
def people():
    return synthetic_people(count=120, seed=3, skeleton=COCO17)


def paint_alone(pose, view, wh=(192, 192)):
    canvas = Canvas(wh, None)
    figure = solids(pose, view)
    canvas.paint(figure, view.scale, None, Light())
    return canvas, figure


def look_at(yaw, turns=None, pitch=0.0):
    """COCO keypoints (3,) and visibility by name of a figure seen from ``yaw``, arms spread."""
    spread = {"left_shoulder": (0, 25, 0), "right_shoulder": (0, 25, 0)}
    pose = pose_figure(HUMAN, spread | (turns or {}))
    camera = View(camera_rotation(yaw, pitch, 0))
    view = fit_view(pose, camera, extent_px=170, centre=(96, 96))
    canvas, figure = paint_alone(pose, view)
    places = keypoint_positions(pose, view, NAMES)
    seen = joint_visibility(canvas, figure, NAMES, places)
    return dict(zip(NAMES, places, strict=True)), dict(zip(NAMES, seen.tolist(), strict=True))


def true_nearness(figure, x, y):
    """(N,) nearness of each part's surface at a pixel, -inf where it is not there: the highest
    of densely sampled spheres, by the definition of a part and none of the painter's formulas."""
    t = np.linspace(0, 1, 121)[:, None]
    out = np.full(len(figure.parts), -np.inf)
    for row in range(len(figure.parts)):
        a, b = figure.ends[row]
        p, q = figure.halves[row]
        radius = np.maximum(figure.radii[row, 0] * (1 - t) + figure.radii[row, 1] * t, 0.75)
        m = np.linspace(-1, 1, 61 if any(figure.parts[row].width) else 1)[None, :]
        half = (p + (q - p) * t[..., None]) * m[..., None]
        centre = a + (b - a) * t[..., None] + half
        lift = radius**2 - (centre[..., 0] - x) ** 2 - (centre[..., 1] - y) ** 2
        height = np.where(lift > 0, centre[..., 2] + np.sqrt(np.maximum(lift, 0)), -np.inf)
        out[row] = height.max()
    return out


def test_same_seed_same_data(people):
    again = synthetic_people(count=10, seed=3, skeleton=COCO17)
    for mine, other in zip(again.persons, people.persons, strict=False):
        np.testing.assert_array_equal(mine.keypoints, other.keypoints)
        np.testing.assert_array_equal(mine.visibility, other.visibility)
    np.testing.assert_array_equal(again[7].image, people[7].image)
    other = synthetic_people(count=2, seed=4, skeleton=COCO17)
    assert not np.array_equal(other[0].image, people[0].image)
    assert not np.array_equal(other.persons[0].keypoints, people.persons[0].keypoints)


def test_reads_in_any_order_and_in_workers(people):
    reader = pickle.loads(pickle.dumps(people.read_image))
    late = reader(people.persons[5])
    np.testing.assert_array_equal(late, people[5].image)
    assert late.dtype == np.uint8
    assert late.shape == (192, 192, 3)


def test_persons_are_consistent(people):
    for person in people.persons:
        labelled = person.keypoints[person.visibility > 0]
        assert len(labelled) >= 8
        assert (labelled >= -0.5).all() and (labelled < 192).all()
        assert (person.keypoints[person.visibility == 0] == 0).all()
        x, y, w, h = person.box_xywh
        assert x >= 0 and y >= 0 and x + w <= 192 and y + h <= 192
        assert (labelled >= [x - 0.5, y - 0.5]).all() and (labelled <= [x + w, y + h]).all()
        assert 1 <= person.area <= 192 * 192
    assert people.box_source == "ground truth (synthetic)"


def test_wide_pictures():
    data = synthetic_people(count=8, seed=0, skeleton=COCO17, picture_wh=(256, 96))
    assert data[0].image.shape == (96, 256, 3)
    assert all((p.keypoints < [256, 96]).all() for p in data.persons)


def test_facing_decides_left_and_right():
    places, seen = look_at(0)
    for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
        assert places[f"left_{part}"][0] > places[f"right_{part}"][0]
    assert seen["nose"] == seen["left_eye"] == seen["right_eye"] == 2
    places, seen = look_at(180)
    assert places["left_shoulder"][0] < places["right_shoulder"][0]
    assert seen["nose"] == seen["left_eye"] == seen["right_eye"] == 1
    assert seen["left_shoulder"] == seen["right_knee"] == 2
    # Turned to the picture's right, the right side is near: the left one is behind the body.
    # The arms point forward, for a hanging arm would hide the hip.
    forward = {"left_shoulder": (80, 0, 0), "right_shoulder": (80, 0, 0)}
    places, seen = look_at(90, forward)
    assert places["nose"][0] > places["right_ear"][0]
    assert seen["right_ear"] == seen["right_hip"] == seen["right_shoulder"] == 2
    assert seen["left_ear"] == seen["left_hip"] == seen["left_shoulder"] == 1
    _, seen = look_at(-90, forward)
    assert seen["left_ear"] == seen["left_hip"] == 2
    assert seen["right_ear"] == seen["right_hip"] == 1


def test_turns_go_where_they_say():
    rest, _ = look_at(90)
    for name, turns in {
        "left_wrist": {"left_shoulder": (80, 0, 0)},
        "left_knee": {"left_hip": (80, 0, 0)},
        "nose": {"pelvis": (-60, 0, 0)},
    }.items():
        moved, _ = look_at(90, turns)
        assert moved[name][0] - moved["left_hip"][0] > rest[name][0] - rest["left_hip"][0] + 20
    rest, _ = look_at(0)
    moved, _ = look_at(0, {"left_shoulder": (0, 90, 0), "right_shoulder": (0, 90, 0)})
    assert moved["left_wrist"][0] > rest["left_wrist"][0] + 20
    assert moved["right_wrist"][0] < rest["right_wrist"][0] - 20
    np.testing.assert_allclose(rotation(30, 40, 50) @ rotation(30, 40, 50).T, np.eye(3), atol=1e-12)


def test_a_hand_behind_the_back_is_hidden():
    behind = {"right_shoulder": (-30, 0, -70), "right_elbow": (80, 0, 0)}
    front = {"right_shoulder": (25, 0, -70), "right_elbow": (80, 0, 0)}
    assert look_at(0, behind)[1]["right_wrist"] == 1
    assert look_at(180, behind)[1]["right_wrist"] == 2
    assert look_at(0, front)[1]["right_wrist"] == 2
    assert look_at(180, front)[1]["right_wrist"] == 1


def test_a_cover_hides_what_is_below_it():
    pose = pose_figure(HUMAN, {})
    view = fit_view(pose, View(camera_rotation(0, 0, 0)), extent_px=170, centre=(96, 96))
    canvas, figure = paint_alone(pose, view)
    places = keypoint_positions(pose, view, NAMES)
    mask = np.zeros((192, 192), np.uint8)
    mask[int(places[NAMES.index("left_hip"), 1]) + 10 :] = 255
    canvas.cover(mask, np.zeros(3))
    seen = dict(zip(NAMES, joint_visibility(canvas, figure, NAMES, places), strict=True))
    assert seen["left_knee"] == seen["right_ankle"] == 1
    assert seen["left_hip"] == seen["nose"] == 2
    far = places + np.array([150, 0, 0])
    assert joint_visibility(canvas, figure, NAMES, far)[NAMES.index("left_wrist")] == 0


@pytest.mark.parametrize("body", [HUMAN, QUADRUPED], ids=lambda body: body.name)
def test_depth_and_visibility_equal_brute_force(body):
    """Nearness, owners and visibility against densely sampled spheres."""
    rng = np.random.default_rng(5)
    names = tuple(body.keypoints)
    agreed = joints = right_owner = pixels = 0
    errors = []
    for _ in range(5):
        pose = draw_pose(body, rng)
        angles = rng.uniform((-180, -30, -180), (180, 40, 180))
        view = fit_view(pose, View(camera_rotation(*angles)), extent_px=170, centre=(96, 96))
        canvas, figure = paint_alone(pose, view)
        places = keypoint_positions(pose, view, names)
        seen = joint_visibility(canvas, figure, names, places)
        for name, (x, y, near), got in zip(names, places, seen, strict=True):
            surface = true_nearness(figure, round(x), round(y))
            front = int(surface.argmax())
            part = figure.parts[front]
            limit = 1.3 * figure.radii[front].max() + 1
            expected = 2 if name in part.shows and surface[front] - near <= limit else 1
            agreed += int(expected == got)
            joints += 1
        rows, columns = np.nonzero(canvas.owner)
        for pick in rng.integers(0, len(rows), 25):
            y, x = int(rows[pick]), int(columns[pick])
            surface = true_nearness(figure, x, y)
            right_owner += int(surface.argmax() == canvas.owner[y, x] - 1)
            errors.append(abs(surface.max() - canvas.nearness[y, x]))
            pixels += 1
    assert agreed >= 0.98 * joints
    assert right_owner >= 0.96 * pixels
    assert np.percentile(errors, 80) < 0.3


def test_seen_joints_lie_on_the_figure(people):
    for index in range(30):
        layout = people.read_image.layout(index)
        canvas, _ = paint_alone(layout.pose, layout.view)
        person = people.persons[index]
        for (x, y), visible in zip(person.keypoints, person.visibility, strict=True):
            if visible == 2:
                assert canvas.owner[round(float(y)), round(float(x))] > 0
        assert person.area <= np.count_nonzero(canvas.owner)


def test_the_picture_shows_what_the_annotation_says(people):
    """Paint on white that no outfit reaches: what changes is the owner map plus soft edges."""
    layout = people.read_image.layout(2)
    drawn = Canvas((192, 192), np.full((192, 192, 3), 9999, np.float32))
    coats = draw_coats(HUMAN, layout.person.parts, np.random.default_rng(0))
    drawn.paint(layout.person, layout.view.scale, coats, Light())
    assert drawn.picture is not None
    share = 1 - drawn.picture.mean(-1) / 9999
    bare, _ = paint_alone(layout.pose, layout.view)
    np.testing.assert_array_equal(drawn.owner, bare.owner)
    assert (share[bare.owner > 0] > 0.4).all()
    assert (share[bare.owner == 0] < 0.9).all()
    assert share[bare.owner > 0].mean() > 0.9


def test_bystanders_in_front_hide_the_person():
    reader = SyntheticPictures(9, HUMAN, NAMES, (192, 192))

    def area(scene):
        canvas = Canvas((192, 192), None)
        paint_layout(canvas, scene, None)
        return np.count_nonzero((canvas.owner > 0) & (canvas.owner != FOREIGN))

    hidden = []
    for layout in map(reader.layout, range(250)):
        if any(front for _, _, front in layout.bystanders):
            behind = tuple(b for b in layout.bystanders if not b[2])
            without = area(replace(layout, bystanders=behind))
            assert without == area(replace(layout, bystanders=()))
            hidden.append(without - area(layout))
    assert min(hidden) >= 0
    assert max(hidden) > 20


def test_pictures_are_varied(people):
    labelled = np.stack([p.visibility for p in people.persons])
    assert 0.5 < (labelled == 2).mean() < 0.9
    assert 0.1 < (labelled == 1).mean() < 0.45
    assert 0.005 < (labelled == 0).mean() < 0.2
    boxes = np.stack([p.box_xywh for p in people.persons])
    relative = np.stack([(p.keypoints - p.box_xywh[:2]) / p.box_xywh[2:] for p in people.persons])
    for number, name in enumerate(NAMES):
        spread = relative[labelled[:, number] > 0, number].std(0)
        assert spread.min() > 0.1, name
    shoulder = [NAMES.index("left_shoulder"), NAMES.index("right_shoulder")]
    both = (labelled[:, shoulder] > 0).all(1)
    left_first = relative[both][:, shoulder[0], 0] < relative[both][:, shoulder[1], 0]
    assert 0.25 < left_first.mean() < 0.75
    assert boxes[:, 3].std() > 20


def test_colour_does_not_tell_left_from_right(people):
    pairs = [(NAMES.index(f"left_{n}"), NAMES.index(f"right_{n}")) for n in ("elbow", "knee")]
    differences = []
    for index, person in enumerate(people.persons):
        image = people[index].image.astype(float)
        for left, right in pairs:
            if person.visibility[left] == person.visibility[right] == 2:
                x, y = person.keypoints[[left, right]].round().astype(int).T
                differences.append(image[y[0], x[0]] - image[y[1], x[1]])
    values = np.array(differences)
    assert len(values) > 30
    assert (np.abs(values.mean(0)) < 4 * values.std(0) / np.sqrt(len(values))).all()


@pytest.mark.parametrize("name", ["coco17", "mpii16", "lsp14", "quadruped"])
def test_shipped_skeletons(name):
    skeleton = load_skeleton(name)
    data = synthetic_people(count=6, seed=1, skeleton=skeleton)
    for person in data.persons:
        assert person.keypoints.shape == (skeleton.num_keypoints, 2)
        assert np.count_nonzero(person.visibility) >= 4
    assert data[0].image.std() > 5
    assert ("quadruped" if name == "quadruped" else "human") in data.name


def test_names_may_have_spaces_and_short_sides():
    named = replace(COCO17, keypoints=tuple(n.replace("_", " ").title() for n in NAMES))
    short = replace(COCO17, keypoints=tuple(n.replace("left_", "l_") for n in NAMES))
    plain = synthetic_people(count=2, seed=1, skeleton=COCO17)
    for skeleton in (named, short):
        data = synthetic_people(count=2, seed=1, skeleton=skeleton)
        np.testing.assert_array_equal(data.persons[1].keypoints, plain.persons[1].keypoints)


def test_errors_name_what_is_wrong(people):
    unknown = replace(COCO17, keypoints=("left_antenna", *NAMES[1:]))
    with pytest.raises(DataError, match="left_antenna"):
        synthetic_people(count=1, seed=0, skeleton=unknown)
    with pytest.raises(DataError, match="count"):
        synthetic_people(count=0, seed=0, skeleton=COCO17)
    with pytest.raises(DataError, match="picture_wh"):
        synthetic_people(count=1, seed=0, skeleton=COCO17, picture_wh=(16, 192))
    with pytest.raises(DataError, match="seed 3"):
        people.read_image(replace(people.persons[0], file="synthetic/4/000000"))


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_written_as_coco_and_read_back(tmp_path, people, extension):
    from pycocotools.coco import COCO

    few = replace(people, persons=people.persons[:6])
    path = write_coco(few, tmp_path, "val", extension=extension)
    assert path == tmp_path / "annotations" / "val.json"
    back = read_coco(path, tmp_path / "val", COCO17)
    assert len(back) == 6
    for index, person in enumerate(few.persons):
        got = back.persons[index]
        np.testing.assert_allclose(got.keypoints, person.keypoints, atol=1e-4)
        np.testing.assert_array_equal(got.visibility, person.visibility)
        # The reader counts the last pixel as the edge, as the HRNet family does.
        np.testing.assert_allclose(got.box_xywh, person.box_xywh, atol=1.01)
        assert got.area == pytest.approx(person.area)
        difference = np.abs(back[index].image.astype(int) - few[index].image)
        assert difference.max() == 0 if extension == "png" else difference.mean() < 12
    official = COCO(str(path))
    assert len(official.getAnnIds()) == 6
    assert official.loadCats([1])[0]["keypoints"] == list(NAMES)
    with pytest.raises(DataError, match="extension"):
        write_coco(few, tmp_path, "val", extension="gif")
